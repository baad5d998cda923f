"""Commands that look into a model while it reads texts, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxsteer.cli import main


def test_attribute(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "I think the answer is", "target": " clear"}, {"text": "wait a", "target": " year"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = ["attribute", "--file", str(path), "--model", str(model_dir), "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "each text's own token" and found["texts"] == 2
    total = sum(part["value"] for part in found["parts"])
    assert total == pytest.approx(found["logit"]["value"], abs=1e-4)
    argv = ["attribute", "I think the", "--chat", "--model", str(model_dir), "--minus", "mean", "--neurons", "0"]
    assert main([*argv, "--plot", str(tmp_path / "bars.svg")]) == 0
    out = capsys.readouterr().out
    assert "the likeliest token minus the mean over the vocabulary" in out and "neuron" not in out
    assert {p.name for p in tmp_path.iterdir()} >= {"bars.svg", "bars.png", "bars.csv"}


def test_attribute_refuses(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "--model", str(model_dir)]) == 2
    assert "no text was given" in capsys.readouterr().err
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "target": " x"}\n{"text": "b"}\n')
    assert main(["attribute", "--file", str(path), "--model", str(model_dir)]) == 2
    assert "only some rows have a target" in capsys.readouterr().err
