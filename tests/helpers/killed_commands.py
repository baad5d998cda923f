"""Commands that are killed: a process that has imported everything, and forks a child for each of them.

    python -m tests.helpers.killed_commands      then, one JSON object per line on stdin:
    {"argv": ["search", ...]}                    the command, to its end
    {..., "seconds": 0.5, "after": DIR}          kill -9 so long after the start, or after DIR holds something

The answer to each is a line: {"status": exit status or -9, "seconds": from the start, or from "after", to the end}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from orbax.checkpoint import v1  # noqa: F401

    import jaxsteer.cli.commands  # noqa: F401
    import jaxsteer.sae.training  # noqa: F401
    import jaxsteer.study.dispatch  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line))), flush=True)


def in_child(order: dict[str, Any]) -> dict[str, Any]:
    child = os.fork()
    if not child:
        status = 1
        try:
            from jaxsteer.cli import main as command

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = command(order["argv"])
        finally:
            os._exit(status)
    began, handle = time.monotonic(), os.pidfd_open(child)
    if "after" in order:
        while not select.select([handle], [], [], 0.01)[0] and not any(Path(order["after"]).glob("*")):
            pass
        began = time.monotonic()
    if "seconds" in order and not select.select([handle], [], [], order["seconds"])[0]:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(handle)
    return {"status": status, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
