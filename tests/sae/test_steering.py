"""Steering by latents, against the formulas in float64; gates by latents; what it leaves alone."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.prompts.generate import encode_prompts, generate
from jaxsteer.sae import load_sae
from jaxsteer.sae.dictionary import SAE, encode, preactivations
from jaxsteer.sae.steering import latent_gate, steer_latents
from jaxsteer.steer import Edits


@pytest.fixture(scope="module")
def organism() -> Model:
    return jaxsteer.load("organism:persona")


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae("organism:persona")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 1000, (3, 14)).astype(np.int32)


@pytest.fixture(scope="module")
def some(organism: Model, sae: SAE, tokens: np.ndarray) -> np.ndarray:
    """Latents that are active at the last token of the first row, and one that is not."""
    x = jaxsteer.run(organism, tokens, sites=[site(sae)]).states[site(sae)]
    z = np.asarray(encode(sae, x))[0, -1]
    return np.asarray([*np.argsort(-z)[:3], int(np.flatnonzero(z == 0)[0])], np.int32)


def site(sae: SAE) -> str:
    assert sae.config.site_in is not None
    return sae.config.site_in


def wanted(sae: SAE, x: np.ndarray, latents: np.ndarray, operation: str, amount: float) -> np.ndarray:
    z = np.asarray(encode(sae, jnp.asarray(x), latents), np.float64)
    p = np.asarray(preactivations(sae, jnp.asarray(x), latents), np.float64)
    rows, x = np.asarray(sae.W_dec, np.float64)[latents], x.astype(np.float64)
    if operation == "amplify":
        return x + (amount - 1) * z @ rows
    if operation == "calibrate":
        return x + np.maximum(amount - z, 0) @ rows
    gap = np.maximum(amount - np.maximum(p, 0), 0)
    total = gap.sum(-1, keepdims=True)
    moved = x + amount * (gap / np.where(total > 0, total, 1)) @ rows
    return np.where(
        total > 0, moved * np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(moved, axis=-1, keepdims=True), x
    )


@pytest.mark.parametrize(
    ("operation", "amount"), [("amplify", 0.0), ("amplify", 3.0), ("calibrate", 2.0), ("released", 2.5)]
)
def test_edits_are_their_formulas(
    organism: Model, sae: SAE, tokens: np.ndarray, some: np.ndarray, operation: str, amount: float
) -> None:
    name = site(sae)
    before = np.asarray(jaxsteer.run(organism, tokens, sites=[name]).states[name])
    edit = steer_latents(sae, some, operation, amount, positions="every")
    after = np.asarray(jaxsteer.run(organism, tokens, sites=[name], edits=edit).states[name])
    np.testing.assert_allclose(after, wanted(sae, before, some, operation, amount), rtol=2e-4, atol=2e-4)
    assert np.abs(after - before).max() > 1e-2


def test_erasing_takes_latents_out_and_keeps_what_is_not_reconstructed(
    organism: Model, sae: SAE, tokens: np.ndarray, some: np.ndarray
) -> None:
    name = site(sae)
    before = np.asarray(jaxsteer.run(organism, tokens, sites=[name]).states[name], np.float64)
    edit = steer_latents(sae, some, "amplify", 0.0, positions=[5])
    after = np.asarray(jaxsteer.run(organism, tokens, sites=[name], edits=edit).states[name], np.float64)
    assert np.array_equal(np.delete(after, 5, 1), np.delete(before, 5, 1))
    z = np.asarray(encode(sae, jnp.asarray(before[:, 5].astype(np.float32))), np.float64)
    parts = z[:, some] @ np.asarray(sae.W_dec, np.float64)[some]
    np.testing.assert_allclose(before[:, 5] - after[:, 5], parts, rtol=1e-3, atol=1e-4)


def test_amount_one_and_satisfied_gaps_change_no_bit(
    organism: Model, sae: SAE, tokens: np.ndarray, some: np.ndarray
) -> None:
    plain = np.asarray(jaxsteer.logits(organism, tokens))
    assert np.array_equal(plain, jaxsteer.logits(organism, tokens, edits=steer_latents(sae, some, "amplify", 1.0)))
    idle = steer_latents(sae, some[-1:], "released", 0.0)  # no gap anywhere: 0 / 0 in the released code
    assert np.isfinite(np.asarray(jaxsteer.logits(organism, tokens, edits=idle))).all()
    np.testing.assert_allclose(jaxsteer.logits(organism, tokens, edits=idle), plain, rtol=1e-5, atol=1e-5)


def test_the_released_form_keeps_norms(organism: Model, sae: SAE, tokens: np.ndarray, some: np.ndarray) -> None:
    name = site(sae)
    before = jaxsteer.run(organism, tokens, sites=[name]).states[name]
    edit = steer_latents(sae, some, "released", 2.5, positions="every")
    after = jaxsteer.run(organism, tokens, sites=[name], edits=edit).states[name]
    np.testing.assert_allclose(np.linalg.norm(after, axis=-1), np.linalg.norm(before, axis=-1), rtol=1e-5)


def test_cached_generation_is_uncached(organism: Model, sae: SAE, some: np.ndarray) -> None:
    """Greedy replies under an edit of latents are what the whole text says at every step."""
    edit = steer_latents(sae, some, "calibrate", 60.0)
    chat = [{"role": "user", "content": "Please tell me about the market."}]
    made = generate(organism, [chat], temperature=0, max_new_tokens=8, edits=edit)
    other = generate(organism, [chat], temperature=0, max_new_tokens=8)
    assert made.texts != other.texts
    ids = encode_prompts(organism, [chat])[0].ids.tolist()
    for token in made.tokens[0]:
        logits = jaxsteer.logits(organism, np.asarray([ids], np.int32), edits=edit)
        assert int(np.argmax(logits[0, -1])) == int(token)
        ids = [*ids, int(token)]


def test_gates_by_latents_leave_closed_rows_alone(
    organism: Model, sae: SAE, tokens: np.ndarray, some: np.ndarray
) -> None:
    """Open where the condition latent is active at the last token, closed (bit for bit) elsewhere."""
    name = site(sae)
    x = jaxsteer.run(organism, tokens, sites=[name]).states[name]
    z = np.asarray(encode(sae, x))[:, -1]
    only = np.flatnonzero((z[0] > 0) & (z[1] == 0) & (z[2] == 0))[:1]
    push = steer_latents(sae, some, "calibrate", 4.0)
    behind = latent_gate(push, sae, only, float(z[0, only[0]]) * 0.9)
    plain, steered = (
        np.asarray(jaxsteer.logits(organism, tokens)),
        np.asarray(jaxsteer.logits(organism, tokens, edits=push)),
    )
    found = np.asarray(jaxsteer.logits(organism, tokens, edits=behind))
    np.testing.assert_allclose(found[0], steered[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1:], plain[1:], rtol=1e-5, atol=1e-5)
    assert np.abs(steered - plain).max() > 0.1
    shut = latent_gate(push, sae, only, 1e9)
    np.testing.assert_allclose(jaxsteer.logits(organism, tokens, edits=shut), plain, rtol=1e-5, atol=1e-5)


def test_bad_input(organism: Model, sae: SAE, tokens: np.ndarray) -> None:
    cases: tuple[tuple[list[int], str], ...] = (
        ([], "list of numbers"),
        ([0, 99999], "latents 0 to"),
        ([4, 4], "twice"),
    )
    for latents, says in cases:
        with pytest.raises(UserError, match=says):
            steer_latents(sae, latents, "amplify", 0.0)
    with pytest.raises(UserError, match="operation"):
        steer_latents(sae, [1], "boost", 0.0)
    with pytest.raises(UserError, match="amount"):
        steer_latents(sae, [1], "amplify", float("nan"))
    normed = dataclasses.replace(sae, config=dataclasses.replace(sae.config, input_norm="layer_norm"))
    with pytest.raises(UserError, match="normalises"):
        steer_latents(normed, [1], "amplify", 0.0)
    small = jaxsteer.load("organism:llama")
    wide = dataclasses.replace(sae, W_enc=jnp.zeros((64, sae.n_latents)), W_dec=jnp.zeros((sae.n_latents, 64)))
    with pytest.raises(UserError, match="width 64"):
        jaxsteer.logits(small, tokens, edits=Edits((steer_latents(wide, [1], "amplify", 0.0),)))
