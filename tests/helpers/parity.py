"""What is compared with transformers, whether it comes from a stored golden or from torch a moment ago."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxsteer
from jaxsteer.models.loading import Model
from jaxsteer.models.transformer import make_context, positions_of, run_layers, unembed

VARIANTS: dict[str, dict[str, object]] = {
    "llama_mha_untied": dict(
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
    "llama_gqa_tied_llama3": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
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
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    ),
}
"""Name -> fields of LlamaConfig beyond the sizes that all share."""
SIZES = dict(vocab_size=64, hidden_size=24, num_hidden_layers=3, intermediate_size=36, max_position_embeddings=64)


def check(model: Model, golden: dict[str, np.ndarray]) -> None:
    """Logits and every hidden state within 1e-4, sites within 1e-4, the gradient within 1e-3 relative.

    ``golden``: tokens and mask [B, T] with padding on both sides; logits [B, T, V]; hidden [L + 1, B, T, D]; gradient
    [B, T, D] of the loss below; "site:NAME" arrays of row 0.
    """
    tokens, mask = golden["tokens"], golden["mask"].astype(bool)
    np.testing.assert_allclose(
        np.asarray(jaxsteer.logits(model, tokens, mask))[mask], golden["logits"][mask], atol=1e-4, rtol=0
    )
    streams = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(model.config.n_layers))]
    sites = {key.removeprefix("site:"): value for key, value in golden.items() if key.startswith("site:")}
    assert len(sites) > 5
    found = jaxsteer.capture(model, tokens, list(dict.fromkeys([*streams, *sites])), mask)
    for name, expected in zip(streams, golden["hidden"], strict=True):
        np.testing.assert_allclose(np.asarray(found[name])[mask], expected[mask], atol=1e-4, rtol=0, err_msg=name)
    for name, expected in sites.items():
        rows = (slice(None), mask[0]) if name.endswith("hook_pattern") else mask[0]
        ours = np.asarray(found[name])[0]
        np.testing.assert_allclose(ours[rows], expected[rows], atol=1e-4, rtol=0, err_msg=name)
    gradient = np.asarray(loss_gradient(model, tokens, mask))
    error = np.abs(gradient - golden["gradient"])[mask].max() / np.abs(golden["gradient"])[mask].max()
    assert error < 1e-3, f"relative error of the gradient: {error}"


def loss_gradient(model: Model, tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
    """Gradient with respect to the embeddings of the mean cross-entropy of each next token, padding left out."""
    params, config = model.params, model.config

    def loss(x: jax.Array) -> jax.Array:
        context = make_context(config, positions_of(jnp.asarray(mask)), jnp.asarray(mask))
        logits = unembed(params, config, run_layers(params, config, x, context, 0, config.n_layers))
        logp = jax.nn.log_softmax(logits[:, :-1])
        taken = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        both = jnp.asarray(mask[:, 1:] & mask[:, :-1])
        return -(taken * both).sum() / both.sum()

    return jax.jit(jax.grad(loss))(params.embed[jnp.asarray(tokens)])
