"""The model card of an export: README.md, as model hubs show it. Data, recipe and measures come from the run; then how to
load each format, and a line of the license for the user to fill in.

The last line has a hash of the others, so that a card that was edited is never replaced.
"""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from eval.provenance import known_weights
from eval.tables import read_object, result_columns, result_notes, result_rows
from eval.target import EvalTarget
from model.vit import ViT
from model.weights import timm_call
from runtime.checkpoint import latest_valid
from runtime.config import Config
from runtime.files import write_atomic
from tools.export.transformers_folder import CLASSES, model_type

NAME = "README.md"
MARK = re.compile(r"\A(.*)<!-- written by tools\.export; sha256 of the text above: (\w{64}) -->\n\Z", re.DOTALL)


def is_edited(path: Path) -> bool:
    """Whether a file is a card, but not as `write_card` wrote it."""
    if path.name != NAME or not path.is_file():
        return False
    found = MARK.match(path.read_text(encoding="utf-8", errors="replace"))
    return found is None or hashlib.sha256(found[1].encode()).hexdigest() != found[2]


def write_card(vit: ViT, source: str, folder: Path, formats: Collection[str]) -> str:
    """Write the card of a network at `source`; returns what the user should hear of it. An edited one is kept."""
    path = folder / NAME
    if is_edited(path):
        return f"{path} was edited and is kept; remove it to have it written again"
    text = card(vit, source, folder, formats)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomic(path, f"{text}<!-- written by tools.export; sha256 of the text above: {digest} -->\n")
    return f"{path}: the line of the license is for you to fill in"


def card(vit: ViT, source: str, folder: Path, formats: Collection[str]) -> str:
    """The text of the card."""
    target = EvalTarget(source)
    named = target.run.resolve().name if target.run else source.rpartition("/")[2]
    also = [kind for kind in ("transformers", "onnx") if kind in formats]
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\n"
        f"tags: [{', '.join(['image-feature-extraction', 'timm', *also])}]\n"
        "# license: write yours here; weights that training started from may restrict it\n---\n",
        f"# {named}\n\n{_network(vit)}\n",
        *(_of_run(target, target.config) if target.config and target.run else [f"Weights: `{source}`.\n"]),
        f"## Use\n\n{_pixels(vit)}\n\n{_load(vit, folder.resolve().name, formats)}",
        "## License\n\nTo be filled in by who publishes it.\n",
    ]
    return "\n".join(parts) + "\n"


def _network(vit: ViT) -> str:
    a = vit.architecture
    million = sum(p.numel() for p in vit.parameters()) / 1e6
    registers = f", {a.registers} registers" if a.registers else ""
    return (
        f"A vision transformer for features of images: width {a.width}, {a.depth} blocks of {a.heads} heads, patches of "
        f"{a.patch} pixels{registers}, {million:.1f} million parameters, images of {vit.image_size} pixels."
    )


def _of_run(target: EvalTarget, config: Config) -> list[str]:
    """Data, recipe and measures of a run."""
    assert target.run is not None
    found, weights = latest_valid(target.run / "checkpoints"), known_weights(target.path)
    about = found.data if found else {}
    photos = f", {about['samples']:,} photos (sha256 {about['sha256'][:12]}…)" if "samples" in about else ""
    names = [f"`{'/'.join(source.path.rstrip('/').split('/')[-2:])}`" for source in config.data.sources]
    data = [f"- Shards: {', '.join(names)}{photos}"]
    data += ["- Where the photos are from, and under which license: to be filled in"]
    views = " + ".join(f"{g.count} of {g.size} pixels" for g in config.data.views)
    step = f", {weights['step']:,} steps" if weights and weights["step"] is not None else ""
    optim = config.optim
    decay = " to ".join(f"{w:g}" for w in optim.weight_decay)
    points = f", {config.points} reference points for a pair of views" if config.points else ""
    recipe = [
        f"- Method: {config.method}{points}",
        f"- Started from: {target.start or 'random weights'}",
        f"- {optim.epochs:g} epochs of batches of {optim.global_batch_size} images{step}; views: {views}",
        f"- Learning rate {optim.lr:g} for 256 images, weight decay {decay}, seed {config.seed}",
    ]
    results = read_object(target.run / "results.json")
    measures = "Not measured: `python -m eval report` writes results.json.\n"
    if results and results.get("weights") == weights:
        try:
            rows = [["%", *result_columns(results)], *([label, *cells] for label, cells in result_rows(results))]
            rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
            measures = "".join(f"| {' | '.join(row)} |\n" for row in rows) if rows[2:] else ""
            measures += "".join(f"\n{note}\n" for note in result_notes(results))
        except (KeyError, TypeError, AttributeError):  # of another version
            pass
    elif results:
        measures = "Not measured: the results.json of the run is of other weights.\n"
    return [
        "## Data\n\n" + "\n".join(data) + "\n",
        "## Recipe\n\n" + "\n".join(recipe) + "\n",
        f"## Measures\n\n{measures}",
    ]


def _pixels(vit: ViT) -> str:
    colors = "gray" if vit.architecture.channels == 1 else "RGB"
    return (
        f"Images are {colors}, normalized (mean and standard deviation: config.json). Features are [CLS], {vit.width} "
        f"numbers for an image, and patch tokens, {vit.width} numbers for each {vit.patch} x {vit.patch} pixels."
    )


def _load(vit: ViT, folder: str, formats: Collection[str]) -> str:
    """A block of Python for each format."""
    prefix, side, channels = vit.architecture.prefix, vit.image_size, vit.architecture.channels
    lines = {
        "timm": f'import timm\n\nvit = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        f"# or, without config.json: {timm_call(vit, Path(folder, 'model.safetensors'))}\n"
        f"tokens = vit.forward_features(images)  # [n,{channels},{side},{side}]\n"
        f"cls, patches = tokens[:, 0], tokens[:, {prefix}:]",
        "transformers": "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{folder}/transformers")\n'
        f'model = AutoModel.from_pretrained("{folder}/transformers")  # {CLASSES[model_type(vit.architecture)]}\n'
        'tokens = model(**processor(photo, return_tensors="pt")).last_hidden_state\n'
        f"cls, patches = tokens[:, 0], tokens[:, {prefix}:]",
        "torch": "import torch\n\n"
        f'model = torch.export.load("{folder}/model.pt2").module()\n'
        f"cls, patches = model(images)  # [n,{channels},h,w]: any multiples of {vit.patch}, two patches at least",
        "onnx": "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{folder}/model.onnx")\n'
        f'cls, patches = session.run(["cls", "patches"], {{"images": images}})  # [n,{channels},h,w], as above',
    }  # fmt: skip
    chosen = [lines[kind] for kind in lines if kind in {*formats, "timm"}]
    return "".join(f"```python\n{text}\n```\n\n" for text in chosen).rstrip("\n") + "\n"
