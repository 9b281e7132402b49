"""How long a whole command takes: `python -m tools.stopwatch --out FILE COMMAND...`

Writes a results file for the ledger: command, seconds, exit status, machine, date. Needs nothing
but Python, so that it can time what makes the environment. Exits as the command does.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def timed(command: list[str]) -> dict[str, Any]:
    """Runs `command` to its end; its output goes where ours goes."""
    started = time.monotonic()
    status = subprocess.run(command).returncode
    return {
        "command": shlex.join(command),
        "seconds": round(time.monotonic() - started, 1),
        "exit_status": status,
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.stopwatch", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the results file, JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to time")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("no command to time")
    result = timed(arguments.command)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result["exit_status"]


if __name__ == "__main__":
    sys.exit(main())
