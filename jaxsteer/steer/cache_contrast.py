"""``cache_vectors``: vectors for cached keys and values, from two kinds of prompts (2507.08799).

Letters: B rows, K key/value heads, H head width, L layers, U tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import prefill
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.processes import to_host
from jaxsteer.prompts.generate import Prompt, encode_prompts
from jaxsteer.ranges import as_tuple
from jaxsteer.steer.caching import KEYS, VALUES, turned
from jaxsteer.steer.vectors import Vectors

BATCH = 16


def cache_vectors(
    model: Model,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    keys: float = 0.0,
    coefficient: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Vectors:
    """Mean over ``positive`` minus mean over ``negative`` prompts of the last token's value, in every layer.

    ``keys`` is the strength of the keys' differences beside that of the values (the paper's c_k / c_v); at 0, its
    default, keys are left out. Prompts are what ``generate`` takes, say few-shot examples with and without their
    reasoning; they need not have one length, because keys are averaged as they are before the rotary embedding. Sums
    are float64. ``progress(done, total)`` counts prompts. Raises ``UserError`` where a side has no prompts, for prompts
    longer than the model's positions, and for sides that do not differ.
    """
    config = model.config
    sides = [[row.ids for row in encode_prompts(model, as_tuple(side))] for side in (positive, negative)]
    rows = sides[0] + sides[1]
    if not min(map(len, rows)) or max(map(len, rows)) > config.max_positions:
        raise UserError(f"prompts must have 1 to {config.max_positions} tokens; the longest has {max(map(len, rows))}")
    share = np.repeat([1 / len(sides[0]), -1 / len(sides[1])], [len(side) for side in sides])
    sums = np.zeros((2, config.n_layers, config.n_kv_heads, config.d_head))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for begin in range(0, len(rows), BATCH):
        chosen = order[begin : begin + BATCH]
        padded = [rows[i] for i in chosen] + [rows[chosen[-1]]] * (BATCH - len(chosen))
        arrays = pad_rows(padded, min(bucket(max(map(len, padded))), config.max_positions))
        found = to_host(_newest(model.params, config, *(shard_rows(model.mesh, a) for a in arrays)))
        sums += np.einsum("b,slbkh->slkh", share[chosen], found[:, :, : len(chosen)].astype(np.float64))
        if progress is not None:
            progress(begin + len(chosen), len(rows))
    if not np.isfinite(sums).all():
        raise UserError("the model gives NaN or infinite keys or values on these prompts: check its weights and dtype")
    kinds = [(VALUES, sums[1]), *([(KEYS, keys * sums[0])] if keys else [])]
    arrays_by_site = {
        f"blocks.{i}.{kind}": layer.astype(np.float32) for kind, layers in kinds for i, layer in enumerate(layers)
    }
    if not any(np.abs(array).max() > 1e-9 for array in arrays_by_site.values()):
        raise UserError("the two sides of the contrast do not differ in any key or value: are they the same prompts?")
    return Vectors(
        arrays=arrays_by_site,
        operation="cache",
        coefficient=coefficient,
        sign="positive - negative prompts",
        model=model.name,
        fingerprint=model.fingerprint,
        read_position="the last token of the prompt",
        metadata={
            "estimator": "mean difference of cached values and keys, keys before the rotary embedding",
            "n_positive": str(len(sides[0])),
            "n_negative": str(len(sides[1])),
            "keys": f"{keys:g}",
            "jaxsteer_version": __version__,
        },
    )


@partial(jax.jit, static_argnames="config")
def _newest(
    params: Params, config: ModelConfig, tokens: Int[Array, "B U"], mask: Bool[Array, "B U"]
) -> Float[Array, "2 L B K H"]:
    """Key (turned back to position 0) and value of the last token of every row."""
    prefix, _ = prefill(params, config, tokens, mask)
    newest = prefix.length - 1
    k, v = (
        jnp.take_along_axis(a.astype(jnp.float32), newest[None, :, None, None, None], axis=-1)[..., 0]
        for a in (prefix.k, prefix.v)
    )
    return jnp.stack([turned(k, config, jnp.arange(config.n_layers), -newest), v])
