"""Processes that are lost or told to end: the others end in time, and the search goes on with any number of them."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from jaxsteer.processes import LOST, PREEMPTED
from tests.helpers.several import Group, results
from tests.processes.test_together import same

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "tests.helpers.several"]
IN_TIME = 30
"""Seconds until the last one has ended."""


def step(out: Path) -> int:
    path = out / "step"
    text = path.read_text() if path.exists() else ""
    return int(text) if text else 0


def cut_off(out: Path, number: int, kind: signal.Signals) -> tuple[list[int], list[str]]:
    """Statuses and words of two processes of which one got a signal in the midst of its search."""
    with Group([*COMMAND, str(out), "long"], 2, out=out, devices=2) as group:
        until = time.monotonic() + 300
        while step(out) < 60 and time.monotonic() < until and not any(p.poll() for p in group.processes):
            time.sleep(0.05)
        group.processes[number].send_signal(kind)
        statuses = group.wait(IN_TIME)
    return statuses, [group.said(i) for i in range(2)]


def test_killed_and_told_to_end_and_resumed(tmp_path: Path) -> None:
    alone = results(["long"], 1, tmp_path / "whole", devices=4, seconds=500)["long"][0]

    out = tmp_path / "killed"
    statuses, said = cut_off(out, 1, signal.SIGKILL)
    assert statuses == [LOST, -signal.SIGKILL] and "process 1 has ended, and this one with it" in said[0], said[0]
    assert 0 < step(out) < 400, "it was cut off in the midst"
    shutil.copytree(out, tmp_path / "copy")
    # The same number goes on, and, from the same files, one process.
    for found in results(["long"], 2, out, devices=2, seconds=500)["long"]:
        same(found, alone)
    same(results(["long"], 1, tmp_path / "copy", devices=1, seconds=500)["long"][0], alone)

    statuses, said = cut_off(tmp_path / "first", 0, signal.SIGKILL)
    assert statuses == [-signal.SIGKILL, LOST], said[1]

    out = tmp_path / "told"
    statuses, said = cut_off(out, 1, signal.SIGTERM)
    assert statuses == [PREEMPTED, PREEMPTED], "\n".join(said)
    saved = step(out)
    assert 0 < saved < 400 and f"saved at step {saved}" in said[0]
    for found in results(["long"], 2, out, devices=1, seconds=500)["long"]:
        same(found, alone)


ENDINGS = """
import os, sys, time
from jaxsteer.cli import join_processes, status_of
from jaxsteer.errors import UserError
from jaxsteer.processes import is_first, wait_for_all

def main(arguments):
    (what,) = join_processes(arguments)
    if what == "all fail" or what == "one fails" and not is_first():
        raise UserError("this is no model")
    if what == "a bug in the first" and is_first():
        raise TypeError("of a kind")
    if what != "all is well":
        time.sleep(100)
    wait_for_all()
    return 0

sys.exit(status_of(main, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("what", "statuses", "says"),
    [
        ("all is well", [0, 0], ["", ""]),
        ("all fail", [2, 2], ["jaxsteer: error: this is no model", "jaxsteer: error: this is no model"]),
        ("one fails", [LOST, 2], ["jaxsteer: error: process 1 has ended", "jaxsteer: error: this is no model"]),
        ("a bug in the first", [70, LOST], ["jaxsteer: bug: TypeError: of a kind", "error: process 0 has ended"]),
    ],
)
def test_all_processes_end_with_one_message_each(
    what: str, statuses: list[int], says: list[str], tmp_path: Path
) -> None:
    with Group([sys.executable, "-c", ENDINGS, what], 2, out=tmp_path) as group:
        assert group.wait(60 if "well" in what else IN_TIME + 15) == statuses
        for i, word in enumerate(says):
            assert word in group.said(i) and group.said(i).count("jaxsteer:") == bool(word), group.said(i)
