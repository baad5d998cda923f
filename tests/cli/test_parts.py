"""Commands that look into a model while it reads texts, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxsteer.cli import main
from jaxsteer.steer import load_vectors


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


def test_probe(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": f"{first} {second}", "label": "place" if second in places else "other", "group": second}
        for first in ("the old", "every small", "wait for the", "I think the")
        for places in [("river", "mill", "town")]
        for second in (*places, "money", "advice", "friend")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = ["probe", "--file", str(path), "--model", str(model_dir), "--folds", "3", "--penalties", "1", "100"]
    argv += ["--sites", "blocks.*.hook_resid_post", "--transfer", str(path), "--positive", "place"]
    out = tmp_path / "probe.safetensors"
    assert main([*argv, "--out", str(out), "--plot", str(tmp_path / "layers.svg")]) == 0
    text = capsys.readouterr().out
    assert "logistic probe of 'place' (12) against 'other' (12), 24 texts of 6 groups, 3 folds" in text
    assert "on rows" in text and (tmp_path / "layers.csv").exists()
    assert set(load_vectors(out).sites) == {f"blocks.{i}.hook_resid_post" for i in range(3)}
    assert main([*argv[:-4], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positive"] == "place"
    assert main(["probe", "--model", str(model_dir)]) == 2
    assert "--file, or a --persona" in capsys.readouterr().err


def test_attention(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the old town past the old mill"
    argv = ["attention", text, "--model", str(model_dir), "--span", "town", "--repeated", "4", "--length", "12"]
    assert (
        main([*argv, "--patterns", str(tmp_path / "p.npz"), "--layers", "1", "--plot", str(tmp_path / "map.svg")]) == 0
    )
    out = capsys.readouterr().out
    assert "induction, repeated" in out and "Span: 'town'" in out and f"Wrote {tmp_path / 'p.npz'}" in out
    assert (tmp_path / "p.npz").exists() and (tmp_path / "map.csv").exists()
    assert main([*argv, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["statistics"]) == 13
    assert main([*argv, "--layers", "1"]) == 2
    assert "belong together" in capsys.readouterr().err


def test_features(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("I think the answer is clear\nthe old town past the old mill\n")
    argv = ["features", "m1.n3", "a0.h1: river", "--model", str(model_dir), "--data", str(texts), "--tokens", "40"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "m1.n3 at blocks.1.mlp.hook_post" in out and "a0.h1: river at" in out and ">>" in out
    assert main(["features", "n3", "--model", str(model_dir), "--data", str(texts)]) == 2
    assert "names no feature" in capsys.readouterr().err


def test_dream(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["dream", "m1.n3", "--model", str(model_dir), "--out", str(tmp_path / "dream"), "--length", "3"]
    assert main([*argv, "--steps", "2", "--population", "2", "--children", "4"]) == 0
    assert "feature:m1.n3" in capsys.readouterr().out and (tmp_path / "dream" / "pareto.jsonl").exists()
