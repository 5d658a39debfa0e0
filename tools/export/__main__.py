"""Export a trained backbone: a folder for timm, transformers, torch.export and ONNX.

    python -m tools.export NETWORK DST [--to timm,transformers,torch,onnx,card | all]

NETWORK is a run folder, a checkpoint, a backbone file, weights of any format that `model.init` takes, or timm:NAME. A ResNet
is refused: timm loads the files of others by itself.

    DST/model.safetensors   the backbone under timm's names; always written, as is config.json
    DST/config.json         architecture, its arguments, input size and normalization, in timm's hub format
    DST/transformers/       --to transformers: a folder for AutoModel.from_pretrained and AutoImageProcessor.from_pretrained
    DST/model.pt2           --to torch: a program of torch.export
    DST/model.onnx          --to onnx: needs the packages onnx, onnxscript and onnxruntime
    DST/README.md           --to card: a model card with data, recipe, measures and how to load each format

By default all but ONNX; transformers is left out, with the reason, if it has no such network. model.pt2 and model.onnx:
normalized images float32 [n,C,h,w] -> cls [n,D], patches [n,N,D], for any h and w that are multiples of the patch size.

Before the program reports success, each format is read again and its features are compared with those of the network here.
An earlier export's files in DST are replaced, or removed if they are not written now; an edited README.md is kept.

In timm and transformers the features are equal for images of the size that the network was trained for. For other sizes both
resize the position grid by rules of their own; the published code samples it at (h + 0.1) / 14 (28.1 / 14 for 448 pixels)
without antialiasing. Features are then close, not equal. model.pt2 and model.onnx keep the published rule.

A network trained with reference.attention: all_query is refused: its patches never attend to [CLS], but those of a plain
ViT do. With every other mode (`none` too) a network without reference tokens is a plain ViT.

n images · C channels · h, w height and width, pixels · N patches · D width.
"""

import os
from pathlib import Path

from runtime.config import TIMM
from runtime.errors import UserError, run_cli, suggest, suggest_path
from tools.docstring import make_parser

FORMATS = ("timm", "transformers", "torch", "onnx", "card")


def read_formats(words: str) -> tuple[str, ...]:
    """The formats of --to. Raises UserError for one that there is not."""
    if words == "all":
        return FORMATS
    formats = tuple(dict.fromkeys(word.strip() for word in words.split(",")))
    for word in formats:
        if word not in FORMATS:
            raise UserError(
                f"--to {words}: '{word}' must be one of {', '.join(FORMATS)}{suggest(word, FORMATS)}; or all"
            )
    return formats


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("tools.export", "tools.export.__main__")
    parser.add_argument("network", help="a run folder, a checkpoint, weights of any known format, or timm:NAME")
    parser.add_argument("dst", type=Path, help="the folder to write")
    parser.add_argument("--to", metavar="FORMAT,…|all", help="what to write (default: all but onnx)")
    args = parser.parse_args(argv)
    formats = None if args.to is None else read_formats(args.to)
    path = Path(args.network)
    if not args.network.startswith(TIMM) and not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or backbone file{suggest_path(path)}")

    from model.vit import require_vit
    from model.weights import load_backbone, timm_call
    from tools.export.card import write_card
    from tools.export.folder import default_formats, export

    network = load_backbone(args.network)
    if network.note:
        print(network.note)
    vit = require_vit(network, args.network, "an export")
    if formats is None:
        formats, reason = default_formats(vit.architecture)
        if reason:
            print(f"transformers is left out: {reason}")
    differences, removed = export(vit, args.dst, formats)
    if removed:
        print(f"removed, of an earlier export: {', '.join(removed)}")
    if "card" in formats:
        print(write_card(vit, args.network, args.dst, formats))
    print(f"{args.dst}: {', '.join(sorted(p.name + os.sep * p.is_dir() for p in args.dst.iterdir()))}")
    print(f"images of {vit.image_size} px have the same features here and in {', '.join(differences)}")
    print(timm_call(vit, args.dst / "model.safetensors"))
    print(f'timm.create_model("local-dir:{args.dst}", pretrained=True)  # the same, by config.json')
    if "transformers" in formats:
        print(f'transformers.AutoModel.from_pretrained("{args.dst / "transformers"}")')


if __name__ == "__main__":
    run_cli(main)
