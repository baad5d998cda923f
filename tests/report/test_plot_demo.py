"""The README's picture is drawn from run directories alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.plot_demo import draw, runs_of
from jaxsteer.errors import UserError
from tests.report.synthetic import metrics, write_run


def test_one_panel_per_persona(tmp_path: Path):
    write_run(tmp_path / "runs" / "myopic", metrics(persona="myopic", selected=None, prompts=[]))
    write_run(tmp_path / "runs" / "sycophancy", metrics())
    runs = runs_of(tmp_path / "runs")
    assert [run.persona for run in runs] == ["sycophancy", "myopic"]
    picture = draw(runs, tmp_path / "images" / "demo.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_runs(tmp_path: Path):
    with pytest.raises(UserError, match="no runs"):
        runs_of(tmp_path)
