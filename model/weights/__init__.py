"""Weights from anywhere: our runs and checkpoints, timm:NAME, and files of the trainers in families.py.

read.py      a file or run folder -> what it contains. Safe: nothing is unpickled but tensors and plain options
families.py  whose weights a file holds, by the names of its tensors
names.py     the parameter names of every checkpoint format <-> ours; loading is strict
timm_hub.py  timm:NAME, the pretrained weights that timm knows by a name; the call of timm that loads a backbone of ours
fit.py       a ViT's tensors for another position grid, patch size or number of channels
pixels.py    the pixels that a file's weights take, and patch filters that take others
init.py      the backbone of any of these (evaluation), and a run that starts from them (model.init)
"""

from model.weights.init import (
    about_backbone,
    load_backbone,
    load_pretrained,
    read_network,
    weights_seed,
    with_architecture,
)
from model.weights.names import load_strictly, remap_keys
from model.weights.timm_hub import loading_lines, timm_call, timm_model

__all__ = [
    "about_backbone", "load_backbone", "load_pretrained", "load_strictly", "loading_lines", "read_network",
    "remap_keys", "timm_call", "timm_model", "weights_seed", "with_architecture",
]  # fmt: skip
