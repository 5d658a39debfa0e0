"""Which checkpoint a run resumes from, and whether it is the same run."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.checkpoint.format import Checkpoint, CorruptCheckpoint, list_checkpoints, open_checkpoint
from runtime.command import again
from runtime.config import Config, diff, dump_run_config, flatten, load_config, parse_config
from runtime.errors import UserError
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
    """What identifies a data set, wherever its folder is: samples, shards, a hash over the shards' sizes and hashes."""
    shards = manifest["shards"]
    rows = json.dumps([[s["samples"], s["bytes"], s.get("sha256")] for s in shards])
    samples = sum(s["samples"] for s in shards)
    return {"samples": samples, "shards": len(shards), "sha256": hashlib.sha256(rows.encode()).hexdigest()}


def find_resume(
    folder: Path, config: Config, data: dict[str, Any], allowed: list[str] | tuple[str, ...] = ()
) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint from which a run folder resumes, or None; a message for each difference that was allowed).

    data: `fingerprint` of the data set to train on. allowed: keys whose values may differ ("loss.alpha", "data.shards").
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
    if found and found.data != data:
        old, new = (f"{d['samples']:,} samples in {_count(d['shards'], 'shard')}" for d in (found.data, data))
        what = f"saved {old}, current {new}" if old != new else f"saved and current have {old}, but the photos differ"
        changes["data.shards"] = f"data.shards: {what}"
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
    changed = [key for key in after if key.startswith("eval.") and before[key] != after[key]]
    if changed or not file.is_file():
        write_atomic(file, text)
    return [f"{file}: {key}: was {_word(before[key])}, now {_word(after[key])}" for key in changed]


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


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _word(value: object) -> str:
    return "null" if value is None else str(value)
