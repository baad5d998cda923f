"""``jaxsteer report`` on directories of many runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.cli import main
from tests.report.synthetic import write_many


def test_the_pages_of_runs_are_made_before_they_are_linked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_many(tmp_path, seeds=2, personas=("myopic",))
    assert main(["report", str(tmp_path), "--plots"]) == 0
    out = capsys.readouterr().out
    assert "6.0 % (3.0–9.0)" in out and f"Report: {tmp_path}/report.html" in out and "Plots: 9 files" in out
    run = "000-myopic-resga-blocks.1/report.html"
    assert (tmp_path / run).is_file() and f'href="{run}"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_directory_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for given in (tmp_path, tmp_path / "nowhere"):
        assert main(["report", str(given)]) == 2
        assert main(["report", str(given), "--attribute"]) == 2
    assert "jaxsteer: error:" in capsys.readouterr().err
