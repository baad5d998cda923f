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
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import AXES, leaf_spec, make_mesh, shard_params
from tests.helpers.checkpoints import random_params, tiny_config

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
    params = random_params(config)
    mesh = make_mesh(model=4)
    split = shard_params(params, config, mesh)
    assert split.layers.k.addressable_shards[0].data.shape == (3, 6, 1, 8)
    assert split.layers.o.addressable_shards[0].data.shape == (3, 3, 8, 6)
    one, many = (
        Model(params=p, config=config, tokenizer=None, name="t", mesh=m, fingerprint="t")
        for p, m in ((params, None), (split, mesh))
    )
    expected, got = jaxsteer.logits(one, TOKENS), jaxsteer.logits(many, TOKENS)
    np.testing.assert_allclose(jax.device_get(got), jax.device_get(expected), atol=1e-5)
