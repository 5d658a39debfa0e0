"""What is evaluated: a run, one of its checkpoints, or a backbone file from elsewhere; and where its figures are kept."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.datasets import LabeledPhotos, open_shards
from model.vit import ViT
from model.weights import TIMM, load_backbone
from pipeline.remote.cache import is_address
from pipeline.shards import Plan, Shards
from runtime import distributed
from runtime.config import Config, Eval, load_config
from runtime.errors import UserError, suggest
from runtime.metrics import append_jsonl


class EvalTarget:
    """The network behind a path, and what its run knows: the photos it was trained on and those it never saw.

    path: a run folder, a checkpoint (folder or file), a backbone file or timm:NAME. `run` and `config` are None where
    the path lies in no run folder. Raises UserError where there is nothing at `path`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        elsewhere = str(path).startswith(TIMM)
        if not elsewhere and not self.path.exists():
            beside = self.path.parent.iterdir() if self.path.parent.is_dir() else ()
            raise UserError(f"{path}: no such run, checkpoint or backbone file{suggest(str(path), map(str, beside))}")
        places = [] if elsewhere else [self.path, *self.path.absolute().parents[:3]]
        self.run = next((place for place in places if (place / "config.yaml").is_file()), None)
        self.config: Config | None = load_config(self.run / "config.yaml", []) if self.run else None
        self.settings = self.config.eval if self.config else Eval()

    def network(self, untrained: bool = False) -> ViT:
        """The teacher's backbone, frozen, on the best device; `untrained`: the run's network as it was at step 0."""
        if untrained and self.run is None:
            raise UserError(f"{self.path}: only a run knows its untrained network, this lies in no run folder")
        network = load_backbone(self.run if untrained and self.run else self.path, untrained=untrained)
        if self.config:
            network.precision = distributed.choose_precision(self.config.speed.precision, best_device())
        return network.to(best_device()).eval().requires_grad_(False)

    def photos(
        self, size: int, bank: str | None = None, val: str | None = None, limit: int | None = None
    ) -> tuple[LabeledPhotos, LabeledPhotos] | None:
        """Photos for k-NN: (those that vote, those that are asked about); None where they have no classes.

        bank: shards, by default the run's training shards less those it holds out. val: shards, by default the run's
        `data.val`, else the samples it holds out. limit: at most so many of each, evenly spread.
        """
        data = self.config.data if self.config else None
        bank = bank or (data.shards if data else None)
        if bank is None:
            raise UserError(
                f"{self.path}: lies in no run folder; say which shards vote (--bank) and which are asked (--val)"
            )
        bank_shards = open_shards(bank, self.config)
        held_out = self._held_out(bank_shards)
        kept = np.setdiff1d(np.arange(len(bank_shards)), held_out)
        val = val or (data.val if data else None)
        if val is not None and not same_folder(val, bank):
            val_shards = open_shards(val, self.config)
            asked = np.arange(len(val_shards))
        elif len(held_out):
            val_shards, asked = bank_shards, held_out
        else:
            raise UserError(f"{bank}: all of it votes, nothing is left to ask about; give other shards with --val")
        if not bank_shards.classes or not val_shards.classes:
            return None
        return (
            LabeledPhotos(bank_shards, size, spread(kept, limit)),
            LabeledPhotos(val_shards, size, spread(asked, limit), classes=bank_shards.classes),
        )

    def scenes_folder(self, data: str | None) -> str:
        """`data`, or the run's `eval.voc`. Raises UserError where there is neither."""
        if data is None and self.settings.voc is None:
            raise UserError(
                "which scenes? --data names a folder in Pascal VOC's layout (or eval.voc in the run's config)"
            )
        return data or str(self.settings.voc)

    def _held_out(self, shards: Shards) -> NDArray[np.int64]:
        """What training kept out of these shards, as train.py does it: nothing where it had other shards to test on."""
        c = self.config
        if c is None or c.data.val or c.data.shards is None or not same_folder(c.data.shards, shards.folder):
            return np.empty(0, np.int64)
        return Plan(shards, batch=c.optim.global_batch_size, seed=c.seed, holdout=c.data.holdout).held_out()

    def record(self, what: str, **figures: Any) -> str:
        """Append a line to the run's evaluations.jsonl; returns what to tell the user about it."""
        if self.run is None:
            return f"not recorded: {self.path} lies in no run folder"
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "network": str(self.path)}
        file = self.run / "evaluations.jsonl"
        append_jsonl(file, line | figures)
        return f"recorded in {file}"


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def same_folder(a: str | Path, b: str | Path) -> bool:
    if is_address(a) or is_address(b):
        return str(a).rstrip("/") == str(b).rstrip("/")
    return Path(a).resolve() == Path(b).resolve()


def spread(rows: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of the rows, evenly spaced: shards may be sorted by class."""
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.arange(limit) * len(rows) // limit]
