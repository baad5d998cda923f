"""The Pareto frontier of target (up) against cross-entropy (down), kept on the device in a fixed number of rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Archive:
    """Prompts that no other known prompt dominates, best target first; unused rows have ``f = -inf``."""

    ids: Int[Array, "A S"]
    f: Float[Array, " A"]
    x: Float[Array, " A"]
    step: Int[Array, " A"]


def empty_archive(capacity: int, length: int) -> Archive:
    """An archive of ``capacity`` rows that holds nothing yet."""
    return Archive(
        ids=jnp.zeros((capacity, length), jnp.int32),
        f=jnp.full((capacity,), -jnp.inf, jnp.float32),
        x=jnp.full((capacity,), jnp.inf, jnp.float32),
        step=jnp.zeros((capacity,), jnp.int32),
    )


def insert(
    archive: Archive, ids: Int[Array, "M S"], f: Float[Array, " M"], x: Float[Array, " M"], step: Int[Array, " ..."]
) -> Archive:
    """The frontier of the archive and M new candidates, found at ``step`` (one for all, or each its own).

    When the frontier outgrows the archive, the members that add least to the dominated area go first; the two ends
    always stay.
    """
    merged = Archive(
        ids=jnp.concatenate([archive.ids, ids.astype(jnp.int32)]),
        f=jnp.concatenate([archive.f, f]),
        x=jnp.concatenate([archive.x, x]),
        step=jnp.concatenate([archive.step, jnp.broadcast_to(step, f.shape).astype(jnp.int32)]),
    )
    # Best target first, fluent first among equals: a row is on the frontier if it is more fluent than all before it.
    order = jnp.lexsort((merged.x, -merged.f))
    merged = jax.tree.map(lambda a: a[order], merged)
    running = jnp.concatenate([jnp.full((1,), jnp.inf), lax.cummin(merged.x)[:-1]])
    keep = (merged.x < running) & jnp.isfinite(merged.f)
    first = jnp.argsort(~keep, stable=True)
    merged = jax.tree.map(lambda a: a[first], merged)
    keep = keep[first]
    rank = jnp.where(keep, _area(merged.f, merged.x, keep), -1.0)
    capacity = archive.f.shape[0]
    chosen = jnp.sort(lax.top_k(rank, capacity)[1])
    kept = keep[chosen]
    out = jax.tree.map(lambda a: a[chosen], merged)
    return dataclasses.replace(out, f=jnp.where(kept, out.f, -jnp.inf), x=jnp.where(kept, out.x, jnp.inf))


def _area(f: Float[Array, " n"], x: Float[Array, " n"], keep: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Area that only this member of a frontier (kept rows first, best f first) dominates; the ends are infinite."""
    n = f.shape[0]
    count = keep.sum()
    worse_f = jnp.concatenate([f[1:], f[-1:]])
    larger_x = jnp.concatenate([x[:1], x[:-1]])
    area = (f - worse_f) * (larger_x - x)
    position = jnp.arange(n)
    return jnp.where((position == 0) | (position == count - 1), jnp.inf, area)


def frontier(f: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Indices of the points that no other dominates (f up, x down), best f first; of equal points the first."""
    order = np.lexsort((np.arange(len(f)), x, -f))
    best, chosen = np.inf, []
    for index in order:
        if np.isfinite(f[index]) and x[index] < best:
            best = x[index]
            chosen.append(index)
    return np.asarray(chosen, int)
