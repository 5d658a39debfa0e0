"""What follows training: every part is made even if another one fails. What is kept: tests/faults/test_f29_weights.py."""

import pytest

from runtime.errors import RunError, UserError
from tools import finish_run

PICTURES = ["views", "attention", "pca", "similarity", "neighbors", "points"]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {shards: shards}\n")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """(the command lines of all parts that were called, {first word of a part: the error that it raises})."""
    calls: list[list[str]] = []
    errors: dict[str, Exception] = {}

    def call(argv: list[str]) -> None:
        calls.append(argv)
        if argv[0] in errors:
            raise errors[argv[0]]

    monkeypatch.setattr(finish_run.evaluate, "main", call)
    monkeypatch.setattr(finish_run.show, "main", call)
    return calls, errors


def test_all_parts_in_order(run, calls):
    calls, _ = calls
    assert finish_run.main([str(run)]) == 0
    assert calls == [[part, str(run)] for part in ("report", *PICTURES, "html")]
    calls.clear()
    assert finish_run.main([str(run), "--skip-existing"]) == 0
    assert calls == [*([part, str(run), "--skip-existing"] for part in ("report", *PICTURES)), ["html", str(run)]]


@pytest.mark.parametrize(
    ("part", "error", "code"),
    [
        ("report", UserError("no scenes"), 2),
        ("pca", UserError("no photo"), 2),
        ("points", RunError("process 1 exited"), 1),
        ("html", ZeroDivisionError("division by zero"), 1),
    ],
)
def test_a_failing_part_does_not_prevent_the_others(run, calls, capsys, part, error, code):
    calls, errors = calls
    errors[part] = error
    assert finish_run.main([str(run)]) == code
    assert [argv[0] for argv in calls] == ["report", *PICTURES, "html"]
    assert str(error) in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_first_failure(run, calls, capsys):
    _, errors = calls
    errors |= {"views": RunError("process 1 exited"), "html": UserError("no page")}
    assert finish_run.main([str(run)]) == 1
    assert capsys.readouterr().err == "error: process 1 exited\nerror: no page\n"


def test_no_run_folder(tmp_path, calls):
    with pytest.raises(UserError, match=r"no run folder \(no config.yaml\)"):
        finish_run.main([str(tmp_path)])
    assert calls[0] == []
