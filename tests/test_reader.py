"""The WebDataset reader and the loader: the plan's samples, the windows' pixels, damage replaced, no process left."""

import io
import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.batch import Batch, draw
from pipeline.loader import Loader, count_workers
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.readers.worker import crop_resize
from pipeline.shards import Shards
from runtime.config import load_config
from runtime.errors import UserError


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config)


def opened(config):
    shards = Shards(config.data.shards)
    return shards, Plan(shards, batch=config.optim.global_batch_size, seed=config.seed, holdout=config.data.holdout)


def batches(config, start=0, stop=7, **ranks) -> list[Batch]:
    shards, plan = opened(config)
    return list(webdataset.read(config, shards, plan, start=start, stop=stop, **ranks))


def same(a: Batch, b: Batch) -> bool:
    pairs = [
        (a.ids, b.ids),
        (a.rows, b.rows),
        (a.windows, b.windows),
        (a.view_points, b.view_points),
        (a.color, b.color),
    ]
    return a.step == b.step and all(torch.equal(x, y) for x, y in [*pairs, *zip(a.views, b.views, strict=True)])


def test_a_batch_follows_the_plan_and_the_draws(config):
    shards, plan = opened(config)
    for batch in batches(config):
        ids = plan.samples_of(batch.step)
        assert np.array_equal(batch.ids, ids)
        assert np.array_equal(batch.rows, ids)
        assert [v.shape for v in batch.views] == [(16, 2, 32, 32, 3), (16, 2, 16, 16, 3)]
        assert batch.view_points.shape == (16, 2, 4, 2, 2, 2)
        drawn = draw(config, plan.epoch(batch.step), ids, shards.index["height"][ids], shards.index["width"][ids])
        assert np.array_equal(batch.windows, drawn.windows)
        for i in (0, 5):
            photo = Image.open(io.BytesIO(shards.read(int(ids[i])))).convert("RGB")
            assert photo.size == (shards.index["width"][ids[i]], shards.index["height"][ids[i]])
            for v, size in enumerate((32, 32, 16, 16)):
                x0, y0, x1, y1 = (int(c) for c in batch.windows[i, v])
                expected = photo.crop((min(x0, x1), y0, max(x0, x1), y1)).resize((size, size), Image.Resampling.BICUBIC)
                expected = np.asarray(expected)[:, :: -1 if x0 > x1 else 1]
                ours = batch.views[v // 2][i, v % 2].numpy().astype(int)
                assert np.abs(ours - expected).mean() < 0.5
    assert (batch.windows[..., 0] > batch.windows[..., 2]).any()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_flipped_view_is_the_mirrored_view_to_the_last_bit(interpolation):
    """The crop is flipped before it is resized: smaller and larger, by even, odd and broken factors."""
    pixels = torch.randint(0, 256, (9, 500, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = pixels.permute(2, 0, 1)  # in memory as `decode` leaves it
    for width in [*range(1, 40), 96, 97, 143, 224, 225, 303, 448, 497]:
        for size in (16, 98, 224):
            view, flipped = (
                crop_resize(image, np.array(window, np.int32), size, interpolation=interpolation)
                for window in ((2, 1, 2 + width, 8), (2 + width, 1, 2, 8))
            )
            assert torch.equal(flipped, view.flip(1))


def test_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert count_workers(0) == (0, "")
    assert count_workers(2) == (2, "")
    workers, note = count_workers(8)
    assert workers == 2
    assert note.startswith("speed.workers: 8, but this process may use 2 cores")


def test_workers_and_restarts_change_nothing(config):
    once = batches(config)
    config.speed.workers = 2
    assert all(same(a, b) for a, b in zip(once, batches(config), strict=True))
    assert all(same(a, b) for a, b in zip(once[3:], batches(config, start=3), strict=True))


def test_ranks_share_a_step(config):
    whole = batches(config, stop=2)
    parts = [batches(config, stop=2, rank=r, world_size=2) for r in range(2)]
    for step, batch in enumerate(whole):
        for r in range(2):
            assert torch.equal(parts[r][step].ids, batch.ids[r::2])
            assert torch.equal(parts[r][step].view_points, batch.view_points[r::2])
            assert torch.equal(parts[r][step].views[0], batch.views[0][r::2])


def with_damage(shards: Shards, folder: Path, damaged: list[int]) -> str:
    """A copy of the shards in which each of these samples has one flipped bit in the middle of its scan, which most
    decoders do not notice."""
    shutil.copytree(shards.folder, folder)
    for sample in damaged:
        record = shards.index[sample]
        path = folder / shards.shards[int(record["shard"])]["name"]
        content = bytearray(path.read_bytes())
        content[int(record["offset"]) + int(record["size"]) * 3 // 4] ^= 0x10
        path.write_bytes(content)
    return str(folder)


def test_a_damaged_photo_is_replaced_and_no_other(config, tmp_path):
    intact = batches(config)
    shards, plan = opened(config)
    damaged = [int(intact[0].ids[3]), int(intact[2].ids[9])]
    config.data.shards = with_damage(shards, tmp_path / "damaged", damaged)
    again = batches(config)
    for a, b in zip(intact, again, strict=True):
        affected = [i for i, sample in enumerate(a.ids.tolist()) if sample in damaged]
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.color, b.color)  # draws are still keyed by the planned id
        for i in range(16):
            if i in affected:
                expected = plan.replacement_id(int(a.ids[i]), a.step, 1)
                assert int(b.rows[i]) in {plan.replacement_id(int(a.ids[i]), a.step, n) for n in range(1, 4)}
                assert expected not in damaged
            else:
                assert int(b.rows[i]) == int(a.ids[i])
                assert torch.equal(a.views[0][i], b.views[0][i])
                assert torch.equal(a.windows[i], b.windows[i])
    loader = make_loader(config, stop=7)
    assert len(list(loader)) == 7
    replaced = loader.damaged()
    assert {planned for _, planned, _ in replaced} == set(damaged) & set(torch.cat([b.ids for b in intact]).tolist())
    assert loader.damaged() == []


def test_a_shard_that_is_deleted_during_a_run(config, tmp_path):
    """Its samples count as damaged; as its own shard has no valid ones, replacements come from the other shards."""
    config.data.shards = str(shutil.copytree(config.data.shards, tmp_path / "shards"))
    shards, plan = opened(config)
    (tmp_path / "shards" / shards.shards[0]["name"]).unlink()
    lost = set(range(shards.starts[1]))
    seen: set[int] = set()
    for batch in webdataset.read(config, shards, plan, start=0, stop=5):
        seen |= lost & set(batch.ids.tolist())
        assert not lost & set(batch.rows.tolist())
        assert (batch.rows == batch.ids)[[int(i) not in lost for i in batch.ids]].all()
    assert seen
    assert shards.describe(min(seen)) == {
        "shard": shards.shards[0]["name"], "byte": shards.index["offset"][min(seen)],
        "source": shards.source(min(seen)),
        "why": f"only 0 of its {shards.index['size'][min(seen)]} bytes could be read",
    }  # fmt: skip
    for shard in shards.shards[1:]:
        (tmp_path / "shards" / shard["name"]).unlink()
    with pytest.raises(UserError, match="100 samples in a row are damaged, the last one in shard-"):
        list(webdataset.read(config, Shards(config.data.shards, max_missing=None), plan, start=5, stop=6))


def make_loader(config, stop: int, start: int = 0) -> Loader:
    shards, plan = opened(config)
    device = torch.device("cpu")
    return Loader(config, shards, plan, device=device, dtype=torch.float32, start=start, stop=stop)


def test_the_loader_gives_what_the_network_takes(config):
    loader = make_loader(config, stop=3)
    loaded = list(loader)
    assert [b.step for b in loaded] == [0, 1, 2]
    for batch in loaded:
        assert [v.shape for v in batch.views] == [(2, 16, 3, 32, 32), (2, 16, 3, 16, 16)]
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in batch.views)
    halves = loaded[0].split(2)
    assert torch.equal(torch.cat([h.views[1] for h in halves], 1), loaded[0].views[1])
    assert torch.equal(torch.cat([h.view_points for h in halves]), loaded[0].view_points)
    assert loader.waited() > 0
    assert loader.waited() == 0
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_close_leaves_no_thread_and_no_process(config, workers):
    config.speed.workers = workers
    before = {t.name for t in threading.enumerate()}
    loader = make_loader(config, stop=1000)
    next(loader)
    loader.close()
    left = {t.name for t in threading.enumerate()} - before
    assert not {name for name in left if name == "loader"}
    assert not multiprocessing.active_children()


def test_bad_folders(tmp_path, config, photos):
    with pytest.raises(UserError, match=f"make shards SRC={photos} DST={photos}-shards"):
        Shards(photos)
    with pytest.raises(UserError, match="no such folder"):
        Shards(tmp_path / "nowhere")
    truncated = tmp_path / "truncated"
    shutil.copytree(config.data.shards, truncated)
    shard = sorted(truncated.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name}: has .* bytes, the manifest says"):
        Shards(truncated)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: is missing"):
        Shards(truncated)
    assert f"{shard}: is missing" in Shards(truncated, max_missing=0.9).missing_summary
    manifest = json.loads((truncated / "manifest.json").read_text())
    for change in ({"name": "../outside.tar"}, {"samples": -1}, {"bytes": "many"}, {"samples": None}):
        changed = manifest | {"shards": [manifest["shards"][0] | change, *manifest["shards"][1:]]}
        (truncated / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="not a manifest of shards"):
            Shards(truncated, max_missing=None)
    manifest["shards"][0]["samples"] += 1
    (truncated / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the index holds 96 samples, the manifest 97"):
        Shards(truncated, max_missing=None)
