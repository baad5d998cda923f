"""What is said of the machine: true sizes, no secret, and advice where something is amiss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxsteer
from jaxsteer.cli import main
from jaxsteer.files.paths import user_path
from jaxsteer.planning import machine
from jaxsteer.planning.machine import Machine, examine


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


def test_what_a_model_needs_is_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 8 * 2**30)
    needs = examine("organism:gemma3").needs
    model = jaxsteer.load("organism:gemma3")
    config, leaves = model.config, jax.tree.leaves(model.params)
    assert needs is not None and needs.parameters == sum(leaf.size for leaf in leaves)
    assert needs.cache_per_token == 2 * config.n_layers * config.n_kv_heads * config.d_head * 2  # bfloat16
    assert needs.rows == (8 * 2**30 // len(jax.devices()) - needs.weights) // (512 * needs.cache_per_token)


def test_what_does_not_fit_is_said_and_is_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 2**20)
    assert main(["doctor", "--model", "organism:llama"]) == 1
    said = capsys.readouterr().out
    assert "it does not fit" in said and "! Take more devices" in said
    assert main(["doctor"]) == 0


def test_a_token_is_found_and_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not examine().token
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert main(["doctor"]) == 0 and main(["doctor", "--json"]) == 0
    said = capsys.readouterr().out
    assert "hub token  found" in said and "verysecret" not in said
    assert Machine.from_json(json.loads(said[said.index("{") :])).token


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("NVIDIA", user_path("/"), "jax[cuda13]"),
        ("LITTLE_DISK", 2**80, "JAXSTEER_CACHE"),
        ("EXTRAS", {"plan": "jax"}, "libtpu is installed"),
    ],
)
def test_what_is_amiss_is_said(name: str, value: Any, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(word in text for text in examine().advice)
    monkeypatch.setattr(machine, name, value)
    assert any(word in text for text in examine().advice)
