"""Sparse vectors: the planted dimensions, the definition of the threshold, and curves."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError
from jaxsteer.circuits.rows import make_rows
from jaxsteer.circuits.sparsify import dimension_effects, kept_dimensions, overlap, sparsified, sparsity_curve
from jaxsteer.objectives import LogitDifference
from jaxsteer.steer import Vectors, load_vectors, save_vectors
from tests.helpers.checkpoints import random_model, tiny_config

RNG = np.random.default_rng(0)
PLANTED = np.sort(RNG.choice(24, 8, replace=False))
SITE = "blocks.0.hook_resid_post"
METRIC = LogitDifference(plus=np.asarray([3]), minus=np.asarray([4]))


def deaf_model() -> jaxsteer.Model:
    """A model that reads 8 dimensions of the stream after block 0, and knows no other."""
    model = random_model(tiny_config(n_layers=2))
    reads = np.isin(np.arange(24), PLANTED).astype(np.float32)
    layers = model.params.layers
    fields = {name: getattr(layers, name) for name in ("q", "k", "v", "gate", "up")}
    fields = {name: leaf.at[1].multiply(reads.reshape(-1, *[1] * (leaf.ndim - 2))) for name, leaf in fields.items()}
    params = dataclasses.replace(
        model.params,
        layers=dataclasses.replace(layers, **fields),
        final_norm=model.params.final_norm * reads,
    )
    return dataclasses.replace(model, params=params)


MODEL = deaf_model()
VECTORS = Vectors(arrays={SITE: RNG.standard_normal(24).astype(np.float32)}, positions="every")
ROWS = make_rows(MODEL, [RNG.integers(0, 67, n) for n in (6, 8)])


def test_only_the_dimensions_that_are_read_have_effects_of_their_own() -> None:
    """The norm divides by all of them; with the planted ones chosen by gradient, nearly all of the effect is kept."""
    effects = dimension_effects(MODEL, ROWS, METRIC, VECTORS, steps=8)
    assert kept_dimensions(VECTORS.arrays[SITE], effects, "effect", keep=24).all()
    gradient = kept_dimensions(VECTORS.arrays[SITE], effects, "gradient", keep=8)
    assert overlap(gradient, np.isin(np.arange(24), PLANTED)) >= 7 / 9
    base, whole = (
        jaxsteer.logits(MODEL, ROWS.tokens, ROWS.mask, edits=each)[np.arange(2), ROWS.lengths - 1]
        for each in (None, VECTORS.edits())
    )
    change = np.asarray((whole - base)[:, 3] - (whole - base)[:, 4], np.float64).mean()
    assert effects.sum() == pytest.approx(change, rel=0.02)


def test_the_threshold_is_that_of_the_paper() -> None:
    vector, effects = RNG.standard_normal(50), RNG.standard_normal(50)
    for rho in (0.0, 0.3, 1.0, 2.0):
        kept = kept_dimensions(vector, effects, "gradient", rho=rho)
        shares = np.abs(effects) / np.linalg.norm(effects), np.abs(vector) / np.linalg.norm(vector)
        np.testing.assert_array_equal(kept, ~(shares[0] < rho * shares[1]))
    assert kept_dimensions(vector, effects, "gradient", rho=0.0).all()
    assert overlap(kept, kept) == 1.0
    both = [kept_dimensions(vector, effects, by, keep=10) for by in ("effect", "magnitude")]
    np.testing.assert_array_equal(np.flatnonzero(both[0]), np.sort(np.argsort(-np.abs(effects))[:10]))
    np.testing.assert_array_equal(np.flatnonzero(both[1]), np.sort(np.argsort(-np.abs(vector))[:10]))
    assert overlap(*both) == len({*np.flatnonzero(both[0])} & {*np.flatnonzero(both[1])}) / (both[0] | both[1]).sum()


def test_a_sparse_vector_is_a_file_like_any_other(tmp_path: object) -> None:
    kept = np.arange(24) % 3 == 0
    found = sparsified(VECTORS, kept)
    array = found.arrays[SITE]
    assert np.linalg.norm(array) == pytest.approx(np.linalg.norm(VECTORS.arrays[SITE]), rel=1e-6)
    np.testing.assert_allclose(array[kept] / array[0], VECTORS.arrays[SITE][kept] / VECTORS.arrays[SITE][0], rtol=1e-5)
    assert not array[~kept].any()
    again = load_vectors(save_vectors(found, f"{tmp_path}/sparse.safetensors"))
    np.testing.assert_array_equal(again.arrays[SITE], array)
    assert again.metadata["kept_dimensions"] == "8 of 24"


def test_the_curve_is_measured_by_steering() -> None:
    found = sparsity_curve(MODEL, ROWS, METRIC, VECTORS, [24, 8, 2], seed=1)
    assert len(found.levels) == 12 and {level.by for level in found.levels} == {
        "gradient",
        "effect",
        "magnitude",
        "random",
    }
    assert all(level.share == pytest.approx(1, abs=1e-5) for level in found.levels if level.kept == 24)
    shares = {(level.by, level.kept): level.share for level in found.levels}
    assert abs(shares["gradient", 8] - 1) < abs(shares["random", 8] - 1)
    assert type(found).from_json(found.to_json()) == found
    assert "91.7 %" in found.table() and "<svg" in found.plot().svg()
    assert jax.tree.leaves(VECTORS.edits())


def test_what_is_refused() -> None:
    vector = VECTORS.arrays[SITE]
    for given, message in (
        (dict(by="size", keep=3), "by must be one of"),
        (dict(by="effect"), "either how many"),
        (dict(by="effect", rho=1.0), "either how many"),
        (dict(by="gradient", rho=1e9), "leaves no dimension"),
        (dict(by="effect", keep=25), "from 1 to 24, got 25"),
    ):
        with pytest.raises(UserError, match=message):
            kept_dimensions(vector, vector, **given)
    two = Vectors(arrays={SITE: vector, "blocks.1.hook_resid_post": vector})
    with pytest.raises(UserError, match="at 2 sites"):
        sparsified(two, np.ones(24, bool))
    with pytest.raises(UserError, match="behind the last block"):
        dimension_effects(MODEL, ROWS, METRIC, two.at("blocks.1.hook_resid_post"))
