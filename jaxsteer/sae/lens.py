"""The logit lens of latents: tokens that a latent's decoder row promotes when it is written into the stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import direction_logits
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE

_BLOCK = 64


def promoted_tokens(
    model: Model, sae: SAE, latents: Sequence[int] | Int[np.ndarray, " S"], *, top: int = 10, suppressed: bool = False
) -> list[tuple[str, ...]]:
    """For every latent the ``top`` tokens whose logits its decoder row raises most, as texts, the strongest first;
    or lowers most (``suppressed``).

    The row goes through the final norm's weight and the unembedding; the norm's division, which depends on the rest of
    the stream, is left out: it changes no order. Rows of the vocabulary behind the tokenizer's last token are left out.
    Raises ``UserError`` for an SAE that does not write into a stream of the model's width.
    """
    if sae.d_out != model.config.d_model:
        raise UserError(
            f"The SAE writes vectors of width {sae.d_out}, and the stream of {model.name} has {model.config.d_model}: "
            "its latents promote no tokens directly."
        )
    chosen = np.asarray(latents, np.int32)
    known = len(model.tokenizer)
    out: list[tuple[str, ...]] = []
    for begin in range(0, len(chosen), _BLOCK):
        part = chosen[begin : begin + _BLOCK]
        padded = np.pad(part, (0, -len(part) % _BLOCK), mode="edge")
        rows = sae.W_dec[padded].astype(jnp.float32) * (-1 if suppressed else 1)
        found = to_host(_best(model.params, model.config, rows, known=known, top=min(top, known)))[: len(part)]
        out += [tuple(model.tokenizer.decode([int(token)]) for token in row) for row in found]
    return out


@partial(jax.jit, static_argnames=("config", "known", "top"))
def _best(
    params: Params, config: ModelConfig, rows: Float[Array, "S D"], *, known: int, top: int
) -> Int[Array, "S top"]:
    logits = direction_logits(params, config, rows)
    return lax.top_k(jnp.where(jnp.arange(logits.shape[-1]) < known, logits, -jnp.inf), top)[1]
