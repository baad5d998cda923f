"""Attribution of values at sites: against plain gradients, nodes, exact patches, and a dictionary's latents."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.rows import make_rows
from jaxsteer.circuits.values import attribute_values, latent_scores
from jaxsteer.objectives import LogitDifference
from jaxsteer.sae.dictionary import SAE, SAEConfig
from tests.helpers.checkpoints import family_config, random_model

MODEL = random_model(family_config("gemma2", n_layers=2))
RNG = np.random.default_rng(0)
TEXTS, OTHERS = ([RNG.integers(0, 67, n) for n in (6, 8)] for _ in range(2))
ROWS, SOURCE = make_rows(MODEL, TEXTS), make_rows(MODEL, OTHERS)
METRIC = LogitDifference(plus=np.asarray([3, 5]), minus=np.asarray([4, 60]))
SITES = ["blocks.1.hook_mlp_out", "blocks.0.mlp.hook_post", "blocks.1.attn.hook_v", "blocks.1.attn.hook_pattern"]
SITES += ["blocks.0.hook_resid_post", "ln_final.hook_normalized"]
PUSH = steer.add("blocks.0.hook_resid_post", RNG.standard_normal(24), 0.5)


def test_difference_times_gradient() -> None:
    found = attribute_values(MODEL, ROWS, METRIC, SOURCE, SITES)

    def metric(run: jaxsteer.Run) -> jnp.ndarray:
        last = run.logits[jnp.arange(2), ROWS.lengths - 1]
        return (last[jnp.arange(2), METRIC.plus] - last[jnp.arange(2), METRIC.minus]).sum()

    plain = jaxsteer.gradients(MODEL, ROWS.tokens, metric, ROWS.mask, sites=SITES)
    other = jaxsteer.capture(MODEL, SOURCE.tokens, SITES, SOURCE.mask)
    for site in SITES:
        expected = (np.asarray(other[site]) - plain.states[site]) * plain.gradients[site]
        if site.endswith("pattern"):
            expected = expected * ROWS.mask[:, None, :, None]
        np.testing.assert_allclose(found.scores(site), expected, atol=1e-5)
        axes = (1, 3) if site.endswith("pattern") else tuple(range(2, expected.ndim))
        np.testing.assert_allclose(found.by_token(site), expected.sum(axes), atol=1e-4)
    edges = attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=1, rule="left")
    assert found.scores(SITES[0]).sum() / 2 == pytest.approx(edges.node("m1"), rel=1e-4)
    (best, score), *_ = found.top(SITES[1], 3)
    neurons = found.scores(SITES[1]).sum(1).mean(0)
    assert best == (np.abs(neurons).argmax(),) and score == pytest.approx(neurons[best], rel=1e-5)


def test_along_the_coefficient_the_steered_stream_is_complete() -> None:
    site = "blocks.1.hook_resid_pre"
    found = attribute_values(MODEL, ROWS, METRIC, PUSH, site, start=1, steps=32, rule="midpoint")
    np.testing.assert_allclose(found.scores(site).sum((1, 2)), found.target - found.base, rtol=0.01)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_latents_and_the_error_node_sum_to_the_site(activation: str) -> None:
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    config = SAEConfig(site_in=SITES[4], site_out=SITES[4], model="tiny", activation=activation, k=4)
    sae = SAE(draw(24, 50) / 5, draw(50, 24), draw(50), draw(24), config=config)
    found = attribute_values(MODEL, ROWS, METRIC, SOURCE, SITES[4])
    latents, error = latent_scores(found, SITES[4], sae)
    assert latents.shape == (*ROWS.tokens.shape, 50) and np.abs(latents).max() > 1e-3
    np.testing.assert_allclose(latents.sum(-1) + error, found.scores(SITES[4]).sum(-1), atol=1e-4)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="lies below block 1"):
        attribute_values(MODEL, ROWS, METRIC, PUSH, "blocks.0.hook_mlp_out", start=1)
