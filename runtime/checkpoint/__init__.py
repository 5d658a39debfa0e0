"""The state of a run on disk, without pickle.

format.py   a checkpoint file: safetensors with the step, the config and its own sha256 in the header
resume.py   which checkpoint a run resumes from, and whether it is the same run
writer.py   checkpoints written in the background while the run trains

Importing this package loads no torch: a run that cannot resume is refused before anything heavy is loaded.
"""

from runtime.checkpoint.format import (
    Checkpoint,
    CorruptCheckpoint,
    open_checkpoint,
    read_header,
    read_tensors,
    restore,
    save_backbone,
    save_tensors,
    training_state,
)
from runtime.checkpoint.resume import (
    environment_changes,
    find_resume,
    fingerprint,
    identify,
    latest_valid,
    same_data,
    update_evaluation,
)
from runtime.checkpoint.writer import HostCopies, Writer

__all__ = [
    "Checkpoint", "CorruptCheckpoint", "HostCopies", "Writer", "environment_changes", "find_resume", "fingerprint",
    "identify", "latest_valid", "open_checkpoint", "read_header", "read_tensors", "restore", "same_data", "save_backbone",
    "save_tensors", "training_state", "update_evaluation",
]  # fmt: skip
