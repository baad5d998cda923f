"""`jaxsteer inspect`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jaxsteer.cli import main
from tests.helpers.checkpoints import family_config, hf_directory

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDENS / "gemma3"), "--mesh-model", "8", "--mesh-prompts", "2"]) == 0
    said = re.sub(" +", " ", capsys.readouterr().out)
    for expected in (
        "gemma3: family gemma3, 14,756 parameters, float32",
        "heads 4 of 6, keys and values 2",
        "attention window 6, rope theta 30: 5 layers (0, 1, 3, 4, 6)",
        "attention full, rope theta 1000 (linear, factor 2): 2 layers (2, 5)",
        "query scale 0.25",
        "prompts 2 x model 8, in float32",
        "attn.hook_pattern [B, 4, T, T]",
        "multi_modal_projector (2), vision_tower (",
        "vision_config",
    ):
        assert expected in said, expected


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "organism:llama", "--json", "--mesh-model", "2", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["context_length"], found["dtype"]) == ("llama", 512, "bfloat16")
    assert found["memory"]["mesh"] == {"model": 2, "prompts": 1}
    assert found["memory"]["dtype"] == "float32"
    assert 2 * found["parameters"]["total"] < found["memory"]["weights"] < 4 * found["parameters"]["total"]
    assert found["weights"]["ignored"] == [] and found["weights"]["files"] == 1


def test_weights_that_do_not_fit_are_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = hf_directory(tmp_path, family_config("qwen2"))
    path = directory / "config.json"
    path.write_text(
        path.read_text()
        .replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
        .replace('"full_attention"', '"full_attention",\n"full_attention"', 1)
    )
    assert main(["inspect", str(directory)]) == 1
    assert "PROBLEM  The checkpoint lacks 12 of the 50 tensors" in capsys.readouterr().out


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither jaxsteer.json nor config.json" in capsys.readouterr().err
    assert main(["inspect", "organism:llama", "--mesh-model", "0"]) == 2
    assert "--mesh-model must be at least 1" in capsys.readouterr().err
