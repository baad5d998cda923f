"""The fixtures of conftest do what other tests believe they do."""

import os

import jax
import jax.numpy as jnp
import jaxtyping
import pytest


def test_eight_devices_and_no_network():
    assert jax.device_count() == 8
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_compilations_are_counted_by_name(compile_counter):
    @jax.jit
    def doubled(x):
        return 2 * x

    with compile_counter() as count:
        doubled(jnp.zeros(3))
        doubled(jnp.ones(3))
        doubled(jnp.ones(4))
    doubled(jnp.ones(5))
    assert count["doubled"] == 2
    assert count["step"] == 0


def test_annotations_of_our_packages_are_checked():
    from checkpoints_convert import convert
    from jaxsteer.models.config import Rope, llama_config
    from jaxsteer.models.params import init_params

    config = llama_config(vocab_size=8, d_model=4, n_layers=1, n_heads=1, d_mlp=4, max_positions=8, rope=Rope(theta=10))
    with pytest.raises(jaxtyping.TypeCheckError):
        init_params("config", jax.random.key(0))
    with pytest.raises(jaxtyping.TypeCheckError):
        convert(3, 4)
    params = init_params(config, jax.random.key(0))
    assert jax.tree.leaves(jax.tree.map(lambda _: None, params)) == []  # pytrees may hold other things than arrays
