"""Random weights and Hugging Face directories made of them, without torch."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from checkpoints_convert import write_hf
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope, llama_config
from jaxsteer.models.model import Model
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


FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
WINDOW = 6
_GEMMA = dict(
    activation="gelu_tanh", norm_plus_one=True, norm_eps=1e-6, post_norms=True, embed_scale=True, tied_embeddings=True
)


def family_config(name: str, **changes: object) -> ModelConfig:
    """A small config of each family, with everything on that the family has; ``changes`` are fields of ModelConfig.

    The Gemmas have 7 layers: sliding and full in turn (Gemma 2), two sliding to one full (Gemma 3), window 6.
    """
    n_layers = changes.get("n_layers", 7 if name.startswith("gemma") else 3)
    config = tiny_config(n_layers=n_layers)
    if name == "qwen2":
        config = dataclasses.replace(
            config, family="qwen2", qkv_bias=True, norm_eps=1e-6, tied_embeddings=True, ropes=(Rope(theta=1000.0),)
        )
    elif name == "qwen3":
        config = dataclasses.replace(config, family="qwen3", qk_norm=True, norm_eps=1e-6, ropes=(Rope(theta=1000.0),))
    elif name == "gemma2":
        config = dataclasses.replace(
            config,
            family="gemma2",
            query_scale=12**-0.5,
            attn_softcap=3.0,
            final_softcap=2.0,
            windows=tuple(GLOBAL_WINDOW if i % 2 else WINDOW for i in range(n_layers)),
            ropes=(Rope(theta=1000.0),),
            **_GEMMA,
        )
    elif name == "gemma3":
        full = [(i + 1) % 3 == 0 for i in range(n_layers)]
        config = dataclasses.replace(
            config,
            family="gemma3_text",
            query_scale=12**-0.5,
            qk_norm=True,
            windows=tuple(GLOBAL_WINDOW if f else WINDOW for f in full),
            ropes=(Rope(theta=100.0), Rope(theta=10_000.0, kind="linear", factor=4.0)),
            rope_index=tuple(int(f) for f in full),
            **_GEMMA,
        )
    elif name == "gpt2":
        config = dataclasses.replace(
            config,
            family="gpt2",
            n_kv_heads=4,
            d_head=6,
            query_scale=1 / math.sqrt(6),
            activation="gelu_tanh",
            gated_mlp=False,
            norm="layer",
            qkv_bias=True,
            writer_bias=True,
            tied_embeddings=True,
            learned_positions=True,
            ropes=(),
            rope_index=(),
        )
    elif name != "llama":
        raise ValueError(name)
    return dataclasses.replace(config, **changes)


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
