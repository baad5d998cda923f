"""What is compared with transformers, whether it comes from a stored golden or from torch a moment ago."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsteer
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope
from jaxsteer.models.layers import run_layers
from jaxsteer.models.model import Model
from jaxsteer.models.transformer import make_context, placed, positions_of, scale_embeddings, unembed

SLIDE, FULL = "sliding_attention", "full_attention"
_GEMMA = dict(
    intermediate_size=16,
    head_dim=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    query_pre_attn_scalar=16,
    sliding_window=6,
)
_GEMMA3 = _GEMMA | dict(
    num_hidden_layers=7,
    layer_types=[SLIDE, SLIDE, FULL, SLIDE, SLIDE, FULL, SLIDE],
    rope_parameters={
        SLIDE: dict(rope_type="default", rope_theta=30.0),
        FULL: dict(rope_type="linear", rope_theta=1000.0, factor=2.0),
    },
)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama_mha_untied": dict(
        model_type="llama", num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
    "llama_gqa_tied_llama3": dict(
        model_type="llama",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=12,
        ),
    ),
    "llama_mqa_linear": dict(
        model_type="llama",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0),
    ),
    "qwen2_tied": dict(model_type="qwen2", num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_sliding": dict(
        model_type="qwen2",
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "qwen3_untied": dict(
        model_type="qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False
    ),
    "qwen3_sliding_tied": dict(
        model_type="qwen3",
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=[SLIDE, FULL, SLIDE, FULL, SLIDE],
        tie_word_embeddings=True,
    ),
    "gemma2": _GEMMA
    | dict(
        model_type="gemma2",
        num_hidden_layers=5,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=3.0,
        rope_parameters=dict(rope_type="default", rope_theta=100.0),
    ),
    "gemma3_text": _GEMMA3 | dict(model_type="gemma3_text", final_logit_softcapping=3.0),
    "gemma3": _GEMMA3 | dict(model_type="gemma3"),
    "gpt2": dict(model_type="gpt2", n_embd=16, n_layer=3, n_head=4, n_positions=64, layer_norm_epsilon=0.5),
}
"""Name -> ``model_type`` and fields of its configuration beyond the sizes that all share."""
SIZES = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=24,
    max_position_embeddings=64,
    rms_norm_eps=1e-2,  # large, or nobody would notice another one
)
GPT2_SIZES = dict(vocab_size=48, bos_token_id=0, eos_token_id=0)
"""Of GPT-2, which has names of its own for them (and token ids beyond so small a vocabulary)."""
VISION = dict(
    vision_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ),
    mm_tokens_per_image=4,
    image_token_index=47,
    boi_token_index=46,
    eoi_token_index=45,
)
"""What a multimodal Gemma 3 has beside its text model."""


_GEMMAS = ("gemma2", "gemma3_text", "gemma3")
_SLIDING = ("qwen2_sliding", "qwen3_sliding_tied", *_GEMMAS)


def _full(config: ModelConfig) -> tuple[int, ...]:
    return (GLOBAL_WINDOW,) * config.n_layers


DROPS: dict[str, tuple[tuple[str, ...], Callable[[ModelConfig], dict[str, Any]]]] = {
    "attention soft-cap": (("gemma2",), lambda c: {"attn_softcap": None}),
    "final soft-cap": (("gemma2", "gemma3_text"), lambda c: {"final_softcap": None}),
    "windows": (_SLIDING, lambda c: {"windows": _full(c)}),
    "windows one longer": (_SLIDING[1:], lambda c: {"windows": tuple(min(w + 1, GLOBAL_WINDOW) for w in c.windows)}),
    "windows one layer off": (_SLIDING, lambda c: {"windows": c.windows[1:] + c.windows[:1]}),
    "q/k norms": (("qwen3_untied", "gemma3_text", "gemma3"), lambda c: {"qk_norm": False}),
    "biases": (("qwen2_tied", "qwen2_sliding", "gpt2"), lambda c: {"qkv_bias": False}),
    "positions": (("gpt2",), lambda c: {"learned_positions": False}),
    "mean and bias of norms": (("gpt2",), lambda c: {"norm": "rms"}),
    "embedding scale": (_GEMMAS, lambda c: {"embed_scale": False}),
    "1 + w": (_GEMMAS, lambda c: {"norm_plus_one": False}),
    "post norms": (_GEMMAS, lambda c: {"post_norms": False}),
    "query scalar": (_GEMMAS, lambda c: {"query_scale": c.d_head**-0.5}),
    "GeGLU": (_GEMMAS, lambda c: {"activation": "silu"}),
    "RoPE by layer type": (("gemma3_text", "gemma3"), lambda c: {"rope_index": (0,) * c.n_layers}),
    "RoPE scaling": (
        ("llama_gqa_tied_llama3", "llama_mqa_linear", "gemma3_text"),
        lambda c: {"ropes": tuple(Rope(theta=rope.theta) for rope in c.ropes)},
    ),
    "epsilon": (("llama_mqa_linear", "qwen2_tied", "qwen3_untied", *_GEMMAS, "gpt2"), lambda c: {"norm_eps": 1e-5}),
}
"""What would go wrong -> (variants in which it must show, the fields of ``ModelConfig`` that do it)."""


def check(model: Model, golden: dict[str, np.ndarray], *, gradient: bool = True) -> dict[str, float]:
    """Logits, every hidden state and sites within 1e-4, the gradient (unless left out) within 1e-3 relative.

    ``golden``: tokens and mask [B, T] with padding on both sides; logits [B, T, V]; hidden [L + 1, B, T, D]; gradient
    [B, T, D] as ``logits_and_gradient`` says; "site:NAME" arrays of row 0. Returns the largest errors that were seen.
    """
    tokens, mask = golden["tokens"], golden["mask"].astype(bool)
    errors: dict[str, float] = {}

    def close(what: str, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=name)
        errors[what] = max(errors.get(what, 0.0), float(np.abs(ours - theirs).max()))

    if gradient:
        logits, found = logits_and_gradient(model, tokens, mask)
        theirs = golden["gradient"]
        errors["gradient"] = float(np.abs(found - theirs)[mask].max() / np.abs(theirs)[mask].max())
        assert errors["gradient"] < 1e-3
    else:
        logits = np.asarray(jaxsteer.logits(model, tokens, mask))
    close("logits", "logits", logits[mask], golden["logits"][mask])
    streams = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(model.config.n_layers))]
    sites = {key.removeprefix("site:"): value for key, value in golden.items() if key.startswith("site:")}
    assert len(sites) > 5
    seen = jaxsteer.capture(model, tokens, list(dict.fromkeys([*streams, *sites])), mask)
    for name, expected in zip(streams, golden["hidden"], strict=True):
        close("hidden", name, np.asarray(seen[name])[mask], expected[mask])
    for name, expected in sites.items():
        rows = (slice(None), mask[0]) if name.endswith("hook_pattern") else mask[0]
        close("sites", name, np.asarray(seen[name])[0][rows], expected[rows])
    return errors


def logits_and_gradient(model: Model, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and the gradient of the mean cross-entropy of each next token with respect to the embeddings.

    These are rows of the embedding table, before Gemma's multiplier. Padding is left out of the mean.
    """
    params, config = model.params, model.config

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = make_context(config, positions_of(jnp.asarray(mask)), jnp.asarray(mask))
        x = placed(params, scale_embeddings(x, config), context.positions)
        x = run_layers(params, config, x, context, 0, config.n_layers)
        logits = unembed(params, config, x)
        logp = jax.nn.log_softmax(logits[:, :-1])
        taken = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        both = jnp.asarray(mask[:, 1:] & mask[:, :-1])
        return -(taken * both).sum() / both.sum(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params.embed[jnp.asarray(tokens)])
    return np.asarray(logits), np.asarray(gradient)


def kl_per_token(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL(theirs || ours) in nats of logits [..., V]."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)
