"""Conversions that are killed: a process that has imported everything, and forks a child for each of them.

    python tests/helpers/killed.py SRC BLOCK_BYTES      then, one JSON object per line on stdin:
    {"out": DIR}                                        convert to the end
    {"out": DIR, "point": "work_directory.write_text:2:before"}  kill -9 before (or after) its second call
    {"out": DIR, "seconds": 0.1}                        kill -9 after so long

The answer to each is a line: {"status": exit status or -signal, "saves": leaves written, "seconds": it took}.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main(src: str, block_bytes: int) -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax  # noqa: F401
    import tensorstore  # noqa: F401
    from tqdm.auto import tqdm  # noqa: F401

    from checkpoints_convert import streaming, work_directory
    from jaxsteer.models import sharding

    sharding._BLOCK_BYTES = block_bytes
    streaming.plan_conversion(Path(src), None)  # imports transformers
    places = {"streaming": streaming, "work_directory": work_directory, "os": os, "shutil": shutil}
    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line), src, streaming, places)), flush=True)


def in_child(order: dict[str, Any], src: str, streaming: Any, places: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        status = 1
        try:
            if "point" in order:
                arm(order["point"], places)
            original = streaming.write_leaf

            def counted(*args: Any) -> Any:
                values = original(*args)
                os.write(writing, b".")
                return values

            streaming.write_leaf = counted
            streaming.convert(src, order["out"], progress=False)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if "seconds" in order:
        handle = os.pidfd_open(child)
        select.select([handle], [], [], order["seconds"])
        os.close(handle)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    saves = 0
    while data := os.read(reading, 1000):
        saves += len(data)
    os.close(reading)
    return {"status": status, "saves": saves, "seconds": time.monotonic() - started}


def arm(point: str, places: dict[str, Any]) -> None:
    """Make the process kill itself at the n-th call of a function."""
    where, count, when = point.split(":")
    module, name = where.split(".")
    original: Callable[..., Any] = getattr(places[module], name)
    calls = 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        mine = calls  # other threads call it too
        if mine == int(count) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if mine == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(places[module], name, deadly)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
