"""Run functions of ``tests/processes/work.py``, or any command, in several processes that meet on the loopback.

The processes have no part in pytest: each is ``python -m tests.helpers.several OUT WORK ...`` with the flags that say
where it stands, and writes what the functions return to OUT/WORK.I.npz. None of them outlives its ``Group``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Group:
    """``n`` processes with ``devices`` each that run one command; killed at the end of the ``with`` block.

    The command gets the flags that say where each of them stands.
    """

    def __init__(self, command: list[str], n: int, *, out: Path, devices: int = 1, **environment: str) -> None:
        self.out, port = out, free_port()
        out.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment}
        self.processes = []
        for i in range(n):
            flags = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={n}", f"--process-id={i}"] if n > 1 else []
            with (out / f"{i}.out").open("wb") as said, (out / f"{i}.err").open("wb") as complained:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *flags], cwd=ROOT, env=env, stdout=said, stderr=complained, start_new_session=True
                    )
                )

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses, of all processes. Fails when one takes longer."""
        deadline = time.monotonic() + seconds
        for i, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {i} still runs after {seconds} s:\n{self.said(i)[-3000:]}") from None
        return [process.returncode for process in self.processes]

    def said(self, i: int) -> str:
        """What process ``i`` has written on both streams, without the chatter of the transport."""
        text = "".join((self.out / f"{i}.{stream}").read_text(errors="replace") for stream in ("out", "err"))
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))

    def done(self, seconds: float) -> None:
        """All processes end well."""
        statuses = self.wait(seconds)
        assert not any(statuses), "\n".join(f"process {i}: {s}\n{self.said(i)[-3000:]}" for i, s in enumerate(statuses))


def results(
    names: list[str], n: int, out: Path, *, devices: int = 1, seconds: float = 200, alone: tuple[str, ...] = ()
) -> dict[str, list[dict[str, np.ndarray]]]:
    """Name -> what that function of tests/processes/work.py returns in each of ``n`` processes.

    Of the functions ``alone``, the last result is that of one more process, with as many devices as all of them.
    """
    command = [sys.executable, "-m", "tests.helpers.several"]
    with contextlib.ExitStack() as stack:
        groups = [Group([*command, str(out), *names], n, out=out, devices=devices)]
        if alone:
            one = out / "alone"
            groups.append(Group([*command, str(one), *alone], 1, out=one, devices=n * devices))
        for group in groups:
            stack.enter_context(group)
        for group in groups:
            group.done(seconds)
    found = {name: [dict(np.load(out / f"{name}.{i}.npz")) for i in range(n)] for name in names}
    for name in alone:
        found[name].append(dict(np.load(out / "alone" / f"{name}.0.npz")))
    return found


def main(arguments: list[str]) -> int:
    from jaxsteer.cli import join_processes
    from tests.processes import work

    out, *names = join_processes(arguments)
    import jax

    for name in names:
        np.savez(Path(out) / f"{name}.{jax.process_index()}.npz", **getattr(work, name)(Path(out)))
    return 0


if __name__ == "__main__":
    from jaxsteer.cli import status_of

    sys.exit(status_of(main, sys.argv[1:]))
