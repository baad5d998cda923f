"""Locks of directories: who holds one is told; those of the dead are taken over."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.files.lock import STALE_S, hold_lock, in_use

HERE, ELSEWHERE = socket.gethostname(), "another-host"


def test_a_lock_that_is_taken_says_by_whom_and_is_gone_afterwards(tmp_path: Path) -> None:
    lock, waits = tmp_path / "out" / ".lock", []
    with hold_lock(lock) as waited:
        assert not waited
        with pytest.raises(UserError, match=rf"out is in use by process {os.getpid()} on {HERE} since .* ago"):
            with hold_lock(lock):
                pass
        assert lock.is_file()
    assert not lock.exists()
    first = hold_lock(lock)
    first.__enter__()
    ends = threading.Timer(0.2, lambda: first.__exit__(None, None, None))
    ends.start()
    with hold_lock(lock, lambda: waits.append(1)) as waited:
        assert waited and waits == [1] and lock.is_file()
    ends.join()


@pytest.mark.parametrize(
    ("host", "age", "locks", "taken_over"),
    [
        (HERE, 0, True, True),  # it was killed: the system has taken its lock back
        (ELSEWHERE, 0, True, False),  # locks of this file system may hold on one host only
        (ELSEWHERE, STALE_S + 1, True, True),
        (HERE, 0, False, False),
        (HERE, STALE_S + 1, False, True),
    ],
)
def test_what_an_owner_left_behind(
    host: str, age: float, locks: bool, taken_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if not locks:
        monkeypatch.setattr("jaxsteer.files.lock.fcntl.flock", without)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": host, "process": 1, "since": "then"}))
    os.utime(lock, (time.time() - age,) * 2)
    if taken_over:
        with hold_lock(lock):
            assert json.loads(lock.read_text())["process"] == os.getpid()
        assert not lock.exists()
    else:
        with pytest.raises(UserError, match=f"process 1 on {host} since then"):
            with hold_lock(lock):
                pass
        assert lock.exists()


def test_an_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxsteer.files.lock._BEAT_S", 0.01)
    lock = tmp_path / ".lock"
    with hold_lock(lock):
        os.utime(lock, (0, 0))
        until = time.monotonic() + 10
        while lock.stat().st_mtime < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 1


@pytest.mark.parametrize(
    ("names", "left", "says"),
    [
        ([], [], "nothing was saved yet: the same command begins again"),
        (["config.json", "state/"], [], "nothing was saved yet: the same command begins again"),
        (["config.json", "rates"], ["config.json", "rates"], "what was saved is kept in {}: go on"),
    ],
)
def test_an_interrupted_command_says_what_it_kept(tmp_path: Path, names: list[str], left: list[str], says: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as ended, in_use(out, "go on"):
        for name in names:
            (out / name).mkdir() if name.endswith("/") else (out / name).touch()
        raise KeyboardInterrupt
    assert ended.value.__notes__ == [says.format(out)]
    assert (sorted(path.name for path in out.iterdir()) if out.exists() else []) == left


def test_two_searches_into_one_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with in_use(tmp_path):
        assert main(["search", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is in use by process {os.getpid()}" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
