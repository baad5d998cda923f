"""``jaxsteer refusal``."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.cli import main
from jaxsteer.steer import Vectors, save_vectors
from jaxsteer.study.refusal import RefusalResult, measure_refusal


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


def test_steering_stands_beside_random_controls(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And a strength at which logits overflow is a row that says so."""
    (tmp_path / "bad.txt").write_text("Bend a spoon\nFold a map\n")
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    site = "blocks.1.hook_resid_post"
    file = save_vectors(Vectors(arrays={site: vector}, coefficient=8.0), tmp_path / "v.safetensors")
    argv = ["refusal", f"{tmp_path}/bad.txt=harmful", "--model", str(model_dir), "--steer", str(file)]
    assert main([*argv, "--json"]) == 0
    found = RefusalResult.from_json(json.loads(capsys.readouterr().out))
    assert [row.edit for row in found.rows] == ["", "steered", "random 1", "random 2", "random 3"]
    moved = [row.of("harmful").kl for row in found.rows[1:]]
    assert len(set(moved)) == 4 and min(moved) > 0
    assert main([*argv, "--strengths", "1", "1e30", "--controls", "1", "--generate", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "coefficient 1  " in out and "random 1 at 1  " in out
    assert "coefficient 1e+30: the model's logits are not finite" in out and "random 1 at 1e+30: the model's" in out
    assert main([*argv, "--controls", "0", "--json"]) == 0
    assert [row.get("edit", "") for row in json.loads(capsys.readouterr().out)["rows"]] == ["", "steered"]
    caps = Vectors(arrays={site: vector}, operation="floor", values={site: 0.5})
    argv[-1] = str(save_vectors(caps, tmp_path / "cap.safetensors"))
    assert main([*argv, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2 and "floor has no random control" in caplog.text
