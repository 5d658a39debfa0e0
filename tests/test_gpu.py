"""`python -m tools.gpu`: every part runs at the tiny size, and none of them can take the others' rows along."""

from pathlib import Path

import pytest
from conftest import run_program

from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tools.gpu.__main__ import choose_parts
from tools.gpu.__main__ import main as run_gpu
from tools.gpu.parts import PARTS, Part, Report, Setting
from tools.gpu.runner import run_parts

NAMES = [part.name for part in PARTS]


ENDS = {  # of tests/gpu_parts.py: the part's status, and words of the reason
    "raises": ("failed", "ValueError: broken"),
    "exits": ("failed", "exit code 7"),
    "crashes": ("failed", "SIGSEGV"),
    "hangs": ("failed", "no end within"),
    "lacks": ("not run", "no DALI"),
    "is_wrong": ("failed", "an error: 2.0"),
}


def setting_in(folder) -> Setting:
    return Setting(True, str(folder / "none"), str(folder), str(folder / "rows.jsonl"))


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_fails_leaves_the_others_rows(name, tmp_path):
    """Stand-ins for all parts; one of them fails, each in another way."""
    way = list(ENDS)[NAMES.index(name) % len(ENDS)]
    functions = {other: "fine" for other in NAMES} | {name: way}
    limits = {part: 2 if function == "hangs" else 60 for part, function in functions.items()}
    parts = [Part(part, f"tests.gpu_parts:{function}", limits[part], "?") for part, function in functions.items()]
    setting = setting_in(tmp_path)._replace(tiny=False)
    statuses = {row["part"]: row for row in run_parts(parts, setting, tmp_path / "log.txt", 600)}
    status, why = ENDS[way]
    assert statuses[name]["status"] == status
    assert why in statuses[name]["why"]
    assert all(row["status"] == "done" for part, row in statuses.items() if part != name)
    with_rows = {row["part"] for row in read_jsonl(tmp_path / "rows.jsonl") if "what" in row}
    assert with_rows == set(NAMES) - ({name} if way == "lacks" else set())  # what it had measured is kept
    assert not any(is_running(row["child"]) for row in read_jsonl(tmp_path / "children.jsonl"))


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    """The whole command, as on the day; the rows that a correct program reaches are reached."""
    out = tmp_path / "rows.jsonl"
    done = run_program("-m", "tools.gpu", "--tiny", "--minutes", "30", "--out", out)
    found = read_jsonl(out)
    statuses = {row["part"]: row["status"] for row in found if "status" in row}
    assert list(statuses) == NAMES
    assert set(statuses.values()) <= {"done", "not run"}, done.stdout
    judged = [row for row in found if "reached" in row]
    assert len(judged) > 20
    assert all(row["reached"] for row in judged)
    measured = {row["part"] for row in found if "what" in row}
    assert measured == {name for name, status in statuses.items() if status == "done"}
    assert "versions" in found[0]


def test_the_exit_code_names_the_part_that_failed(tmp_path, capsys):
    parts = [Part("one", "tests.gpu_parts:fine", 60, "?"), Part("two", "tests.gpu_parts:is_wrong", 60, "?")]
    code = run_gpu(["--tiny", "--out", str(tmp_path / "rows.jsonl")], parts)
    printed = capsys.readouterr()
    assert code == 1
    assert "failed: two" in printed.err
    assert "a row" in printed.out
    assert "NOT REACHED" in printed.out


def test_targets(tmp_path):
    """A target of speed is judged on a real device only; what is required is judged everywhere."""
    report = Report("x", setting_in(tmp_path)._replace(tiny=False))
    report.row("slow", 1.0, at_least=2)
    assert not report.wrong
    report.row("wrong", float("nan"), at_most=2, required=True)
    assert report.wrong
    tiny = Report("x", setting_in(tmp_path))
    tiny.row("slow", 1.0, at_least=2)
    assert [row.get("reached") for row in read_jsonl(tmp_path / "rows.jsonl")] == [False, False, None]


def test_no_time_left(tmp_path):
    (row,) = run_parts([Part("late", "tests.gpu_parts:fine", 60, "")], setting_in(tmp_path), tmp_path / "log.txt", 0)
    assert row["status"] == "not run"
    assert "--parts late" in row["why"]


def test_names_of_parts():
    assert [part.name for part in choose_parts("resume")] == ["photos", "resume"]
    with pytest.raises(UserError, match=r"no part 'spead', did you mean 'speed'\?"):
        choose_parts("spead")
