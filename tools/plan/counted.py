"""What a step of a config takes: arithmetic and memory, by model/cost.py.

    python -m tools.plan.counted        counts the configs of CONFIGS again, and writes counted.json

Counting loads torch and takes seconds to a minute, so the results for the configs that a plan may propose are kept in
counted.json. Any other config is counted when it is asked for. A count depends on the network, the views and the losses, and
on nothing else: a config with another batch, rate or length has the same.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from runtime.config import TIMM, Config, flatten, load_config
from runtime.files import write_atomic
from tools.plan.recipe import PROTOTYPES, SMALL_CONFIG

TABLE = Path(__file__).with_name("counted.json")
CONFIGS = (
    "configs/photos_10k.yaml", "configs/densedino_vits16.yaml", "configs/continue_dino_vits16.yaml",
    "configs/photos64.yaml", "configs/demo.yaml", "configs/densedino_vitti16.yaml", "configs/dino_vits16.yaml",
    "configs/dino_vits16_multicrop.yaml", "configs/continue_dinov2_vits14.yaml",
)  # fmt: skip
PRECISIONS = (
    ("cuda", "bfloat16"),
    ("cpu", "float32"),
)  # what is trained with on a GPU that is on the list, and on a CPU
SECTIONS = ("method", "model", "reference", "head", "clustering", "contrast", "data.views", "loss.cls_views")
NOT_COUNTED = ("scale", "blur", "solarize", "init")  # last parts of keys in these that no count depends on


class Counted(NamedTuple):
    """Of one image of a step: FLOPs; and bytes, which `model.cost.Memory` explains."""

    flops: int
    parameters: int  # of the student
    memory: dict[str, dict[str, int]]  # by `memory_key`


def memory_key(device: str, dtype: str, checkpointing: bool) -> str:
    return f"{device} {dtype}{' checkpointing' * checkpointing}"


def prepared(config: Config) -> Config:
    """A copy whose architecture is named: that of timm's weights, or vit_small for a file, which is not read here."""
    config = copy.deepcopy(config)
    if config.model.arch is None:
        name = (config.model.init or "").removeprefix(TIMM).partition(".")[0]
        config.model.arch = name if (config.model.init or "").startswith(TIMM) else "vit_small"
    return config


def digest(config: Config) -> str:
    """Equal for two configs that have the same count."""
    values = {
        key: value for key, value in flatten(prepared(config)).items()
        if key.startswith(SECTIONS) and key.rpartition(".")[2] not in NOT_COUNTED
    }  # fmt: skip
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_table() -> dict[str, dict]:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


def known(config: Config, device: str, dtype: str) -> Counted | None:
    """The kept count of a config, if there is one."""
    row = read_table().get(digest(config))
    if row is None or memory_key(device, dtype, False) not in row["memory"]:
        return None
    return Counted(row["flops"], row["parameters"], row["memory"])


def count(config: Config, device: str, dtype: str) -> Counted:
    """Count a config now. Loads torch."""
    import torch

    from model.cost import count_cost, count_memory

    config, memory = prepared(config), {}
    for checkpointing in (False, True):
        config.speed.activation_checkpointing = checkpointing
        counted = count_memory(config, getattr(torch, dtype), device)
        memory[memory_key(device, dtype, checkpointing)] = vars(counted)
    config.speed.activation_checkpointing = False  # what is computed again is no arithmetic of the model
    cost = count_cost(config)
    return Counted(cost.flops, cost.parameters, memory)


def kept_configs() -> list[tuple[str, Config]]:
    """The configs of the table, with what they are called in it."""
    small = [f"head.prototypes={k}" for _, k in PROTOTYPES[1:-1]]  # the first is the config's own, the last ImageNet's
    named = [(name, load_config(name)) for name in CONFIGS]
    return named + [(f"{SMALL_CONFIG} {word}", load_config(SMALL_CONFIG, [word])) for word in small]


def main() -> None:
    table: dict[str, dict] = {}
    for name, config in kept_configs():
        row = table.setdefault(digest(config), {"configs": [], "memory": {}})
        row["configs"].append(name)
        for device, dtype in PRECISIONS:
            if memory_key(device, dtype, False) not in row["memory"]:
                counted = count(config, device, dtype)
                row |= {"flops": counted.flops, "parameters": counted.parameters}
                row["memory"] |= counted.memory
        write_atomic(TABLE, json.dumps(table, indent=1) + "\n")
        print(name, flush=True)


if __name__ == "__main__":
    main()
