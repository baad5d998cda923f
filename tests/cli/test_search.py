"""The command line of a search: short and long help, and a configuration file under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.cli import main
from jaxsteer.cli.commands import parse
from jaxsteer.errors import UserError
from jaxsteer.study.options import OPTIONS


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("persona: myopic\nsteps: 7\nban: [a, b]\nout: here\n")
    options = parse(["search", "--steps", "9", "--config", str(path), "--model", "m"]).options
    assert options.changed() == {"out": "here", "model": "m", "persona": "myopic", "steps": 9, "ban": ("a", "b")}
    path.write_text("steps: 7\n")
    with pytest.raises(UserError, match="--out is missing"):
        parse(["search", "--config", str(path)])
    assert parse(["search", "--out", "gs://a/b"]).options.run.out == "gs://a/b"


def test_help_is_short_and_may_be_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--help"]) == 0
    short = capsys.readouterr().out
    assert "--persona" in short and "--help-all" in short and "--restart-every" not in short
    assert short.count(" --") < 20
    assert main(["search", "--help-all"]) == 0
    long = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in long for name in OPTIONS)
    assert main(["config"]) == 0
    assert "\nmodel: " in capsys.readouterr().out


def test_ctrl_c_at_the_page_says_that_the_run_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxsteer.cli.search.run_search", lambda *_, **__: None)
    monkeypatch.setattr("jaxsteer.report.write_report", interrupted)
    out = tmp_path / "run"
    assert main(["search", "--out", str(out), "--quiet"]) == 130
    assert f"interrupted; the results are in {out}; jaxsteer report {out} writes the page" in capsys.readouterr().err
