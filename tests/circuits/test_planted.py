"""A planted circuit: a cue reaches the answer through the values of one known head alone, and everything finds it.

Weights are set by hand. The stream has four features beside noise: which cue it is (+1 or -1), that it is one, that a
token asks, and the answer. Head 2 of block 1 asks for a cue with its query, finds it by its key, reads which one it is
into its value and writes that into the answer. All other heads and the MLPs read noise and write noise. Cues differ in
their sign alone, so that no norm, query, key or pattern tells them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import greedy_edges, pruned, run_circuits
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.freeze_table import freeze_table
from jaxsteer.circuits.freezing import frozen_logits
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.paths import patch_edges
from jaxsteer.circuits.rows import make_rows
from jaxsteer.circuits.value_vectors import value_vectors
from jaxsteer.models.config import Rope
from jaxsteer.models.model import Model
from jaxsteer.objectives import LogitDifference
from tests.helpers.checkpoints import random_params, tiny_config

WHICH, CUE, ASKS, ANSWER = range(4)
A, B, ASK, YES, NO = range(5)
LAYER, HEAD, GROUP = 1, 2, 1
AT = 3
"""Where the cue stands."""


def planted() -> Model:
    config = tiny_config(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, vocab_size=40, rope=Rope(theta=1e4))
    params = random_params(config)
    layers = {name: np.array(value) for name, value in dataclasses.asdict(params.layers).items() if value is not None}
    features = slice(0, 4)
    for name in ("q", "k", "v", "gate", "up"):
        layers[name][:, features] = 0
    layers["o"][..., features] = layers["down"][..., features] = 0
    for name in ("attn_norm", "mlp_norm"):
        layers[name][:, features] = 1
    # The slowest pair of rotary dimensions hardly turns in a short text.
    layers["q"][LAYER, :, HEAD] = layers["k"][LAYER, :, GROUP] = 0
    layers["q"][LAYER, ASKS, HEAD, 3] = layers["k"][LAYER, CUE, GROUP, 3] = 6
    layers["v"][LAYER, :, GROUP, 0] = 0
    layers["v"][LAYER, WHICH, GROUP, 0] = 1
    layers["o"][LAYER, :, 0, features] = layers["o"][LAYER, 3, 0] = 0  # head 3 has these values too, and drops them
    layers["o"][LAYER, HEAD, 0] = np.eye(16)[ANSWER]
    embed, unembed = 0.5 * np.random.default_rng(1).standard_normal((40, 16)), np.array(params.unembed)
    embed[:, features] = unembed[features] = 0
    embed[B] = embed[A]
    embed[A, WHICH], embed[B, WHICH], embed[[A, B], CUE], embed[ASK, ASKS] = 1, -1, 2, 2
    unembed[:, [YES, NO]] = 0
    unembed[ANSWER, YES], unembed[ANSWER, NO] = 8, -8
    wide = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    params = dataclasses.replace(
        params, embed=wide(embed), unembed=wide(unembed), final_norm=jnp.ones(16),
        layers=dataclasses.replace(params.layers, **{name: wide(value) for name, value in layers.items()}),
    )  # fmt: skip
    return Model(params=params, config=config, tokenizer=None, name="planted", fingerprint="planted")


MODEL = planted()
RNG = np.random.default_rng(0)
FILLERS = [RNG.integers(5, 40, n) for n in (6, 9, 7)]
TEXTS = {cue: [np.r_[fill[:AT], cue, fill[AT:], ASK].tolist() for fill in FILLERS] for cue in (A, B)}
ROWS, SOURCE = make_rows(MODEL, TEXTS[A]), make_rows(MODEL, TEXTS[B])
METRIC = LogitDifference(plus=np.full(3, NO), minus=np.full(3, YES))
PUSH = steer.add("blocks.0.hook_resid_post", -2 * np.eye(16)[WHICH], positions=[AT])
"""Makes the cue the other one."""
PATH = ["input->a1.g1<v>", "a1.h2->logits"]


def test_the_cue_decides() -> None:
    found = patch(MODEL, ROWS, METRIC, "hook_resid_pre", SOURCE)
    base, other = np.asarray(found.base), np.asarray(found.other)
    np.testing.assert_allclose(base, -other, rtol=1e-4)
    assert (other > 5).all()
    effects = found.mean()  # at the cue in both blocks, and nowhere else
    np.testing.assert_allclose(effects[:, AT], (other - base).mean(), rtol=1e-4)
    assert np.abs(np.delete(np.nan_to_num(effects), AT, axis=1)).max() < 1e-4


@pytest.mark.parametrize("source", [SOURCE, PUSH], ids=["the other text", "a vector"])
def test_patching_finds_the_head(source: Any) -> None:
    found = patch(MODEL, ROWS, METRIC, "attn.hook_z", source, heads="each")
    change = np.asarray(found.other) - np.asarray(found.base)
    shares = found.effects / change[:, None, None, None]
    last = ROWS.lengths - 1
    for row in range(3):
        assert shares[row, LAYER, last[row], HEAD] == pytest.approx(1, abs=1e-4)
    total = np.nan_to_num(np.abs(shares)).sum((1, 2, 3))
    np.testing.assert_allclose(total, 1, atol=1e-3)  # so that all others have nothing
    for kind, head in (
        ("attn.hook_v", GROUP),
        ("attn.hook_k", None),
        ("attn.hook_q", None),
        ("attn.hook_pattern", None),
    ):
        effects = patch(MODEL, ROWS, METRIC, kind, source, heads="each", positions="together").mean() / change.mean()
        expected = np.zeros_like(effects)
        if head is not None:
            expected[LAYER, head] = 1
        np.testing.assert_allclose(effects, expected, atol=1e-4)


@pytest.fixture(scope="module", params=["inputs", "activations"])
def scores(request: pytest.FixtureRequest) -> EdgeScores:
    return attribute_edges(MODEL, ROWS, METRIC, SOURCE, method=request.param, steps=10)


def test_attribution_and_the_greedy_circuit_find_the_way(scores: EdgeScores) -> None:
    change = scores.target - scores.base
    order = [scores.names[i] for i in np.argsort(-np.abs(scores.values))]
    assert set(order[:2]) == set(PATH)
    third = abs(scores.of(order[2]))
    assert all(scores.of(edge) > 0.9 * change for edge in PATH) and third < 0.1 * change
    heads = [abs(scores.node(f"a{layer}.h{head}")) for layer in range(2) for head in range(4)]
    assert np.argmax(heads) == 4 * LAYER + HEAD and sorted(heads)[-2] < 0.1 * change
    for end in ("output", "input"):
        found = pruned(scores.graph, greedy_edges(scores, 2, end=end))
        assert {tuple(edge) for edge in np.argwhere(found)} == {scores.graph.edge(edge) for edge in PATH}
    judged = run_circuits(MODEL, ROWS, METRIC, SOURCE, scores.graph, [found, scores.graph.edges & ~found])
    np.testing.assert_allclose(judged.faithfulness, [1, 0], atol=1e-4)


def test_single_edges_by_forward_passes() -> None:
    others = ["input->a1.g0<v>", "input->a1.g1<k>", "input->a1.h2<q>", "input->logits", "a1.h3->logits", "m0->a1.g1<v>"]
    found = patch_edges(MODEL, ROWS, METRIC, SOURCE, [*PATH, *others])
    whole = patch(MODEL, ROWS, METRIC, "hook_embed", SOURCE, positions="together")
    change = np.asarray(whole.other) - np.asarray(whole.base)
    np.testing.assert_allclose(found[:, :2] / change[:, None], 1, atol=1e-4)
    assert np.abs(found[:, 2:]).max() < 1e-4


def test_steering_needs_the_values_alone() -> None:
    """2604.08524's finding as a world: frozen patterns, queries and keys, or MLPs leave all of it, values none."""
    found = freeze_table(MODEL, ROWS, METRIC, PUSH, by_layer=True)
    stays = {f.what: f.share for f in found.whole}
    assert stays == pytest.approx(
        {"patterns": 1, "queries and keys": 1, "values": 0, "attention": 0, "mlps": 1}, abs=1e-4
    )
    one = {(f.what, f.layers[0]): f.share for f in found.by_layer}
    assert (one["values", 0], one["values", 1]) == pytest.approx((1, 0), abs=1e-4)
    for what, said in (("patterns", NO), ("mlps", NO), ("values", YES)):
        logits = np.asarray(frozen_logits(MODEL, ROWS, PUSH, what)[1])[np.arange(3), ROWS.lengths - 1]
        assert (logits.argmax(-1) == said).all()


def test_the_head_s_value_vector_is_the_answer() -> None:
    found = value_vectors(MODEL, np.eye(16)[WHICH], "blocks.0.hook_resid_post").heads[LAYER]
    np.testing.assert_allclose(found[HEAD], np.eye(16)[ANSWER], atol=1e-6)
    assert np.abs(np.delete(found, HEAD, axis=0)).max() < 1e-6
