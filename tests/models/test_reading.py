"""Streams of many rows: at one token, in the mean over some, by weights."""

from __future__ import annotations

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.reading import direction_sites, read_rows
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


@pytest.mark.parametrize("change", [lambda m: m[:-1], np.zeros_like])
def test_masks_that_do_not_fit_are_refused(change: object) -> None:
    masks = [np.ones(len(row), bool) for row in ROWS]
    with pytest.raises(UserError, match="a row of 9 tokens cannot be read"):
        read([*masks[:2], change(masks[2])])
    with pytest.raises(UserError, match="2 reads were given for 3 rows"):
        read(masks[:2])
