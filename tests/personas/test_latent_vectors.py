"""Vectors of SAE latents against float64 NumPy: by name, by signature, steering target atoms."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.personas import latents_vector, sae_signature, sta_vector
from jaxsteer.personas.latent_vectors import target_atoms
from jaxsteer.steer import load_vectors, save_vectors
from tests.personas.test_signatures import LATENTS, SITE, make_pairs, make_sae, model, reference


def atoms(good: np.ndarray, bad: np.ndarray, trim: float) -> np.ndarray:
    """The definition, latent by latent."""
    A = (good - bad).mean(0)
    q = (good > 0).sum(0) - (bad > 0).sum(0)
    agree = [i for i in range(len(A)) if A[i] * q[i] > 0]
    wide = sorted(np.abs(A), reverse=True)[int((1 - trim) * len(A))]
    often = sorted([abs(q[i]) if i in agree else 0 for i in range(len(A))], reverse=True)[int((1 - trim) * len(A))]
    return np.asarray([A[i] if i in agree and abs(A[i]) >= wide and abs(q[i]) >= often else 0 for i in range(len(A))])


@pytest.mark.parametrize("trim", [0.65, 0.2])
def test_target_atoms(trim: float, tmp_path: Any) -> None:
    sae, pairs = make_sae(output_scale=2.0), make_pairs(9)
    good, bad = reference(sae, pairs)
    kept = atoms(good, bad, trim)
    assert 0 < (kept != 0).sum() < (1 - trim) * LATENTS + 1
    vector = kept @ np.asarray(sae.W_dec, np.float64)
    sides = [
        [np.asarray(jaxsteer.capture(model(), ids[None], [SITE])[SITE], np.float64)[0, at] for ids, at in zip(*side)]
        for side in ((pairs.good, pairs.good_read), (pairs.bad, pairs.bad_read))
    ]
    dense = np.mean(sides[0], 0) - np.mean(sides[1], 0)
    found = sta_vector(model(), sae, pairs, trim=trim, batch_size=4, coefficient=-1.5)
    np.testing.assert_allclose(found.arrays[SITE], vector * np.linalg.norm(dense) / np.linalg.norm(vector), atol=1e-4)
    loaded = load_vectors(save_vectors(found, tmp_path / "sta.safetensors"), model=model())
    assert loaded.coefficient == -1.5 and loaded.sign == found.sign
    tokens = pairs.good[0][None]
    moved = jaxsteer.capture(model(), tokens, [SITE], edits=loaded.edits())[SITE]
    plain = jaxsteer.capture(model(), tokens, [SITE])[SITE]
    np.testing.assert_allclose(
        (moved - plain)[0, 1:], np.tile(-1.5 * found.arrays[SITE], (tokens.size - 1, 1)), atol=1e-4
    )


def test_defect_38_most_latents_are_zero() -> None:
    """Both thresholds are then 0, and what disagrees must not pass; nothing that agrees gives the vector 0."""
    A, q = np.zeros(50), np.zeros(50)
    A[:4], q[:4] = [2.0, -1.0, 0.5, 3.0], [3, 2, 0, -1]
    assert np.flatnonzero(target_atoms(A, q, 0.65)).tolist() == [0]
    sae, pairs = make_sae(), make_pairs()
    off = dataclasses.replace(sae, threshold=jnp.full(LATENTS, 1e6))
    assert not sta_vector(model(), off, pairs).arrays[SITE].any()


def test_latents_by_name_and_by_contrast() -> None:
    sae, pairs = make_sae(), make_pairs()
    named = latents_vector(model(), sae, {3: 2.0, 17: -0.5})
    rows = np.asarray(sae.W_dec)
    np.testing.assert_allclose(named.arrays[SITE], 2 * rows[3] - 0.5 * rows[17], rtol=1e-5)
    signature = sae_signature(model(), sae, pairs, latents=5)
    found = latents_vector(model(), sae, signature)
    np.testing.assert_allclose(found.arrays[SITE], signature.weights @ rows[signature.indices], atol=1e-5)
    other = latents_vector(model(), make_sae(site_out="blocks.2.hook_resid_post"), {3: 1.0})
    assert other.sites == ("blocks.2.hook_resid_post",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sae: sta_vector(model(), sae, make_pairs(), trim=1.0), "share of latents"),
        (lambda sae: sta_vector(model(), make_sae(site_out="blocks.2.hook_resid_post"), make_pairs()), "writes what"),
        (lambda sae: sta_vector(model(), make_sae(site_in="blocks.1.mlp.hook_post"), make_pairs()), "width"),
        (lambda sae: sta_vector(model(), dataclasses.replace(sae, W_enc=sae.W_enc[:8]), make_pairs()), "width 8"),
        (lambda sae: latents_vector(model(), sae, {LATENTS: 1.0}), f"from 0 to {LATENTS - 1}, got .{LATENTS}"),
        (lambda sae: latents_vector(model(), sae, {}), "got none"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(make_sae())


def test_an_sae_of_another_model_steers_only_when_it_is_meant() -> None:
    """As vector files do; without a name of the model in its files there is nothing to refuse."""
    sae, pairs = make_sae(model="org/another"), make_pairs()
    for use in (
        lambda **how: latents_vector(model(), sae, {3: 1.0}, **how),
        lambda **how: sta_vector(model(), sae, pairs, **how),
    ):
        with pytest.raises(UserError, match="trained on org/another, not on .*any_weights=True .--any-weights."):
            use()
        assert use(any_weights=True).sites == (SITE,)
    assert latents_vector(model(), make_sae(model=None), {3: 1.0}).sites == (SITE,)
