"""``jaxsteer refusal``."""

import json
from pathlib import Path

import pytest

import jaxsteer
from jaxsteer.cli import main
from jaxsteer.study.refusal import measure_refusal


def test_the_command(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.txt").write_text("Bend a spoon\nFold a map\n")
    (tmp_path / "t.json").write_text('{"polite": "Please, {request}"}')
    argv = ["refusal", f"{tmp_path}/bad.txt=harmful", "--model", str(model_dir), "--templates", f"{tmp_path}/t.json"]
    assert main([*argv, "--limit", "1", "--openings", "The", "I", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [row.get("attack", "") for row in out["rows"]] == ["", "polite"] and out["rows"][0]["kinds"][0]["n"] == 1
    assert main([*argv, "--strengths", "1", "2"]) == 2
    assert "--strengths are coefficients of --steer FILE" in capsys.readouterr().err
    assert jaxsteer.measure_refusal is measure_refusal
