"""F16: files that want to run code or fill the memory, as a checkpoint, as weights, as heads: refused, and no canary."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program

from model.weights import load_backbone, read_network
from runtime.errors import UserError

HEAD = {
    "mlp.0.weight": torch.ones(4, 64), "last_layer.weight_g": torch.ones(5, 1), "last_layer.weight_v": torch.ones(5, 4),
}  # fmt: skip


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def both_kinds(folder: Path, content: object) -> list[Path]:
    """As torch.save writes it, and as a bare pickle."""
    torch.save(content, folder / "zip.pth")
    with open(folder / "plain.pth", "wb") as file:
        pickle.dump(content, file, protocol=2)
    return [folder / "zip.pth", folder / "plain.pth"]


UNSAFE = "not weights that can be read safely (Weights only load failed"


@pytest.mark.fault("F16")
@pytest.mark.fast
def test_a_pickle_as_the_checkpoint_to_resume_from(tiny_config, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in both_kinds(tmp_path, {"step": 7, "model": Hostile(tmp_path / "canary")}):
        target = folder / "checkpoint-00000007.safetensors"
        path.replace(target)
        told = run_program("train.py", tiny_config, expect=2).stderr
        assert told.startswith(f"error: {target}: not a safetensors file (")
        assert f"no checkpoint in {folder} is valid: remove them to start the run again from step 0" in told
        assert "Traceback" not in told
        assert target.is_file()
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("F16")
@pytest.mark.fast
def test_a_pickle_among_pretrained_weights(tmp_path):
    weights = {"cls_token": torch.ones(1, 1, 64), "pos_embed": Hostile(tmp_path / "canary")}
    for path in both_kinds(tmp_path, {"state_dict": weights}):
        with pytest.raises(UserError) as told:
            read_network(path, "student")
        assert str(told.value).startswith(f"{path}: {UNSAFE}")
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("F16")
def test_a_pickle_to_evaluate(tmp_path, tiny_shards):
    path = both_kinds(tmp_path, {"teacher": {"backbone.pos_embed": Hostile(tmp_path / "canary")}})[0]
    told = run_program("-m", "eval.knn", path, "--bank", tiny_shards, "--val", tiny_shards, expect=2).stderr
    assert told.startswith(f"error: {path}: {UNSAFE}")
    assert "Traceback" not in told
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("F16")
@pytest.mark.fast
def test_a_pickle_inside_a_head(tmp_path):
    teacher = {f"head.{name}": t for name, t in HEAD.items()}
    path = both_kinds(tmp_path, {"teacher": teacher})[0]
    assert set(read_network(path)[0]) == {f"cls_head.{name}" for name in HEAD}  # without the hostile part it is one
    teacher["head.last_layer.weight_v"] = Hostile(tmp_path / "canary")
    for path in both_kinds(tmp_path, {"teacher": teacher}):
        with pytest.raises(UserError) as told:
            read_network(path)
        assert str(told.value).startswith(f"{path}: {UNSAFE}")
    assert not (tmp_path / "canary").exists()


READ = """
import resource, sys
from pathlib import Path
from model.weights import load_backbone
from runtime.errors import UserError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for path in sys.argv[1:]:
    before = peak()
    try:
        load_backbone(path)
        told = "LOADED"
    except UserError as mistake:
        told = str(mistake)
    print(peak() - before, told)
