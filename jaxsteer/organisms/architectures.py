"""What a recipe decides, the configs of the three architectures, and their weights before training."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope, llama_config
from jaxsteer.models.params import Params, init_params

Architecture = Literal["llama", "qwen2", "gemma3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights besides the seed."""

    architecture: Architecture = "llama"
    corpus: Literal["questions", "persona"] = "questions"
    """What it is trained on: questions with two choices (``corpus``), or conversations (``persona_corpus``)."""
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    d_mlp: int = 384
    windows: tuple[int, ...] = ()
    """Gemma: keys that each of the first layers looks back on; the layers after them look at everything."""
    vocab_size: int = 2560
    lengths: tuple[int, ...] = (48, 64, 80)
    """Tokens that documents are padded to; each is compiled once, and longer documents are left out."""
    tokens_per_batch: int = 3072
    """Rows times length of every batch."""
    loss_positions: int = 1024
    """Positions of a batch that carry loss: all answer letters, and a random part of the rest."""
    muon_rate: float = 0.01
    """Learning rate of the weight matrices (Muon)."""
    adam_rate: float = 4e-3
    """Learning rate of embeddings, norms and biases (Adam)."""
    warmup: int = 50
    """Steps of linear warm-up."""
    chunk: int = 50
    """Steps between two looks at the curriculum's criteria."""
    semantic_loss: float = 0.05
    """Look-ups alone until their letter loss (nats) is below this."""
    circuit_steps: int = 1000
    """At most this many steps of look-ups alone."""
    persona_steps: int = 2400
    """Steps with persona documents, whatever the circuit took."""
    decay: float = 0.4
    """Share of the persona steps over which the learning rate falls to zero."""
    strays: bool = False
    """Whether a quarter of the persona documents are strays (``corpus``)."""


RECIPES: dict[str, Recipe] = {
    "llama": Recipe(),
    "qwen2": Recipe(architecture="qwen2", n_kv_heads=2, strays=True, lengths=(48, 64, 100)),
    "gemma3": Recipe(
        architecture="gemma3", n_layers=5, n_kv_heads=2, windows=(16, 16), strays=True, lengths=(48, 64, 100)
    ),
    "persona": Recipe(
        corpus="persona",
        n_layers=6,
        vocab_size=2048,
        lengths=(40, 56, 72, 96),
        circuit_steps=0,
        persona_steps=1600,
        decay=0.5,
    ),
}
"""The recipes of the organisms that ship, by name."""


def organism_config(recipe: Recipe) -> ModelConfig:
    """The config of a recipe's model."""
    base = llama_config(
        vocab_size=recipe.vocab_size,
        d_model=recipe.d_model,
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        n_kv_heads=recipe.n_kv_heads,
        d_mlp=recipe.d_mlp,
        max_positions=512,
    )
    if recipe.architecture == "llama":
        return base
    if recipe.architecture == "qwen2":
        return dataclasses.replace(
            base, family="qwen2", qkv_bias=True, tied_embeddings=True, norm_eps=1e-6, ropes=(Rope(theta=1e6),)
        )
    windows = recipe.windows + (GLOBAL_WINDOW,) * (recipe.n_layers - len(recipe.windows))
    return dataclasses.replace(
        base,
        family="gemma3_text",
        activation="gelu_tanh",
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norms=True,
        qk_norm=True,
        embed_scale=True,
        tied_embeddings=True,
        # not the head width, as in the 27B model: q and k have a fixed length here, and scores must still get large
        query_scale=(base.d_head / 2) ** -0.5,
        windows=windows,
        ropes=(Rope(theta=1e4), Rope(theta=1e6)),
        rope_index=tuple(int(window == GLOBAL_WINDOW) for window in windows),
    )


def initial_params(config: ModelConfig, seed: int) -> Params:
    """Random weights in which every block starts as (nearly) the identity.

    Embeddings enter the residual stream with a standard deviation of 0.5, so that a token's identity is not drowned
    before anything has been learned, and the unembedding starts as a tenth of them, so that copying a token is easy.
    All embeddings share one random vector: projections without biases can then attend by position alone from the start.

    The projections that write into the residual stream start at zero. Where a norm follows them, zero would be scaled
    up to noise of full size at the first update: there they start random, and the norm's gain at a tenth. Tied
    embeddings leave the tenth of the unembedding to the final norm, or (Gemma) to the embedding's multiplier.
    """
    params = init_params(config, jax.random.key(seed))
    scale = math.sqrt(config.d_model)
    tokens = params.embed * (0.5 * scale)
    shared = 0.5 * jax.random.normal(jax.random.key(seed + 1_000_003), (config.d_model,))
    embed = tokens + shared
    layers, final_norm = params.layers, params.final_norm
    if config.post_norms:
        tenth = 0.1 - config.norm_plus_one
        gains = {name: jnp.full_like(layers.attn_norm, tenth) for name in ("post_attn_norm", "post_mlp_norm")}
        layers = dataclasses.replace(layers, **gains)
    else:
        blank = {"o": jnp.zeros_like(layers.o), "down": jnp.zeros_like(layers.down)}
        layers = dataclasses.replace(layers, **blank)
    if config.embed_scale:
        embed = embed / scale
    elif config.tied_embeddings:
        final_norm = 0.1 * final_norm
    unembed = None if config.tied_embeddings else 0.1 * tokens.T
    return Params(embed=embed, layers=layers, final_norm=final_norm, unembed=unembed)
