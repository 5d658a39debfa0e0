"""The fault plan: 36 cases with 681 sub-cases. Each runs the real program and asserts the outcome and the message.

`make faults` runs all of them and prints a table; `make test` runs those marked `fast`. A sub-case is one test marked
`@pytest.mark.fault("F07")`; tests without that mark are not counted.
"""

import os
from collections import Counter

import pytest

PLAN = {  # case: (what is injected, sub-cases)
    "F01": ("kill -9 at a random step", 20),
    "F02": ("kill -9 inside a checkpoint write", 50),
    "F03": ("disk full, size limit, read-only folder", 3),
    "F04": ("shards cut, overwritten, emptied", 10),
    "F05": ("corrupt JPEGs", 5),
    "F06": ("samples without bytes or image", 2),
    "F07": ("odd image formats", 15),
    "F08": ("missing, empty, unreadable, few shards", 4),
    "F09": ("a misbehaving network", 9),
    "F10": ("a rank dies", 3),
    "F11": ("a rank, worker or loader hangs", 4),
    "F12": ("NaN and inf", 5),
    "F13": ("stop signals", 3),
    "F14": ("the same twice, whatever the machine", 8),
    "F15": ("config errors", 20),
    "F16": ("hostile checkpoints", 6),
    "F17": ("hostile tars", 10),
    "F18": ("decompression bombs", 3),
    "F19": ("hostile yaml", 5),
    "F20": ("resume from another run", 6),
    "F21": ("a tar whose end is not its end", 17),
    "F22": ("photos that decoders judge differently", 31),
    "F23": ("folders that are not classes", 49),
    "F24": ("photos, labels and keys that would be passed over", 60),
    "F25": ("one odd file among many", 38),
    "F26": ("what the end of a run needs", 25),
    "F27": ("a run that was copied or moved", 13),
    "F28": ("values that change only the speed", 21),
    "F29": ("derived files of other weights", 18),
    "F30": ("training longer", 18),
    "F31": ("masks that measure nothing", 40),
    "F32": ("lists of scenes", 29),
    "F33": ("odd words for make", 62),
    "F34": ("lists and reasons", 38),
    "F35": ("the first minutes", 25),
    "F36": ("many processes, other numbers of them, slow and cut networks", 6),
}
WHOLE = os.environ.get("FAULTS") == "all"


def pytest_collection_modifyitems(config, items):
    ours = [i for i in items if "tests/faults/" in i.nodeid or i.path.parent.name == "faults"]
    for item in ours:
        mark = item.get_closest_marker("fault")
        if mark:
            item.user_properties.append(("fault", mark.args[0]))
    if WHOLE:
        return
    deselected = [i for i in ours if i.get_closest_marker("fault") and not i.get_closest_marker("fast")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [i for i in items if i not in deselected]


def _outcomes(config) -> tuple[Counter[str], Counter[str]]:
    """Sub-cases that passed, and all that ran, by case."""
    passed: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in config.pluginmanager.get_plugin("terminalreporter").stats.get(outcome, []):
            case = dict(getattr(report, "user_properties", ())).get("fault")
            if case:
                ended[case] += 1
                passed[case] += outcome == "passed"
    return passed, ended


def _planned(config, ended: Counter[str]) -> dict[str, int]:
    """Sub-cases that should have passed: those that ran, or the whole plan if the whole folder was run."""
    whole = config.args == ["tests/faults"] and not config.option.keyword
    return {case: n for case, (_, n) in PLAN.items() if whole or ended[case]}


def pytest_sessionfinish(session, exitstatus):
    if WHOLE and exitstatus == 0 and not hasattr(session.config, "workerinput"):
        passed, ended = _outcomes(session.config)
        if any(passed[case] != n for case, n in _planned(session.config, ended).items()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if not WHOLE:
        return
    passed, ended = _outcomes(config)
    planned = _planned(config, ended)
    terminalreporter.write_line("")
    for case, n in planned.items():
        missing = "" if ended[case] == n else f", {n - ended[case]} not run"
        terminalreporter.write_line(f"{case}  {PLAN[case][0]:<50} {passed[case]:>3} of {n}{missing}")
    good, total = sum(passed.values()), sum(planned.values())
    terminalreporter.write_line(f"{good} of {total}")
    terminalreporter.write_line(f"{good} passed, {total - good} failed")
