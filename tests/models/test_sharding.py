"""Matrices are split over "model" by heads where these divide, along the width of the stream where they do not."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import jaxsteer
from jaxsteer.checkpoints.inspect import memory, parameters
from jaxsteer.checkpoints.published import NAMES, published_config
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import AXES, leaf_spec, make_mesh, shard_params
from tests.helpers.checkpoints import family_config, random_params, tiny_config

TOKENS = np.random.default_rng(0).integers(0, 64, (4, 6))


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("k", (64, 8, 16), P(None, "model", None)),
        ("k", (64, 2, 16), P("model", None, None)),
        ("o", (2, 16, 64), P(None, None, "model")),
        ("embed", (67, 64), P(None, "model")),
        ("unembed", (64, 67), P("model", None)),
        ("k", (60, 2, 16), P(None, "model", None)),  # nothing divides: ``place`` replicates it
        ("k_bias", (2, 16), P("model", None)),
        ("attn_norm", (64,), P(None)),
    ],
)
def test_the_axis_that_divides_is_split(name: str, shape: tuple[int, ...], spec: P):
    assert leaf_spec(name, shape, AbstractMesh((1, 8), AXES)) == spec


@pytest.mark.parametrize("name", NAMES)
def test_published_models_are_split_evenly(name: str):
    config = published_config(name)
    total = 2 * parameters(config)["total"]
    for model in (2, 8, 16, 64):
        assert memory(config, "bfloat16", model=model)["weights"] == pytest.approx(total / model, rel=0.01)


def test_a_width_split_model_computes_the_same():
    config = tiny_config(n_heads=3, n_kv_heads=1, vocab_size=66)
    split = computes_the_same(config)
    assert split.layers.k.addressable_shards[0].data.shape == (3, 6, 1, 8)
    assert split.layers.o.addressable_shards[0].data.shape == (3, 3, 8, 6)


def test_a_split_gpt2_computes_the_same():
    """Biases of heads and neurons lie with them; those of the stream, and positions, on every device."""
    split = computes_the_same(family_config("gpt2", vocab_size=68))
    shapes = {name: getattr(split.layers, name) for name in ("q_bias", "up_bias", "o_bias", "down_bias")}
    assert [leaf.addressable_shards[0].data.shape for leaf in shapes.values()] == [(3, 1, 6), (3, 10), (3, 24), (3, 24)]
    assert split.positions.addressable_shards[0].data.shape == (128, 24)


def computes_the_same(config: ModelConfig) -> Params:
    """Over four devices along "model", of which the weights are returned."""
    params, mesh = random_params(config), make_mesh(model=4)
    split = shard_params(params, config, mesh)
    one, many = (
        Model(params=p, config=config, tokenizer=None, name="t", mesh=m, fingerprint="t")
        for p, m in ((params, None), (split, mesh))
    )
    expected, got = jaxsteer.logits(one, TOKENS), jaxsteer.logits(many, TOKENS)
    np.testing.assert_allclose(jax.device_get(got), jax.device_get(expected), atol=1e-5)
    return split
