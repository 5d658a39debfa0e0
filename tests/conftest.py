"""What several tests stand on: the oracle's tensors, where they are, and one thread each (pytest-xdist gives the cores)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

ORACLE = Path(os.environ.get("ORACLE", Path(__file__).parents[2] / "shared" / "oracle"))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracle():
    """Reads a file of the published code's tensors; skips the test where there is none."""
    from safetensors.torch import load_file

    def read(name: str) -> dict[str, torch.Tensor]:
        path = ORACLE / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no oracle: {path} is not there (set ORACLE=folder)")
        return load_file(path)

    return read


@pytest.fixture(scope="session")
def oracle_json():
    import json

    def read(name: str) -> dict:
        path = ORACLE / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"no oracle: {path} is not there (set ORACLE=folder)")
        return json.loads(path.read_text())

    return read
