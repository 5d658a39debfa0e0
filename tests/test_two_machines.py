"""Two machines, started with the README's command (tests/machines.py). They share a folder, and their result equals that of
one process."""

import pytest

from tests.faults.program import Program, final, log
from tests.machines import two_machines


def test_two_machines_agree_with_one(tiny_config, tmp_path):
    words = [
        "model.drop_path=0",
        "speed.precision=float64",
        "optim.epochs=2",
        "run.log_every=1",
        "run.log_samples=true",
    ]
    with two_machines() as machines:
        started = machines.start(str(tiny_config), *words, f"run.folder={tmp_path / 'two'}")
        for process in started:
            _, err = process.communicate(timeout=180)
            assert process.returncode == 0, err
    code, _, err = Program(tiny_config, *words, f"run.folder={tmp_path / 'one'}").end()
    assert code == 0, err
    ours, theirs = log(tmp_path / "one"), log(tmp_path / "two")
    for step in range(10):
        assert theirs["losses"][step] == pytest.approx(ours["losses"][step], rel=1e-9)
        shares = [theirs[f"samples{of}.jsonl"][step]["samples"] for of in ("", "-1")]
        assert sorted(shares[0] + shares[1]) == sorted(ours["samples.jsonl"][step]["samples"])
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert all((two[n] - t).abs().max() <= 1e-9 * max(1.0, float(t.abs().max())) for n, t in one.items())
