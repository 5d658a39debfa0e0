"""The process of one part of `python -m tools.gpu`. It appends its rows itself, so that they outlive its crash.

    python -m tools.gpu.part NAME FUNCTION SETTING      SETTING: a JSON list, the fields of parts.Setting

Exit codes: 0 done, 1 failed or wrong, NOT_HERE if this machine lacks something. The last line of standard error says why.
"""

import importlib
import json
import sys
import traceback

from tools.gpu.parts import NotHere, Report, Setting

NOT_HERE = 3


def main(name: str, function: str, setting: Setting) -> int:
    module, _, attribute = function.partition(":")
    report = Report(name, setting)
    try:
        getattr(importlib.import_module(module), attribute)(setting, report)
    except NotHere as missing:
        print(missing, file=sys.stderr)
        return NOT_HERE
    except Exception:
        traceback.print_exc()
        return 1
    if report.wrong:
        print("wrong: " + "; ".join(report.wrong), file=sys.stderr)
    return bool(report.wrong)


if __name__ == "__main__":
    part_name, part_function, fields = sys.argv[1:]
    sys.exit(main(part_name, part_function, Setting(*json.loads(fields))))
