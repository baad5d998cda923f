"""Streams of many rows: at one token, in the mean over some, by weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.reading import direction_sites, read_along, read_rows
from jaxsteer.models.sharding import make_mesh
from jaxsteer.steer import floor
from tests.helpers.tiny import tiny_model

MODEL = tiny_model()
SITES = ("hook_embed", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")
ROWS = [np.random.default_rng(n).integers(0, 500, n).astype(np.int32) for n in (5, 40, 9)]


def read(reads: object) -> np.ndarray:
    """(rows, sites, D)."""
    found = np.zeros((len(ROWS), len(SITES), MODEL.config.d_model), np.float32)
    for numbers, states in read_rows(MODEL, ROWS, reads, direction_sites(MODEL, SITES), batch_size=2):
        found[numbers] = states.swapaxes(0, 1)
    return found


def test_means_and_weighted_sums_are_those_of_the_whole_states() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random(len(row)) < 0.4 for row in ROWS]
    weights = [rng.standard_normal(len(row)).astype(np.float32) for row in ROWS]
    last = np.asarray([len(row) - 1 for row in ROWS])
    at, mean, total = read(last), read(masks), read(weights)
    for i, row in enumerate(ROWS):
        states = np.stack([np.asarray(s)[0] for s in jaxsteer.capture(MODEL, row[None], list(SITES)).values()])
        np.testing.assert_allclose(at[i], states[:, -1], atol=1e-5)
        np.testing.assert_allclose(mean[i], states[:, masks[i]].mean(1), atol=1e-5)
        np.testing.assert_allclose(total[i], np.einsum("t,std->sd", weights[i], states), atol=1e-4)


ALONG = ("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")


def along(vectors: np.ndarray, **how: object) -> list[np.ndarray]:
    """(sites, k, T) of every row."""
    found: list[np.ndarray] = [np.zeros(0)] * len(ROWS)
    for numbers, values in read_along(how.pop("model", MODEL), ROWS, vectors, direction_sites(MODEL, ALONG), **how):
        for at, number in enumerate(numbers):
            found[number] = values[:, :, at, : len(ROWS[number])]
    return found


def test_products_along_vectors_are_those_of_the_whole_states_with_edits_and_without(compile_counter: type) -> None:
    vectors = np.random.default_rng(1).standard_normal((len(ALONG), 2, MODEL.config.d_model)).astype(np.float32)
    cap = floor("blocks.1.hook_resid_post", vectors[2, 0], 0.5)
    for edits in (None, cap):
        found = along(vectors, edits=edits)
        for i, row in enumerate(ROWS):
            states = jaxsteer.run(MODEL, row[None], sites=list(ALONG), edits=edits).states
            whole = np.stack([np.asarray(state)[0] for state in states.values()]).astype(np.float64)
            np.testing.assert_allclose(found[i], np.einsum("std,skd->skt", whole, vectors), atol=2e-4)
    assert (found[1][2, 0, 1:] / np.linalg.norm(vectors[2, 0]) > 0.5 - 1e-4).all()
    for how in ({"batch_size": 1}, {"batch_size": 8, "model": dataclasses.replace(MODEL, mesh=make_mesh())}):
        for one, other in zip(along(vectors, **how), along(vectors), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    along(vectors, edits=cap)
    with compile_counter() as count:
        along(vectors * 2, edits=floor("blocks.1.hook_resid_post", vectors[2, 1], 0.1))
    assert not count["_along"], "other vectors and caps are no other program"


@pytest.mark.parametrize("change", [lambda m: m[:-1], np.zeros_like])
def test_masks_that_do_not_fit_are_refused(change: object) -> None:
    masks = [np.ones(len(row), bool) for row in ROWS]
    with pytest.raises(UserError, match="a row of 9 tokens cannot be read"):
        read([*masks[:2], change(masks[2])])
    with pytest.raises(UserError, match="2 reads were given for 3 rows"):
        read(masks[:2])
