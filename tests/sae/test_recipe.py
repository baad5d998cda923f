"""The recipe: losses against float64 NumPy, straight-through derivatives, a planted dictionary, revival, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, make_mesh
from jaxsteer.sae.harvest import pool_sharding
from jaxsteer.sae.recipe import (
    Recipe,
    TrainState,
    Weights,
    inference_threshold,
    initial_state,
    losses,
    shardings,
    trainer,
)
from jaxsteer.sae.sparsity import above, jump, kth_largest

SITE = "blocks.1.hook_resid_post"
D, F, K = 16, 32, 2
ARCHS = ("topk", "batchtopk", "jumprelu")


def recipe(**changes: Any) -> Recipe:
    fields = dict(site=SITE, latents=F, arch="topk", k=K, batch=256, pool=4096, tokens=256 * 8 * 40, rate=4e-3)
    return Recipe(**(fields | changes))


def planted(rng: np.random.Generator, directions: np.ndarray, n: int) -> np.ndarray:
    """n sums of K of the directions, with weights from 1 to 2, around a mean, in units that are not the trainer's."""
    chosen = rng.random((n, F)).argsort(1)[:, :K]
    return 7.0 * (np.sum(directions[chosen] * rng.uniform(1, 2, (n, K, 1)), 1) + 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    rows = np.random.default_rng(5).standard_normal((F, D))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def trained(asked: Recipe, directions: np.ndarray, state: TrainState | None = None) -> tuple[TrainState, Any, Any]:
    """The state after all rounds, the last metrics and the pool."""
    rng = np.random.default_rng(0)
    pool = jnp.asarray(planted(rng, directions, asked.pool))
    state = initial_state(asked, pool) if state is None else state
    advance = trainer(asked, D, None)
    for number in range(asked.rounds):
        state, metrics, slots = advance(state, pool, jnp.int32(number))
        pool = pool.at[slots].set(planted(rng, directions, len(slots)))
    return state, metrics, pool


# Formulas


def test_kth_largest_is_exact():
    rng = np.random.default_rng(0)
    r = np.maximum(rng.standard_normal((6, 40)) * np.exp(4 * rng.standard_normal((6, 40))), 0).astype(np.float32)
    r[0], r[1], r[2, :30] = 0.0, 3.0, 0.5  # nothing, ties everywhere, many ties
    r[3, 0] = 1e30
    ordered = np.sort(r, axis=1)
    for k in (3, 40):
        found = [jax.jit(kth_largest, static_argnums=(1, 2))(r, *rest) for rest in ((k, -1), (6 * k, None))]
        np.testing.assert_array_equal(found[0][:, 0], ordered[:, -k])
        np.testing.assert_array_equal(found[1][0, 0], np.sort(r, axis=None)[-6 * k])


@pytest.mark.parametrize("arch", ARCHS)
def test_losses_are_those_of_the_papers(arch: str):
    rng = np.random.default_rng(1)
    b = 24
    x, dead = rng.standard_normal((b, D)), rng.random(F) < 0.4
    W_dec = rng.standard_normal((F, D))
    w = {
        "W_enc": rng.standard_normal((D, F)), "W_dec": W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True),
        "b_enc": rng.standard_normal(F) / 3, "b_dec": rng.standard_normal(D),
    }  # fmt: skip
    threshold = rng.uniform(0.5, 2.0, F)
    asked = recipe(arch=arch, k=3, aux_k=4, aux_weight=0.25, l0_weight=0.7)
    r = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    if arch == "topk":
        f = np.where(r >= np.sort(r, 1)[:, -3, None], r, 0)
    elif arch == "batchtopk":
        f = np.where(r >= np.sort(r, None)[-3 * b], r, 0)
    else:
        f = np.where(r > threshold, r, 0)
    error = x - f @ w["W_dec"] - w["b_dec"]
    idle = r * dead
    kept = np.where(idle >= np.sort(idle, 1)[:, -4, None], idle, 0)
    auxiliary = np.sum((error - kept @ w["W_dec"]) ** 2) / np.sum(error**2)
    expected = np.mean(error**2) + 0.25 * auxiliary
    if arch == "jumprelu":
        expected += 0.7 * (np.mean(np.sum(f > 0, 1)) / 3 - 1) ** 2
        w["log_threshold"] = np.log(threshold)
    weights = Weights(**{name: jnp.asarray(value, jnp.float32) for name, value in w.items()})
    loss, (found, left) = losses(asked, weights, jnp.asarray(x, jnp.float32), jnp.asarray(dead))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(found, f, atol=1e-5)
    np.testing.assert_allclose(left, error, atol=1e-5)


