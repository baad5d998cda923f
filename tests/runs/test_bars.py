"""Bars: what is drawn on a terminal, and what is written where nothing can be drawn."""

import sys
import time

import pytest

from jaxsteer.runs import bars
from jaxsteer.runs.bars import line, progress_bar


def test_a_log_gets_whole_lines_with_the_rest_time_and_a_fast_stage_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("fast", 4) as advance:
        advance(4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bars, "EVERY", 0.01)
    with progress_bar("probe") as advance:
        advance(3, 12, best="1.0")
        time.sleep(0.1)
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("probe: 3 of 12 (25%) in 00:00, about ")
    with progress_bar("probe", 4, quiet=True) as advance:
        advance(1)
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    assert line("x", 30, 90, 60.0) == "x: 30 of 90 (33%) in 01:00, about 02:00 to go"
    assert line("x", 0, None, 65.0) == "x: 01:05"


def test_a_terminal_sees_a_silent_stage_live(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(bars, "TICK", 0.1)
    with progress_bar("loading x"):
        time.sleep(1.2)  # in one call, as a program that compiles
    drawn = capsys.readouterr().err
    assert "loading x: 00:00" in drawn and "loading x: 00:01" in drawn and drawn.endswith("\r")
