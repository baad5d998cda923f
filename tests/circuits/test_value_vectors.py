"""Value vectors: against the heads' own outputs, the identity of two terms, their words, and their ablation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.value_vectors import ablate_value_vectors, value_vectors
from jaxsteer.steer.edits import Edits
from tests.helpers.checkpoints import FAMILIES, family_config, random_model

RNG = np.random.default_rng(0)
VECTOR = RNG.standard_normal(24).astype(np.float32)
SITE = "blocks.0.hook_resid_post"
PUSH = steer.add(SITE, VECTOR, positions="every")
TOKENS = RNG.integers(0, 67, (2, 7))


def model_of(family: str) -> Any:
    return random_model(family_config(family, n_layers=3))


def centred(x: np.ndarray, model: Any) -> np.ndarray:
    return x - x.mean(-1, keepdims=True) if model.config.norm == "layer" else x


def wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_of_two_terms(family: str) -> None:
    """v' - v = (s gamma) W_V / r' + (h gamma) W_V (1 / r' - 1 / r), where the stream is the old one and s."""
    model = model_of(family)
    plus_one = 1.0 if model.config.norm_plus_one else 0.0
    quiet = Edits(
        tuple(steer.scale(f"blocks.1.{kind}", 0.0, positions="every") for kind in ("hook_attn_out", "hook_mlp_out"))
    )
    for layer in (1, 2):  # nothing is written in block 1: block 2 sees the same push
        sites = [f"blocks.{layer}.{kind}" for kind in ("hook_resid_pre", "ln1.hook_scale", "attn.hook_v")]
        runs = [jaxsteer.capture(model, TOKENS, sites, edits=each) for each in (quiet, Edits((PUSH, quiet)))]
        (h, r, v), (_, r2, v2) = ([wide(run[site]) for site in sites] for run in runs)
        matrix = wide(model.params.layers.v[layer])
        gamma = wide(model.params.layers.attn_norm[layer]) + plus_one
        direct = np.einsum("d,dkh->kh", centred(VECTOR, model) * gamma, matrix) / r2[..., None]
        rescaled = np.einsum("btd,dkh->btkh", centred(h, model) * gamma, matrix) * (1 / r2 - 1 / r)[..., None]
        np.testing.assert_allclose(direct + rescaled, v2 - v, atol=1e-5)
        ablated = ablate_value_vectors(model, VECTOR, SITE, positions="every")
        left = jaxsteer.capture(model, TOKENS, sites, edits=Edits((PUSH, quiet, ablated)))[sites[2]]
        if layer == 1:
            np.testing.assert_allclose(left, v2 - direct, atol=1e-5)
        only = ablate_value_vectors(model, VECTOR, SITE, positions=[2], layers=[layer])
        left = jaxsteer.capture(model, TOKENS, sites, edits=Edits((PUSH, quiet, only)))[sites[2]]
        at = (np.arange(7) == 2)[:, None, None]
        np.testing.assert_allclose(left, v2 - direct * at, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_value_vectors_are_what_heads_write_of_the_push(family: str) -> None:
    """A head that looks at one token writes its value through W_O: with values s gamma W_V that is svv."""
    model = model_of(family)
    found = value_vectors(model, VECTOR, SITE)
    assert found.first == 1 and not found.heads[0].any()
    layer, token = 2, TOKENS[:, :1]  # one token looks at itself
    sites = [f"blocks.{layer}.{kind}" for kind in ("ln1.hook_scale", "attn.hook_result")]
    gamma = wide(model.params.layers.attn_norm[layer]) + (1.0 if model.config.norm_plus_one else 0.0)
    value = np.einsum("d,dkh->kh", centred(VECTOR, model) * gamma, wide(model.params.layers.v[layer]))
    edit = steer.replace(f"blocks.{layer}.attn.hook_v", value[None])
    seen = jaxsteer.capture(model, token, sites, edits=edit)
    written = wide(seen[sites[1]])[0, 0]
    if model.config.post_norms:
        written = written * (1 + wide(model.params.layers.post_attn_norm[layer]))
    np.testing.assert_allclose(found.heads[layer], written, atol=1e-5)
    np.testing.assert_allclose(found.summed, found.heads.sum((0, 1)), atol=1e-6)
    some = value_vectors(model, VECTOR, "blocks.1.hook_resid_pre", layers=[2])
    np.testing.assert_array_equal(some.heads, found.heads * (np.arange(3) == 2)[:, None, None])


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="is not in the stream"):
        value_vectors(model_of("llama"), VECTOR, "blocks.0.attn.hook_z")
    with pytest.raises(UserError, match=r"the vector has shape \[3\]"):
        value_vectors(model_of("llama"), VECTOR[:3], SITE)