@pytest.mark.parametrize("function", [jump, above])
def test_thresholds_feel_what_lies_within_the_bandwidth(function: Callable[..., Any]):
    r = jnp.asarray([[0.95, 3.0], [1.04, 1.96], [1.20, 2.04], [0.0, 2.3]])
    threshold, bandwidth = jnp.asarray([1.0, 2.0]), 0.2
    cotangent = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    value, back = jax.vjp(lambda r, t: function(r, t, bandwidth), r, threshold)
    by_r, by_threshold = back(cotangent)
    on = np.asarray(r > threshold)
    near = np.array([1.0 + 3.0, 4.0 + 6.0])  # cotangents of the entries within 0.1 of their threshold
    if function is jump:
        np.testing.assert_allclose(value, np.where(on, r, 0))
        np.testing.assert_allclose(by_r, np.where(on, cotangent, 0))
        np.testing.assert_allclose(by_threshold, -np.asarray(threshold) / bandwidth * near, rtol=1e-6)
    else:
        np.testing.assert_allclose(value, on)
        np.testing.assert_allclose(by_r, np.zeros((4, 2)))
        np.testing.assert_allclose(by_threshold, -near / bandwidth, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"pool": 1000}, {"pool": 256}, {"k": 0}, {"k": F + 1}, {"context": 1}, {"warmup": 1.5}]
)
def test_impossible_numbers_are_refused(wrong: dict[str, Any]):
    with pytest.raises(UserError):
        recipe(**wrong).check()


# Learning


@pytest.mark.parametrize("arch", ["batchtopk", "jumprelu"])
def test_a_planted_dictionary_is_found(arch: str, directions: np.ndarray):
    asked = recipe(arch=arch)
    state, metrics, pool = trained(asked, directions)
    rows = np.asarray(state.weights.W_dec)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    cosines = np.abs(directions @ rows.T).max(1)
    assert cosines.mean() > 0.85  # of random rows: 0.6
    assert float(metrics.fvu[-1]) < 0.2
    assert float(metrics.l0[-1]) == pytest.approx(K, abs=0.3)
    if arch == "batchtopk":
        weights, x = state.weights, np.asarray(pool) * float(state.scale)
        r = np.maximum((x - np.asarray(weights.b_dec)) @ np.asarray(weights.W_enc) + np.asarray(weights.b_enc), 0)
        least = [np.sort(part, None)[-K * asked.batch] for part in r.reshape(-1, asked.batch, F)]
        found = float(inference_threshold(asked, state, pool))
        assert found == pytest.approx(np.mean(least), rel=1e-4)
        assert np.mean(np.sum(r > found, 1)) == pytest.approx(K, rel=0.05)  # without a batch as with one


def test_dead_latents_are_revived(directions: np.ndarray):
    alive = {}
    for weight in (1.0, 0.0):
        asked = recipe(aux_weight=weight, dead_after=1024, tokens=256 * 8 * 12)
        state = initial_state(asked, jnp.asarray(planted(np.random.default_rng(0), directions, asked.pool)))
        # Half of the latents are pushed down: positive now and then, and never among the largest.
        pushed = jnp.where(jnp.arange(F) < F // 2, -2.0, 0.0)
        state = dataclasses.replace(state, weights=dataclasses.replace(state.weights, b_enc=pushed))
        state, metrics, _ = trained(asked, directions, state)
        alive[weight] = 1 - float(metrics.dead[-1])
    assert alive[1.0] > alive[0.0] + 0.2
    assert alive[1.0] > 0.8


# Devices


def test_latents_are_split_over_the_mesh_with_all_that_belongs_to_them():
    mesh = make_mesh(model=2)
    shapes = jax.eval_shape(lambda: initial_state(recipe(arch="jumprelu"), jnp.zeros((64, D))))
    layout = shardings(shapes, mesh)
    for weights in (layout.weights, layout.optimizer[1][0].mu, layout.optimizer[1][0].nu):
        for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0), ("log_threshold", 0)):
            assert getattr(weights, name).spec[axis] == "model", name
        assert not any(weights.b_dec.spec)
    assert layout.idle.spec[0] == "model" and not any(layout.step.spec)
    assert pool_sharding(mesh, (64, D)).shard_shape((64, D)) == (64, D // 8)
