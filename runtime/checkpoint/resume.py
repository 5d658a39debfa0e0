"""Which checkpoint a run resumes from, and whether it is the same run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.checkpoint.format import Checkpoint, CorruptCheckpoint, list_checkpoints, open_checkpoint
from runtime.command import again
from runtime.config import Config, diff, dump_run_config, flatten, load_config, parse_config
from runtime.errors import UserError, plural
from runtime.files import write_atomic

SHAPES = {  # keys whose values decide the names or shapes of a network's weights
    "method", "model.arch", "model.patch", "model.width", "model.depth", "head.hidden", "head.bottleneck",
    "head.prototypes", "head.layers", "head.norm", "head.shared", "clustering.queue", "data.channels",
}  # fmt: skip


def latest_valid(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint of a folder, or None if it has no checkpoints. Corrupt ones are reported and skipped.

    Raises UserError if all of them are corrupt: to start again silently would lose days of training.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return open_checkpoint(path)
        except CorruptCheckpoint as error:
            last = error
            if path != paths[-1]:
                print(f"skipped: {error}")
    if paths:
        raise UserError(f"{last}; no checkpoint in {folder} is valid: remove them to start the run again from step 0")
    return None


def fingerprint(manifest: dict[str, Any]) -> dict[str, Any]:
    """What identifies a folder of shards, wherever it is: samples, shards, a hash over the shards' sizes and hashes."""
    shards = manifest["shards"]
    rows = json.dumps([[s["samples"], s["bytes"], s.get("sha256")] for s in shards])
    samples = sum(s["samples"] for s in shards)
    return {"samples": samples, "shards": len(shards), "sha256": hashlib.sha256(rows.encode()).hexdigest()}


def identify(shards: Any) -> dict[str, Any]:
    """What identifies the data of a run: the `fingerprint` of its shards. Of a mixture also those of its sources, in their
    order, with their weights; and their folders, for messages. shards: the pipeline's Shards or Mixture."""
    found = [fingerprint(part.manifest) for part in shards.parts]
    if len(found) == 1:
        return found[0]
    weights = shards.weights or [None] * len(found)
    rows = json.dumps([[source["sha256"], weight] for source, weight in zip(found, weights, strict=True)])
    sources = [
        {"folder": str(part.folder), "weight": weight, **source}
        for part, weight, source in zip(shards.parts, weights, found, strict=True)
    ]
    total = {key: sum(source[key] for source in found) for key in ("samples", "shards")}
    return {**total, "sha256": hashlib.sha256(rows.encode()).hexdigest(), "sources": sources}


def same_data(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs train on the same data: `identify` of each. Where it is does not count."""
    return all(a[key] == b[key] for key in ("samples", "shards", "sha256"))


def find_resume(
    folder: Path, config: Config, data: dict[str, Any], allowed: Sequence[str] = ()
) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint from which a run folder resumes, or None; a message for each difference that was allowed).

    data: `identify` of the data set to train on. allowed: keys whose values may differ ("loss.alpha", "data.shards").
    Raises UserError that lists every other difference between the saved run and this one.
    """
    found = latest_valid(folder / "checkpoints")
    if found:
        saved = parse_config(found.config, str(found.path))
    elif (folder / "config.yaml").is_file():
        saved = load_config(folder / "config.yaml")
    else:
        return None, []
    changes = diff(saved, config)
    if found and not same_data(found.data, data):
        changes["data.shards"] = f"data.shards: {_difference(found.data, data)}"
    refused = {key: message for key, message in changes.items() if key not in allowed}
    if refused:
        what = f"{folder} holds another run ({'; '.join(refused.values())}); start a new run with RUN=another/folder"
        if SHAPES & refused.keys() or saved.image_size != config.image_size:
            raise UserError(f"{what} (its weights have other shapes, they cannot be resumed with these values)")
        command = again(*(word for key in refused for word in ("--allow-change", key)))
        about = ", see docs/howto/train-longer.md" if "optim.epochs" in refused else ""
        raise UserError(f"{what}, or resume this one with the new values{about}: `{command}`")
    return found, [f"allowed change: {message}" for message in changes.values()]


def update_evaluation(folder: Path, found: Checkpoint, config: Config) -> list[str]:
    """Give a finished run the `eval` section of `config`, as a resumed run would have it: what follows training reads the
    run's config.yaml. Nothing else of the file changes. found: the run's checkpoint. Returns a message for each value that
    is new."""
    file = folder / "config.yaml"
    kept = parse_config(file.read_text() if file.is_file() else found.config, str(file))
    before = flatten(kept)
    text = dump_run_config(replace(kept, eval=config.eval))
    after = flatten(parse_config(text, str(file)))
    keys = [key for key in before | after if key.startswith("eval.")]  # eval.every is a number, or several keys
    changed = [key for key in keys if before.get(key) != after.get(key)]
    if changed or not file.is_file():
        write_atomic(file, text)
    return [f"{file}: {key}: was {_word(before.get(key))}, now {_word(after.get(key))}" for key in changed]


def environment_changes(found: Checkpoint | None, environment: dict[str, str]) -> list[str]:
    """A message, if the environment is not the one in which the checkpoint was written.

    No such change is refused: a run may move to another number of processes, device or precision. None of them changes
    which samples, windows, points and colors a step sees. But sums are rounded differently, so the change is reported.
    """
    if found is None:
        return []
    names = [n for n in found.environment | environment if found.environment.get(n) != environment.get(n)]
    changes = [f"{n}: saved {found.environment.get(n, 'none')}, current {environment.get(n, 'none')}" for n in names]
    return [f"rounding differs from before step {found.step}: {'; '.join(changes)}"] if changes else []


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In words, how the data of a checkpoint differs from that of today."""
    if "sources" not in old and "sources" not in new:
        saved, current = (f"{d['samples']:,} samples in {plural(d['shards'], 'shard')}" for d in (old, new))
        same = f"saved and current have {saved}, but the photos differ"
        return same if saved == current else f"saved {saved}, current {current}"
    one = {"folder": "", "weight": None}  # what identifies one source does not name it
    was, now = ({s["sha256"]: s for s in d.get("sources", [one | d])} for d in (old, new))
    changes = [f"without {_source(was[key])}" for key in was if key not in now]
    changes += [f"with {_source(now[key])}" for key in now if key not in was]
    for key in was:
        if key in now and (before := was[key]["weight"]) != (after := now[key]["weight"]):
            place = now[key]["folder"] or was[key]["folder"]
            changes.append(f"weight of {place}: saved {_word(before)}, current {_word(after)}")
    return f"the mixture differs from the saved one: {', '.join(changes) or 'its sources are in another order'}"


def _source(source: dict[str, Any]) -> str:
    return f"{source['folder']} ({source['samples']:,} samples)".lstrip()


def _word(value: object) -> str:
    return "null" if value is None else str(value)
