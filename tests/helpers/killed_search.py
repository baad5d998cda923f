"""Searches that are killed: a process that has imported everything, and forks a child for each of them.

    python tests/helpers/killed_search.py COMPILED      then, one JSON object per line on stdin:
    {"folder": DIR, "seed": 0}                          search, or go on, to the end; the result is DIR/result.npz
    {..., "looks": 2, "seconds": 0.1, "signal": 9}      send the signal so long after the host has looked so often

The answer to each is a line: {"status": exit status or -signal, "ending": seconds from the signal to the end}. COMPILED
is the directory of compiled programs.
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

ROOT = Path(__file__).resolve().parents[2]


def main(compiled: str) -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from orbax.checkpoint import v1  # noqa: F401

    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from tests.prompt_search import setting  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line))), flush=True)


def in_child(order: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            search(Path(order["folder"]), order["seed"], writing)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    os.close(writing)
    began = time.monotonic()
    if "looks" in order:
        for _ in range(order["looks"]):
            os.read(reading, 1)
        handle = os.pidfd_open(child)
        select.select([handle], [], [], order["seconds"])
        os.close(handle)
        began = time.monotonic()
        os.kill(child, order.get("signal", signal.SIGKILL))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reading)
    return {"status": status, "ending": time.monotonic() - began}


def search(folder: Path, seed: int, looks: int) -> None:
    """A search of two waves, saved at every look."""
    import numpy as np

    from jaxsteer.prompt_search import EpoConfig, Store, make_problem
    from jaxsteer.prompt_search.algorithms import epo
    from tests.prompt_search.setting import search_with, setting

    s = setting()
    problems = [make_problem(s.objective, 4, seed=seed, restart=i) for i in range(3)]
    config = EpoConfig(population=4, children=8, top_k=16, restart_every=5, archive=16)
    with Store(folder / "state", every_s=0.0, resume=True) as store:
        result = search_with(
            s.model.params,
            s.task,
            problems,
            epo(config),
            steps=12,
            steps_per_call=2,
            wave=2,
            valid=lambda ids: ids[:, -1] % 4 > 0,
            store=store,
            callback=lambda _: os.write(looks, b"."),
        )
    archive = {name: getattr(result.archive, name) for name in ("ids", "f", "x", "step")}
    with open(folder / "result.npz", "wb") as file:
        np.savez(file, **archive, rejected=np.asarray([entry.ids for entry in result.rejected]))


if __name__ == "__main__":
    main(sys.argv[1])
