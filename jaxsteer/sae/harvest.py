"""Activations harvested from a model, and the pool that they are drawn from in random order.

The pool holds N activations of width D on the devices and nothing else is kept. Training uses a random half of it, in
random order; then that half is filled again. On a mesh the pool is split along D, so that gathering random rows and
writing into them are local, and only the rows of a batch travel.

Letters: B rows of text, T time, M = B T activations, N activations of the pool, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.models.sharding import place, require_memory
from jaxsteer.models.transformer import positions_of
from jaxsteer.prompts import bos_id
from jaxsteer.sae.texts import Documents, Position, Rows

OUTLIER = 10.0
"""An activation whose norm is above this many times the median of its batch is left out."""
_MOST_EMPTY = 64


def harvest(
    model: Model, site: str, tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> tuple[Float[Array, "M D"], Bool[Array, " M"]]:
    """Activations at ``site`` (heads joined), in float32, and which of them count (``usable``).

    Only the layers below the site are run.
    """
    x = capture(model, tokens, [site], mask)[site]
    x = x.reshape(*tokens.shape, -1)
    return x.reshape(-1, x.shape[-1]), usable(x, jnp.asarray(tokens), jnp.asarray(mask), bos_of(model)).reshape(-1)


def rows_of(
    model: Model, documents: Documents, *, rows: int, context: int, position: Position = (0, 0)
) -> tuple[Rows, int]:
    """``documents`` as batches of rows that the model reads at once, and the id of its BOS, or -1. Raises ``UserError``
    as ``require_rows``."""
    require_rows(model, rows, context)
    bos, length = bos_of(model), min(context, model.config.max_positions)
    return Rows(documents, rows=rows, length=length, bos=None if bos < 0 else bos, position=position), bos


def require_rows(model: Model, rows: int, context: int) -> None:
    """Raise ``UserError`` unless the activations of one layer in so many rows fit in memory."""
    config, length = model.config, min(context, model.config.max_positions)
    each = 4 * config.d_model + (2 * config.d_model + config.d_mlp) * model.params.embed.dtype.itemsize
    what = f"Reading {rows:,} rows of {length} tokens at a time"
    require_memory(what, rows * length * each, model.mesh, "choose fewer rows or a shorter context.")


def bos_of(model: Model) -> int:
    """The id of the token that begins the model's texts, or -1."""
    bos = None if model.tokenizer is None else bos_id(model.tokenizer)
    return -1 if bos is None else bos


@jax.jit
def usable(
    x: Float[Array, "B T D"], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], bos: Int[Array, ""] | int
) -> Bool[Array, "B T"]:
    """Which activations are ordinary: not padding, not the first of their row, not of a BOS, and no outliers.

    Models keep a few activations of enormous norm, usually at the first token: an SAE that saw them would learn
    nothing else. An outlier has more than ``OUTLIER`` times the median norm of the rest of the batch.
    """
    ordinary = mask & (positions_of(mask) > 0) & (tokens != bos)
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    median = jnp.nanmedian(jnp.where(ordinary, norms, jnp.nan))
    return ordinary & (norms <= OUTLIER * median)


def pool_sharding(mesh: Mesh | None, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Where the pool [N, D] lies: split along D over all devices."""
    return place(mesh, P(None, ("prompts", "model")), shape)


def empty_pool(mesh: Mesh | None, capacity: int, width: int, dtype: jnp.dtype) -> Float[Array, "N D"]:
    """A pool of zeros."""
    return jnp.zeros((capacity, width), dtype, device=pool_sharding(mesh, (capacity, width)))


@lru_cache(maxsize=8)
def _insert(mesh: Mesh | None, shape: tuple[int, ...]) -> Any:
    """The compiled ``insert`` of a pool of one shape."""

    @partial(jax.jit, donate_argnums=0, out_shardings=(pool_sharding(mesh, shape), None))
    def insert(pool: Array, free: Array, filled: Array, x: Array, keep: Array) -> tuple[Array, Array]:
        """Write the rows of x that count into the rows ``free`` of the pool; what finds no room is dropped."""
        rank = filled + jnp.cumsum(keep) - 1
        target = free[jnp.minimum(rank, len(free) - 1)]
        target = jnp.where(keep & (rank < len(free)), target, len(pool))
        return pool.at[target].set(x.astype(pool.dtype), mode="drop"), filled + keep.sum()

    return insert


def fill(
    pool: Float[Array, "N D"], free: Int[Array, " n"], model: Model, site: str, batches: Iterator[tuple]
) -> tuple[Float[Array, "N D"], Position]:
    """Fill the rows ``free`` of the pool (which is donated) with new activations.

    Returns the pool and the position of the texts after the last batch that was used. Raises ``UserError`` when the
    texts give no usable activations.
    """
    insert, filled = _insert(model.mesh, pool.shape), jnp.int32(0)
    before, empty = 0, 0
    while True:
        tokens, mask, position = next(batches)
        pool, filled = insert(pool, free, filled, *harvest(model, site, tokens, mask))
        count = int(filled)
        if count >= len(free):
            return pool, position
        empty = empty + 1 if count == before else 0
        before = count
        if empty > _MOST_EMPTY:
            raise UserError(
                f"{empty} batches of text in a row gave no usable activation at {site}: are the texts longer than one "
                "token, and are the activations finite?"
            )


def batches_of(rows: Rows) -> Iterator[tuple]:
    """The batches of ``rows``, the next one made in a thread while the device works on this one."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(rows.next)
        while True:
            ready, ahead = ahead.result(), pool.submit(rows.next)
            yield ready
