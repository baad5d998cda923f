"""How commands end: one line on stderr whatever happened, and the exit status that says what."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from jaxsteer.cli import main, status_of
from jaxsteer.cli.demo import Demo


def interrupted() -> None:
    error = KeyboardInterrupt()
    error.add_note("what was saved is kept in run: the same command goes on")
    raise error


class Interrupted:
    """What gets a signal while it is finalized, where Python drops exceptions."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def raising(error: BaseException) -> None:
    raise error


@pytest.fixture(autouse=True)
def hangups() -> Iterator[None]:
    """Not ignored, as they are under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("run", "status", "says"),
    [
        (
            lambda: [][1],
            70,
            r"bug: IndexError: list index out of range \(jaxsteer/cli/__init__.py:\d+, _command\). Please report",
        ),
        (lambda: raising(RecursionError("too\ndeep")), 70, r"bug: RecursionError: too \("),
        (lambda: raising(MemoryError()), 2, "error: there is not enough memory: an array does not fit. Choose smaller"),
        (
            lambda: raising(RuntimeError("RESOURCE_EXHAUSTED: 9 TB.\nmore")),
            2,
            "RESOURCE_EXHAUSTED: 9 TB. Choose smaller",
        ),
        (
            lambda: raising(OSError(errno.ENOSPC, "No space left", "a\x1b[2Jb")),
            2,
            r"error: a\\u001b\[2Jb: No space left$",
        ),
        (
            lambda: raising(OSError(errno.EFBIG, "File too large")),
            2,
            "error: a file could not be read or written: File too large$",
        ),
        (lambda: os.mkdir("/dev/null/x"), 2, "error: /dev/null/x: Not a directory$"),
        (interrupted, 130, "interrupted; what was saved is kept in run: the same command goes on$"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9), 143, "ended by a signal$"),
        (lambda: os.kill(os.getpid(), signal.SIGHUP) or time.sleep(9), 143, "ended by a signal$"),
        (lambda: Interrupted(signal.SIGINT) and time.sleep(9), 130, "interrupted$"),
        (lambda: Interrupted(signal.SIGTERM) and time.sleep(9), 143, "ended by a signal$"),
    ],
)
def test_one_line_and_a_status(
    run: Callable[[], object],
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Demo, "run", lambda _: run())
    assert main(["demo"]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("jaxsteer: ")
    assert re.search(says, error.rstrip()), error
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert main(["demo", "--debug"]) == status
    assert capsys.readouterr().err.startswith("Traceback")


def test_what_a_terminal_would_obey_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Demo, "run", lambda _: print("a\x1b]0;b\x07\u202e\ud800\x9bé\n\tc") or 0)
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "a\\u001b]0;b\\u0007\\u202e\\ud800\\u009bé\n\tc\n"


@pytest.mark.parametrize(("to", "says"), [("/dev/full", "No space left on device"), (None, "Broken pipe")])
@pytest.mark.parametrize("size", [1, 10**6])
def test_an_output_that_takes_nothing(to: str | None, says: str, size: int) -> None:
    code = (
        "import sys; from jaxsteer.cli import _Escaping, status_of; "
        f"sys.exit(status_of(lambda _: print('x' * {size}, file=_Escaping(sys.stdout)) or 0, []))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with open(to or os.devnull, "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full if to else writing, stderr=subprocess.PIPE, text=True
        )
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, f"jaxsteer: error: the output: {says}\n")


def test_status_of_what_ends_well() -> None:
    assert status_of(lambda arguments: len(arguments), ["--debug"]) == 0
