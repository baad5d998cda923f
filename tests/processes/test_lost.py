"""Processes that are lost or told to end: the others end in time, and the search goes on with any number of them."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from jaxsteer.processes import HEARTBEAT_S, PREEMPTED
from tests.helpers.several import Group, results
from tests.processes.test_together import same

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "tests.helpers.several"]
IN_TIME = HEARTBEAT_S + 30
"""Until the last one has ended: the heartbeat, and some for machines that are busy."""


def step(out: Path) -> int:
    path = out / "step"
    text = path.read_text() if path.exists() else ""
    return int(text) if text else 0


def cut_off(out: Path, number: int, kind: signal.Signals) -> tuple[list[int], list[str], float]:
    """Statuses, words and seconds of two processes of which one got a signal in the midst of its search."""
    with Group([*COMMAND, str(out), "long"], 2, out=out, devices=2) as group:
        until = time.monotonic() + 300
        while step(out) < 60 and time.monotonic() < until and not any(p.poll() for p in group.processes):
            time.sleep(0.05)
        began = time.monotonic()
        group.processes[number].send_signal(kind)
        statuses = group.wait(IN_TIME)
        took = time.monotonic() - began
    return statuses, [group.said(i) for i in range(2)], took


def test_killed_and_told_to_end_and_resumed(tmp_path: Path) -> None:
    alone = results(["long"], 1, tmp_path / "whole", devices=4, seconds=500)["long"][0]

    out = tmp_path / "killed"
    statuses, said, _ = cut_off(out, 1, signal.SIGKILL)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None)
    assert "another task died" in said[0] or "Gloo" in said[0], said[0]
    assert 0 < step(out) < 400, "it was cut off in the midst"
    shutil.copytree(out, tmp_path / "copy")
    # The same number goes on, and, from the same files, one process.
    for found in results(["long"], 2, out, devices=2, seconds=500)["long"]:
        same(found, alone)
    same(results(["long"], 1, tmp_path / "copy", devices=1, seconds=500)["long"][0], alone)

    # Of the first process the others know at once that it has died.
    statuses, said, took = cut_off(tmp_path / "first", 0, signal.SIGKILL)
    assert statuses[0] == -signal.SIGKILL and statuses[1] not in (0, None)
    assert took < 30, said[1]

    out = tmp_path / "told"
    statuses, said, _ = cut_off(out, 1, signal.SIGTERM)
    assert statuses == [PREEMPTED, PREEMPTED], "\n".join(said)
    saved = step(out)
    assert 0 < saved < 400 and f"saved at step {saved}" in said[0]
    for found in results(["long"], 2, out, devices=1, seconds=500)["long"]:
        same(found, alone)
