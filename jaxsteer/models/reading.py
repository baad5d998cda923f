"""Reading the residual stream of many token rows at one position each, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_and_read
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import KINDS, Site, find_sites
from jaxsteer.models.transformer import embed, make_context
from jaxsteer.processes import to_host

BATCH = 32


def direction_sites(model: Model, sites: str | Sequence[str]) -> tuple[Site, ...]:
    """Parsed sites of the stream or of what is added to it. Raises ``UserError`` for others, and for none."""
    found = tuple(dict.fromkeys(find_sites(sites, model.config).values()))
    if not found:
        raise UserError("no site was given: name at least one, e.g. blocks.2.hook_resid_post")
    for site in found:
        if not KINDS[site.kind].stream:
            possible = ", ".join(name for name, kind in KINDS.items() if kind.stream)
            raise UserError(f"a direction cannot be read at {site.name!r}: expected one of {possible}")
    return found


def _padded_length(length: int) -> int:
    """Multiples of 32 up to 256 and of 128 above. The last bits of what is read depend on it: it must not change."""
    step = 32 if length <= 256 else 128
    return -(-length // step) * step


def read_rows(
    model: Model,
    rows: Sequence[np.ndarray],
    reads: Int[np.ndarray, " n"],
    sites: Sequence[Site],
    *,
    batch_size: int = BATCH,
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "s b D"]]]:
    """Yield (row numbers, float32 streams at ``sites`` at each row's read position), every row exactly once.

    Rows come ordered by length. They are padded on the right, which a causal model cannot see at or before the read
    position. Raises ``UserError`` for a row longer than the model's positions.
    """
    longest = max(len(row) for row in rows)
    if longest > model.config.max_positions:
        raise UserError(
            f"the longest text has {longest} tokens, but the model has {model.config.max_positions} positions: "
            f"shorten the questions"
        )
    buckets: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        buckets.setdefault(_padded_length(len(row)), []).append(number)
    for length, numbers in sorted(buckets.items()):
        for start in range(0, len(numbers), batch_size):
            chunk = np.asarray(numbers[start : start + batch_size])
            tokens, _ = pad_rows([rows[number] for number in chunk] + [rows[0][:0]] * (batch_size - len(chunk)), length)
            read = np.zeros(batch_size, np.int32)
            read[: len(chunk)] = reads[chunk]
            states = _read(
                model.params,
                model.config,
                shard_rows(model.mesh, tokens),
                shard_rows(model.mesh, read),
                sites=tuple(site.as_stream() for site in sites),
            )
            yield chunk, to_host(states)[:, : len(chunk)]


@partial(jax.jit, static_argnames=("config", "sites"))
def _read(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    read: Int[Array, " B"],
    *,
    sites: tuple[Site, ...],
) -> Float[Array, "s B D"]:
    """One scan up to the deepest site; each layer keeps the B read positions only."""

    def pick(_: str, value: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return jnp.take_along_axis(value, read[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    context = make_context(config, jnp.arange(tokens.shape[1])[None])
    depth = max(site.depth(config.n_layers) for site in sites)
    _, [found] = run_and_read(params, config, embed(params, config, tokens), context, depth, [(sites, pick)])
    return jnp.stack([found[site] for site in sites])
