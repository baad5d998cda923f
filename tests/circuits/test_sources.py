"""Sources made from texts: rows drawn from one another, and texts of other lengths laid alongside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.rows import Rows, make_rows
from jaxsteer.circuits.sources import align, resampled
from jaxsteer.objectives import LogitDifference
from tests.helpers.checkpoints import random_model, tiny_config

RNG = np.random.default_rng(0)
MODEL = random_model(tiny_config(n_layers=2))
TEXTS = [RNG.integers(0, 67, n) for n in (6, 8, 6, 8, 6)]
ROWS = make_rows(MODEL, TEXTS)
PLUS, MINUS = np.asarray([3, 5, 7, 9, 11]), np.asarray([4, 60, 2, 1, 8])
METRIC = LogitDifference(plus=PLUS, minus=MINUS)


def ids(rows: Rows) -> list[tuple[int, ...]]:
    return [tuple(np.asarray(row)[:length].tolist()) for row, length in zip(rows.tokens, rows.lengths, strict=True)]


def test_rows_are_drawn_from_one_another() -> None:
    rows, source = resampled(ROWS, draws=6, seed=3)
    texts, drawn = ids(rows), ids(source)
    assert texts == ids(ROWS) * 6
    for i in range(0, 30, 5):
        assert sorted(drawn[i : i + 5]) == sorted(ids(ROWS))
    assert all(len(a) == len(b) and a != b for a, b in zip(texts, drawn, strict=True))
    assert len({tuple(drawn[i : i + 5]) for i in range(0, 30, 5)}) > 1
    assert ids(resampled(ROWS, draws=6, seed=3)[1]) == drawn != ids(resampled(ROWS, draws=6, seed=4)[1])
    others = make_rows(MODEL, [RNG.integers(0, 67, n) for n in (8, 6, 6, 6, 8)])  # as many of each length, elsewhere
    theirs = ids(resampled(ROWS, others, draws=2)[1])
    assert sorted(theirs[:5]) == sorted(ids(others)) and [len(a) for a in theirs] == [6, 8, 6, 8, 6] * 2


def test_effects_are_means_over_draws() -> None:
    """Each copy of a row keeps the metric of its row, and is patched from its own draw."""
    rows, source = resampled(ROWS, draws=3)
    found = patch(MODEL, rows, METRIC, "hook_mlp_out", source, positions="together")
    expected = []
    for row in range(15):
        one = LogitDifference(plus=PLUS[[row % 5]], minus=MINUS[[row % 5]])
        lone = make_rows(MODEL, [ids(rows)[row]]), make_rows(MODEL, [ids(source)[row]])
        expected.append(patch(MODEL, lone[0], one, "hook_mlp_out", lone[1], positions="together").effects[0])
    np.testing.assert_allclose(found.effects, expected, atol=1e-4)
    scores = attribute_edges(MODEL, rows, METRIC, source, steps=1)
    draws = [
        attribute_edges(MODEL, ROWS, METRIC, source.take(slice(5 * i, 5 * i + 5)), steps=1).values for i in range(3)
    ]
    np.testing.assert_allclose(scores.values, np.mean(draws, axis=0), atol=1e-5)


def test_texts_are_aligned_by_their_ends() -> None:
    own = make_rows(MODEL, [[1, 2, 3, 4, 5, 6], [1, 2, 9, 5], [1, 2, 3], [7, 7, 7, 7]])
    theirs = make_rows(MODEL, [[1, 2, 8, 8, 8, 5, 6], [1, 2, 8, 5], [1, 2, 3, 3], [7, 7]])
    assert align(own, theirs).at[:, :6].tolist() == [
        [0, 1, -1, -1, 5, 6], [0, 1, 2, 3, -1, -1], [0, 1, 2, -1, -1, -1], [0, 1, -1, -1, -1, -1]
    ]  # fmt: skip
    assert align(own, theirs, "last").at[:, :6].tolist() == [
        [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, -1, -1], [1, 2, 3, -1, -1, -1], [-1, -1, 0, 1, -1, -1]
    ]  # fmt: skip


OTHERS = make_rows(MODEL, [RNG.integers(0, 67, n) for n in (9, 5, 4, 11, 6)])


@pytest.mark.parametrize(("kind", "heads"), [("hook_resid_mid", "together"), ("attn.hook_z", "each")])
def test_aligned_values_are_put_in(kind: str, heads: str) -> None:
    """Position by position, against values that were read from the source and put in by an edit."""
    aligned = align(ROWS, OTHERS, "last")
    found = patch(MODEL, ROWS, METRIC, kind, aligned, heads=heads)
    sites = [f"blocks.{layer}.{kind}" for layer in range(2)]
    theirs, own = (jaxsteer.capture(MODEL, r.tokens, sites, r.mask) for r in (OTHERS, ROWS))

    def score(edit: Any = None) -> np.ndarray:
        logits = np.asarray(jaxsteer.logits(MODEL, ROWS.tokens, ROWS.mask, edits=edit))
        last = logits[np.arange(5), ROWS.lengths - 1]
        return last[np.arange(5), PLUS] - last[np.arange(5), MINUS]

    base = score()
    np.testing.assert_allclose(found.base, base, atol=1e-5)
    for layer, site in enumerate(sites):
        for position in range(8):
            for head in range(4) if heads == "each" else (None,):
                value = np.array(own[site])
                there = (position < ROWS.lengths) & (aligned.at[:, position] >= 0)
                for row in np.flatnonzero(there):
                    place = (row, position) if head is None else (row, position, head)
                    source = np.asarray(theirs[site])[row, aligned.at[row, position]]
                    value[place] = source if head is None else source[head]
                effects = found.effects[:, layer, position] if head is None else found.effects[:, layer, position, head]
                expected = score(steer.replace(site, value)) - base
                np.testing.assert_allclose(effects[there], expected[there], atol=1e-4)
                assert np.isnan(effects[~there]).all()
    whole = patch(MODEL, ROWS, METRIC, kind, aligned, positions="together")
    assert whole.source == "another text, aligned" and np.isfinite(whole.effects).all()
    logits = np.asarray(jaxsteer.logits(MODEL, OTHERS.tokens, OTHERS.mask))[np.arange(5), OTHERS.lengths - 1]
    np.testing.assert_allclose(whole.other, logits[np.arange(5), PLUS] - logits[np.arange(5), MINUS], atol=1e-4)


def test_texts_of_one_length_need_no_alignment() -> None:
    source = make_rows(MODEL, [RNG.integers(0, 67, n) for n in (6, 8, 6, 8, 6)])
    plain, aligned = (patch(MODEL, ROWS, METRIC, "hook_attn_out", each) for each in (source, align(ROWS, source)))
    np.testing.assert_array_equal(plain.effects, aligned.effects)
    own = patch(MODEL, ROWS, METRIC, "hook_attn_out", align(ROWS, ROWS, "last"))
    assert not np.nan_to_num(own.effects).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resampled(ROWS.take([0, 1, 2])), "row 1 is the only one of 8 tokens"),
        (lambda: resampled(ROWS, OTHERS), "0 rows have 4 tokens, and 1 of the source"),
        (lambda: resampled(ROWS, draws=0), "draws must be at least 1"),
        (lambda: align(ROWS, OTHERS.take([0])), "5 rows cannot be patched from 1"),
        (lambda: align(ROWS, OTHERS, "first"), "by 'ends', by 'last', or by a list"),
        (lambda: align(ROWS, OTHERS, [[0]]), "a list of tokens for each of 5 rows, got 1"),
        (lambda: align(ROWS, OTHERS, [[0]] * 5), "row 0 has 6 tokens and its source has 9: give 6 whole numbers"),
        (lambda: align(ROWS, OTHERS, [[9] * 6] * 5), "row 0 has 6 tokens and its source has 9"),
        (
            lambda: patch(MODEL, ROWS, METRIC, "hook_mlp_out", OTHERS),
            "row 0 has 6 tokens and its source has 9: .*align",
        ),
        (
            lambda: patch(MODEL, ROWS, METRIC, "attn.hook_pattern", align(ROWS, OTHERS)),
            "a value for every two tokens",
        ),
        (lambda: patch(MODEL, ROWS.take([0]), METRIC, "hook_mlp_out", align(ROWS, OTHERS)), "aligned with other rows"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
