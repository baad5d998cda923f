"""Random weights and Hugging Face directories made of them, without torch."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from checkpoints_convert import write_hf
from jaxsteer.models.config import ModelConfig, Rope, llama_config
from jaxsteer.models.loading import Model
from jaxsteer.models.params import Layers, Params, layer_shapes, top_shapes

LLAMA3_ROPE = Rope(
    theta=10_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16
)


def tiny_config(**changes: object) -> ModelConfig:
    """A small Llama: grouped heads, a head width that is not D / N, llama3 RoPE scaling."""
    fields = dict(
        vocab_size=67,
        d_model=24,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_head=8,
        d_mlp=40,
        max_positions=128,
        rope=LLAMA3_ROPE,
    )
    return llama_config(**(fields | changes))


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Weights of order one everywhere, norms and biases included, so that no term hides behind another."""
    rng = np.random.default_rng(seed)

    def leaf(name: str, shape: tuple[int, ...]) -> jnp.ndarray:
        noise = rng.standard_normal(shape)
        if name.endswith("norm"):
            values = 0.2 * noise + (0.0 if config.norm_plus_one else 1.0)
        elif name.endswith("bias"):
            values = 0.5 * noise
        else:
            values = noise / np.sqrt(config.d_model) * (2.0 if name in ("q", "k") else 1.0)
        return jnp.asarray(values, jnp.float32)

    top = {name: leaf(name, shape) for name, shape in top_shapes(config).items()}
    layers = {name: leaf(name, (config.n_layers, *shape)) for name, shape in layer_shapes(config).items()}
    return Params(layers=Layers(**layers), **top)


@functools.cache
def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """A model without a checkpoint behind it."""
    params = random_params(config, seed)
    return Model(params=params, config=config, tokenizer=None, name="random", fingerprint="0" * 64)


def hf_directory(path: Path, config: ModelConfig | None = None, *, seed: int = 0, dtype: str = "float32") -> Path:
    """A Hugging Face directory holding random weights."""
    config = config or tiny_config()
    return write_hf(random_params(config, seed), config, path, dtype=dtype)