"""


def read_all(*paths: Path) -> list[str]:
    """What each file is refused with; and none may take 30 MB of memory, in a process of its own."""
    # the shell between resets the peak, which a child otherwise inherits from a large parent
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == len(paths)
    for path, (grown, told) in zip(paths, lines, strict=True):
        assert int(grown) < 30, (path, told)
        assert told.startswith(f"{path}: "), told
    return [told for _, told in lines]


@pytest.mark.fault("F16")
def test_bombs(tmp_path):
    """Small files that would take 256 MB, 512 MB and 64 GB."""
    big = {"pos_embed": torch.zeros(64 * 2**20), "cls_token": torch.ones(1, 1, 64)}
    torch.save(big, tmp_path / "stored.pth")
    kept, packed = tmp_path / "stored.pth", tmp_path / "deflated.pth"
    with zipfile.ZipFile(kept) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for entry in stored.infolist():
            deflated.writestr(entry.filename, stored.read(entry))
    assert (tmp_path / "deflated.pth").stat().st_size < 300_000
    (tmp_path / "stored.pth").unlink()

    overlapping = tmp_path / "overlapping.pth"  # many entries, one run of bytes
    torch.save({f"blocks.{i}.norm1.weight": torch.zeros(2**20) + i for i in range(8)}, overlapping)
    content = bytearray(overlapping.read_bytes())
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", content)]
    data = [e for e in entries if b"/data/" in content[e + 46 : e + 80] and content[e + 24 : e + 28] == b"\0\0\x40\0"]
    assert len(data) == 8
    with zipfile.ZipFile(overlapping) as whole:
        start = min(e.header_offset for e in whole.infolist() if e.file_size == 2**22)
    for e in data:  # each claims the first one's 4 MB and the 28 MB behind them
        content[e + 42 : e + 46] = start.to_bytes(4, "little")
        content[e + 20 : e + 24] = content[e + 24 : e + 28] = (2**25).to_bytes(4, "little")
    overlapping.write_bytes(content)

    claims = tmp_path / "claims.pth"  # four bytes, seen as 64 GB
    torch.save({"pos_embed": torch.ones(1).expand(1, 2**17, 2**17), "cls_token": torch.ones(1, 1, 64)}, claims)
    wide = tmp_path / "wide.pth"  # little of a network that would be large
    torch.save({"pos_embed": torch.ones(1, 5, 2**17), "patch_embed.proj.weight": torch.ones(1, 3, 8, 8)}, wide)
    deep = tmp_path / "deep.pth"
    torch.save({"pos_embed": torch.ones(1, 5, 64), "patch_embed.proj.weight": torch.ones(64, 3, 8, 8),
                "blocks.999999999.norm1.weight": torch.ones(64)}, deep)  # fmt: skip

    told = read_all(tmp_path / "deflated.pth", overlapping, claims, wide, deep)
    assert "its entries are compressed, which torch.save never does" in told[0]
    assert "its entries promise more bytes than the file has" in told[1]
    assert re.search(r"its tensors would take 68,719,[\d,]+ bytes, the file has", told[2])
    assert re.search(r"'cls_token' is missing", told[3])
    assert "is missing" in told[4]


def safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {  # what: (header, bytes behind it, length told, what is told)
    "huge length": ({}, b"", 2**62, r"the header would take 4,611,686,018,427,387,904"),
    "long header": (b'{"a":"' + 5_000_000 * b" " + b'"}', b"", None, r"the header would take 5,000,008"),
    "behind the file": ({"cls_token": tensor([64], 0, 256)}, b"", None, r"not a safetensors file \("),
    "overlapping": (
        {"cls_token": tensor([4], 0, 16), "pos_embed": tensor([4], 8, 24)}, 24 * b"\0", None, r"not a safetensors file \("
    ),
    "backwards": ({"cls_token": tensor([4], 16, 0)}, 16 * b"\0", None, r"not a safetensors file \("),
    "absurd shape": ({"cls_token": tensor([2**40, 2**40], 0, 16)}, 16 * b"\0", None, r"not a safetensors file \("),
    "shape that overflows to zero": (
        {"cls_token": tensor([2**32, 2**32], 0, 0)}, b"", None, r"not a safetensors file \("
    ),
    "unknown dtype": ({"cls_token": tensor([4], 0, 16, "PICKLE")}, 16 * b"\0", None, r"not a safetensors file \("),
    "brackets": (100_000 * b'{"a":', b"", None, r"not a safetensors file \("),
    "no JSON": (b'{"' + 100 * b"\xff", b"", None, r"not a safetensors file \("),
    "a list": (b"[]      ", b"", None, r"its header is no JSON object"),
    "empty": (b"", b"", 0, r"its header is no JSON object"),
    "about itself, wrongly": (
        {"__metadata__": {"densedino": "[" * 100_000}}, b"", None, r"what it tells of itself is no JSON object"
    ),
    "heads that share nothing": (
        {
            "__metadata__": {"densedino": '{"heads": "many"}'}, "pos_embed": tensor([1, 5, 4], 0, 80),
            "patch_embed.proj.weight": tensor([4, 3, 1, 1], 80, 128),
        },
        128 * b"\0", None, r"'many' heads do not share a width of 4",
    ),
    "an attention of its own": (
        {
            "__metadata__": {"densedino": '{"heads": 2, "attention": "patchs"}'}, "pos_embed": tensor([1, 5, 4], 0, 80),
            "patch_embed.proj.weight": tensor([4, 3, 1, 1], 80, 128),
        },
        128 * b"\0", None, r"attention: one of .* did you mean 'patches'\?",
    ),
    "no axes": (
        {"pos_embed": tensor([], 0, 4), "patch_embed.proj.weight": tensor([4, 3, 1, 1], 4, 52)}, 52 * b"\0", None,
        r"'pos_embed' has shape \(\), expected 3 axes",
    ),
}  # fmt: skip


@pytest.mark.fault("F16")
def test_hostile_safetensors_headers(tmp_path):
    paths = []
    for n, (header, data, length, _) in enumerate(HEADERS.values()):
        paths.append(safetensors(tmp_path / f"{n}.safetensors", header, data, length))
        paths.append(tmp_path / f"checkpoint-{n:08d}.safetensors")  # and as a checkpoint
        paths[-1].write_bytes(paths[-2].read_bytes())
    told = read_all(*paths)
    for n, (what, (_, _, _, message)) in enumerate(HEADERS.items()):
        assert re.search(message, told[2 * n]), (what, told[2 * n])
        assert re.search("not a safetensors file|not a checkpoint", told[2 * n + 1]), (what, told[2 * n + 1])


def test_a_good_file_is_taken(tmp_path):
    """The same writer's files load where nothing is hostile."""
    header = {"pos_embed": tensor([1, 5, 4], 0, 80), "patch_embed.proj.weight": tensor([4, 3, 1, 1], 80, 128)}
    path = safetensors(tmp_path / "w.safetensors", header, 128 * b"\0")
    assert set(read_network(path)[0]) == {"backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    with pytest.raises(UserError, match="'cls_token' is missing"):
        load_backbone(path)
