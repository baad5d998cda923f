"""The fixtures of conftest do what other tests believe they do."""

import os

import jax
import jax.numpy as jnp


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
