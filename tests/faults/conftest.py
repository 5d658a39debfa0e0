"""The fault plan: 20 cases, 191 sub-cases, each against the real program, each asserting outcome and message.

`make faults` runs them all and ends with a table; `make test` runs the ones marked `fast`. A sub-case is one test marked
`@pytest.mark.fault("F07")`; tests without that mark support the plan and are not counted.
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
    "F06": ("samples without bytes or picture", 2),
    "F07": ("odd picture formats", 15),
    "F08": ("missing, empty, unreadable, few shards", 4),
    "F09": ("a misbehaving network", 9),
    "F10": ("a rank dies", 3),
    "F11": ("a rank, worker or loader hangs", 4),
    "F12": ("NaN and inf", 5),
    "F13": ("stop signals", 3),
    "F14": ("the same twice, whatever the machine", 8),
    "F15": ("config mistakes", 20),
    "F16": ("hostile checkpoints", 6),
    "F17": ("hostile tars", 10),
    "F18": ("decompression bombs", 3),
    "F19": ("hostile yaml", 5),
    "F20": ("resume from another run", 6),
}
WHOLE = os.environ.get("FAULTS") == "all"


def pytest_collection_modifyitems(config, items):
    ours = [i for i in items if "tests/faults/" in i.nodeid or i.path.parent.name == "faults"]
    counted: Counter[str] = Counter()
    for item in ours:
        mark = item.get_closest_marker("fault")
        if mark:
            counted[mark.args[0]] += 1
            item.user_properties.append(("fault", mark.args[0]))
    if WHOLE:
        wrong = [f"{c}: {counted[c]}, planned {n}" for c, (_, n) in PLAN.items() if counted[c] != n]
        if wrong and not config.option.keyword and config.args == ["tests/faults"]:
            raise pytest.UsageError("sub-cases missing or too many: " + "; ".join(wrong))
        return
    left = [i for i in ours if i.get_closest_marker("fault") and not i.get_closest_marker("fast")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if i not in left]


def pytest_terminal_summary(terminalreporter):
    if not WHOLE:
        return
    passed: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            case = dict(getattr(report, "user_properties", ())).get("fault")
            if case:
                ended[case] += 1
                passed[case] += outcome == "passed"
    terminalreporter.write_line("")
    for case, (words, planned) in PLAN.items():
        if ended[case]:
            terminalreporter.write_line(f"{case}  {words:<42} {passed[case]:>3} of {planned}")
    good = sum(passed.values())
    terminalreporter.write_line(f"{good} of {sum(n for _, n in PLAN.values())}")
    terminalreporter.write_line(f"{good} passed, {sum(ended.values()) - good} failed")
