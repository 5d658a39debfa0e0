"""F16: files that try to run code or to fill the memory, as checkpoint, weights or heads: all refused, and no code
is run."""

import json
import os
import pickle
import re
import shutil
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
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def save_both_formats(folder: Path, content: object) -> list[Path]:
    """As torch.save writes it, and as a bare pickle."""
    torch.save(content, folder / "zip.pth")
    with open(folder / "plain.pth", "wb") as file:
        pickle.dump(content, file, protocol=2)
    return [folder / "zip.pth", folder / "plain.pth"]


UNSAFE = "not weights that can be read safely (Weights only load failed"


@pytest.mark.fault("F16")
@pytest.mark.fast
def test_pickle_as_the_checkpoint_to_resume_from(tiny_config, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in save_both_formats(tmp_path, {"step": 7, "model": Hostile(tmp_path / "canary")}):
        target = folder / "checkpoint-00000007.safetensors"
        path.replace(target)
        error = run_program("train.py", tiny_config, expect=2).stderr
        assert error.startswith(f"error: {target}: not a safetensors file (")
        assert f"no checkpoint in {folder} is valid: remove them to start the run again from step 0" in error
        assert "Traceback" not in error
        assert target.is_file()
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("F16")
@pytest.mark.fast
def test_pickle_among_pretrained_weights(tmp_path):
    weights = {"cls_token": torch.ones(1, 1, 64), "pos_embed": Hostile(tmp_path / "canary")}
    for path in save_both_formats(tmp_path, {"state_dict": weights}):
        with pytest.raises(UserError) as error:
            read_network(path, "student")
        assert str(error.value).startswith(f"{path}: {UNSAFE}")
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("F16")
def test_pickle_to_evaluate(tmp_path, tiny_shards):
    path = save_both_formats(tmp_path, {"teacher": {"backbone.pos_embed": Hostile(tmp_path / "canary")}})[0]
    val = shutil.copytree(tiny_shards, tmp_path / "val")
    error = run_program("-m", "eval", "knn", path, "--train", tiny_shards, "--val", val, expect=2).stderr
    assert error.startswith(f"error: {path}: {UNSAFE}")
    assert "Traceback" not in error
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("F16")
@pytest.mark.fast
def test_pickle_inside_a_head(tmp_path):
    teacher = {f"head.{name}": t for name, t in HEAD.items()}
    path = save_both_formats(tmp_path, {"teacher": teacher})[0]
    assert set(read_network(path)[0]) == {f"cls_head.{name}" for name in HEAD}  # without the hostile part it loads
    teacher["head.last_layer.weight_v"] = Hostile(tmp_path / "canary")
    for path in save_both_formats(tmp_path, {"teacher": teacher}):
        with pytest.raises(UserError) as error:
            read_network(path)
        assert str(error.value).startswith(f"{path}: {UNSAFE}")
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
        message = "LOADED"
    except UserError as error:
        message = str(error)
    print(peak() - before, message)
"""


def read_all(*paths: Path) -> list[str]:
    """The message that each file is refused with. None may take 30 MB of memory, in a separate process."""
    # the shell between resets the peak, which a child otherwise inherits from a large parent
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == len(paths)
    for path, (grown, message) in zip(paths, lines, strict=True):
        assert int(grown) < 30, (path, message)
        assert message.startswith(f"{path}: "), message
    return [message for _, message in lines]


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

    overlapping = tmp_path / "overlapping.pth"  # many entries that share the same bytes
    torch.save({f"blocks.{i}.norm1.weight": torch.zeros(2**20) + i for i in range(8)}, overlapping)
    content = bytearray(overlapping.read_bytes())
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", content)]
    data = [e for e in entries if b"/data/" in content[e + 46 : e + 80] and content[e + 24 : e + 28] == b"\0\0\x40\0"]
    assert len(data) == 8
    with zipfile.ZipFile(overlapping) as whole:
        start = min(e.header_offset for e in whole.infolist() if e.file_size == 2**22)
    for e in data:  # each claims the first one's 4 MB and the 28 MB after it
        content[e + 42 : e + 46] = start.to_bytes(4, "little")
        content[e + 20 : e + 24] = content[e + 24 : e + 28] = (2**25).to_bytes(4, "little")
    overlapping.write_bytes(content)

    claims = tmp_path / "claims.pth"  # four bytes, seen as 64 GB
    torch.save({"pos_embed": torch.ones(1).expand(1, 2**17, 2**17), "cls_token": torch.ones(1, 1, 64)}, claims)
    wide = tmp_path / "wide.pth"  # a small file that claims a large network
    torch.save({"pos_embed": torch.ones(1, 5, 2**17), "patch_embed.proj.weight": torch.ones(1, 3, 8, 8)}, wide)
    deep = tmp_path / "deep.pth"
    torch.save({"pos_embed": torch.ones(1, 5, 64), "patch_embed.proj.weight": torch.ones(64, 3, 8, 8),
                "blocks.999999999.norm1.weight": torch.ones(64)}, deep)  # fmt: skip

    messages = read_all(tmp_path / "deflated.pth", overlapping, claims, wide, deep)
    assert "its entries are compressed, which torch.save never does" in messages[0]
    assert "its entries claim more bytes than the file has" in messages[1]
    assert re.search(r"its tensors would take 68,719,[\d,]+ bytes, the file has", messages[2])
    assert re.search(r"'cls_token' is missing", messages[3])
    assert "is missing" in messages[4]


def safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {  # case: (header, bytes after it, claimed length, message)
    "huge length": ({}, b"", 2**62, r"its header claims 4,611,686,018,427,387,904"),
    "long header": (b'{"a":"' + 5_000_000 * b" " + b'"}', b"", None, r"its header claims 5,000,008"),
    "beyond the file": ({"cls_token": tensor([64], 0, 256)}, b"", None, r"not a safetensors file \("),
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
    "not JSON": (b'{"' + 100 * b"\xff", b"", None, r"not a safetensors file \("),
    "a list": (b"[]      ", b"", None, r"its header is not a JSON object"),
    "empty": (b"", b"", 0, r"its header is not a JSON object"),
    "metadata is not JSON": (
        {"__metadata__": {"densedino": "[" * 100_000}}, b"", None, r"its metadata 'densedino' is not a JSON object"
    ),
    "width not divisible by heads": (
        {
            "__metadata__": {"densedino": '{"heads": "many"}'}, "pos_embed": tensor([1, 5, 4], 0, 80),
            "patch_embed.proj.weight": tensor([4, 3, 1, 1], 80, 128),
        },
        128 * b"\0", None, r"a width of 4 is not divisible by 'many' heads",
    ),
    "unknown attention": (
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
        paths.append(tmp_path / f"checkpoint-{n:08d}.safetensors")  # the same as a checkpoint
        paths[-1].write_bytes(paths[-2].read_bytes())
    messages = read_all(*paths)
    for n, (case, (_, _, _, message)) in enumerate(HEADERS.items()):
        assert re.search(message, messages[2 * n]), (case, messages[2 * n])
        assert re.search("not a safetensors file|not a checkpoint", messages[2 * n + 1]), (case, messages[2 * n + 1])


def test_a_good_file_loads(tmp_path):
    """Files of the same writer load if they are not hostile."""
    header = {"pos_embed": tensor([1, 5, 4], 0, 80), "patch_embed.proj.weight": tensor([4, 3, 1, 1], 80, 128)}
    path = safetensors(tmp_path / "w.safetensors", header, 128 * b"\0")
    assert set(read_network(path)[0]) == {"backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    with pytest.raises(UserError, match="'cls_token' is missing"):
        load_backbone(path)
