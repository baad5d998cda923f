"""Numbers that transformers gave once (tests/make_goldens.py), checked without torch."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.models.model import Model
from tests.helpers.parity import DROPS, VARIANTS, check, kl_per_token
from tests.helpers.reference import reference_forward

WITH_GRADIENT = {"llama_gqa_tied_llama3", "qwen2_tied", "qwen3_untied", "gemma2", "gemma3_text", "gpt2"}
"""One variant of each family: a gradient takes two seconds to compile, and `make parity` checks all of them."""
GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


@functools.cache
def opened(variant: str) -> tuple[Model, dict[str, np.ndarray]]:
    return jaxsteer.load(GOLDENS / variant, dtype="float32"), dict(np.load(GOLDENS / variant / "golden.npz"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_transformers(variant: str) -> None:
    check(*opened(variant), gradient=variant in WITH_GRADIENT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_agrees_with_transformers(variant: str) -> None:
    model, golden = opened(variant)
    logits, states = reference_forward(model.params, model.config, golden["tokens"][0])
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(states, golden["hidden"][:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("what", "variant"), [(what, v) for what, (variants, _) in DROPS.items() for v in variants])
def test_a_dropped_field_would_be_noticed(what: str, variant: str) -> None:
    """Without it both comparisons with transformers fail: float32 by three orders of magnitude, and bfloat16's KL."""
    model, golden = opened(variant)
    config = dataclasses.replace(model.config, **DROPS[what][1](model.config))
    assert config != model.config
    logits, _ = reference_forward(model.params, config, golden["tokens"][0])
    assert np.abs(logits - golden["logits"][0]).max() > 1000 * 1e-4
    assert kl_per_token(golden["logits"][0], logits).max() > 0.02


def test_goldens_are_small() -> None:
    assert {directory.name for directory in GOLDENS.iterdir()} == set(VARIANTS)
    for directory in GOLDENS.iterdir():
        assert sum(file.stat().st_size for file in directory.iterdir()) <= 150_000, directory
