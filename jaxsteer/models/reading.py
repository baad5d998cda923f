"""Reading the residual stream of many token rows: at one position, in the mean over some, or along vectors at all of
them; in few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, run_and_read, scan_blocks
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import KINDS, Site, find_sites, layers_by_kind
from jaxsteer.models.taps import NO_TAP, Intervention, make_where
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
    reads: Int[np.ndarray, " n"]
    | Int[np.ndarray, "n p"]
    | Sequence[Bool[np.ndarray, " _"] | Float[np.ndarray, "*p _"]],
    sites: Sequence[Site],
    *,
    batch_size: int = BATCH,
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "s b ..."]]]:
    """Yield (row numbers, float32 streams [s, b, D] at ``sites`` read from each row), every row exactly once.

    ``reads`` are one position for each row, or p of them (then streams are [s, b, p, D]), or for each row a mask over
    its tokens, whose mean is read, or weights [T] or [p, T] of its tokens, whose sum is. Sites may be any of one width;
    their heads are joined. The mean over the last response of conversations ``c`` in token space
    (``prompts.encode_turns``)::

        read_rows(model, [r.ids for r in c], [r.mask("assistant", turns=[-1]) for r in c], sites)

    Rows come ordered by length. They are padded on the right, which a causal model cannot see from where it is read.
    Raises ``UserError`` for a row longer than the model's positions, and for masks that do not fit or select nothing.
    """
    if len(reads) != len(rows):
        raise UserError(f"{len(reads)} reads were given for {len(rows)} rows: give one for each")
    places = np.asarray(reads, np.int32) if isinstance(reads, np.ndarray) and reads.dtype.kind in "iu" else None
    weights = [] if places is not None else [*map(_weights, rows, reads)]
    for chunk, tokens in batches(model, rows, batch_size):
        if places is not None:
            read = np.zeros((batch_size, *places.shape[1:]), np.int32)
            read[: len(chunk)] = places[chunk]
        else:
            read = np.zeros((batch_size, *weights[0].shape[:-1], tokens.shape[1]), np.float32)
            for at, number in enumerate(chunk):
                read[at, ..., : len(rows[number])] = weights[number]
        states = read_batch(
            model.params,
            model.config,
            shard_rows(model.mesh, tokens),
            shard_rows(model.mesh, read),
            sites=tuple(site.as_stream() for site in sites),
        )
        yield chunk, to_host(states)[:, : len(chunk)]


def read_along(
    model: Model,
    rows: Sequence[np.ndarray],
    vectors: Float[np.ndarray, "s k D"],
    sites: Sequence[Site],
    *,
    edits: Intervention | None = None,
    batch_size: int = BATCH,
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "s k b T"]]]:
    """Yield (row numbers, float32 inner products of the stream with k ``vectors`` of each site, at every token).

    T is a padded length; what stands behind a row's own tokens means nothing. Only the products leave the devices, so
    that whole conversations cost as little as one mean. ``edits`` act on all of a row, which counts as prompt. Every
    row comes exactly once, ordered by length. Raises ``UserError`` for a row longer than the model's positions.
    """
    along = np.asarray(vectors, np.float32)
    for chunk, tokens in batches(model, rows, batch_size):
        mask = np.zeros(tokens.shape, bool)
        for at, number in enumerate(chunk):
            mask[at, : len(rows[number])] = True
        found = _along(
            model.params,
            model.config,
            shard_rows(model.mesh, tokens),
            shard_rows(model.mesh, mask),
            along,
            edits,
            sites=tuple(sites),
        )
        yield chunk, to_host(found)[:, :, : len(chunk)]


def batches(
    model: Model, rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "B T"]]]:
    """Numbers of the rows of every batch, and their tokens, padded on the right to one of few shapes; by length.

    Raises ``UserError`` for a row longer than the model's positions.
    """
    longest = max((len(row) for row in rows), default=0)
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
            padding = [rows[0][:0]] * (batch_size - len(chunk))
            yield chunk, pad_rows([rows[number] for number in chunk] + padding, length)[0]


def _weights(row: np.ndarray, read: np.ndarray) -> Float[np.ndarray, "*p T"]:
    """Weights of a row's tokens; those of a mask sum to 1."""
    if np.shape(read)[-1:] != np.shape(row) or (np.asarray(read).dtype == bool and not np.any(read)):
        raise UserError(
            f"a row of {len(row)} tokens cannot be read by a mask of shape {list(np.shape(read))} with "
            f"{int(np.sum(read))} True: give one entry for each token, and at least one token to read"
        )
    return np.asarray(read, np.float32) / (np.sum(read) if np.asarray(read).dtype == bool else 1)


@partial(jax.jit, static_argnames=("config", "sites"))
def read_batch(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    read: Int[Array, "B ..."] | Float[Array, "B *p T"],
    *,
    sites: tuple[Site, ...],
) -> Float[Array, "s B ... D"]:
    """One scan up to the deepest site; each layer keeps what is read of B rows only."""

    def pick(_: str, value: Float[Array, "B T ..."]) -> Float[Array, "B ... D"]:
        value = value.reshape(*value.shape[:2], -1)
        if jnp.issubdtype(read.dtype, jnp.floating):
            return jnp.einsum("b...t,btd->b...d", read, value.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        found = jnp.take_along_axis(value, read.reshape(len(read), -1)[:, :, None], axis=1)
        return found.reshape(*read.shape, -1).astype(jnp.float32)

    context = make_context(config, jnp.arange(tokens.shape[1])[None])
    depth = max(site.depth(config.n_layers) for site in sites)
    x = embed(params, config, tokens, context.positions)
    _, [found] = run_and_read(params, config, x, context, depth, [(sites, pick)])
    return jnp.stack([found[site] for site in sites])


@partial(jax.jit, static_argnames=("config", "sites"))
def _along(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    vectors: Float[Array | np.ndarray, "s k D"],
    edits: Intervention | None,
    *,
    sites: tuple[Site, ...],
) -> Float[Array, "s k B T"]:
    """One scan up to the deepest site; each layer keeps its products with the vectors of all its sites only."""

    def product(value: Float[Array, "B T D"], vectors: Float[Array, "k D"]) -> Float[Array, "k B T"]:
        return jnp.einsum("btd,kd->kbt", value.astype(jnp.float32), vectors, precision=lax.Precision.HIGHEST)

    tap = NO_TAP if edits is None else edits.tap(make_where(tokens, jnp.arange(tokens.shape[1])[None], mask))
    context = make_context(config, jnp.arange(tokens.shape[1])[None])
    depth = max(site.depth(config.n_layers) for site in sites)
    x = embed(params, config, tokens, context.positions, tap)
    own = {
        kind: jnp.zeros((depth, *vectors.shape[1:])).at[jnp.asarray(layers)].set(_of_kind(vectors, sites, kind, layers))
        for kind, layers in layers_by_kind(sites).items()
        if KINDS[kind].in_block
    }
    keep = [
        Keep((kind,), lambda value, own, kind=kind: product(value, own[kind]), layers_by_kind(sites)[kind])
        for kind in own
    ]
    _, kept = scan_blocks(params, config, x, context, 0, depth, tap=tap, per_layer=own, keep=keep)
    found = {
        Site(layer, kind): one
        for kind, every in zip(own, kept, strict=True)
        for layer, one in zip(layers_by_kind(sites)[kind], every, strict=True)
    }
    embedded = {site: product(x, vectors[at]) for at, site in enumerate(sites) if site not in found}
    return jnp.stack([(found | embedded)[site] for site in sites])


def _of_kind(vectors: Array | np.ndarray, sites: tuple[Site, ...], kind: str, layers: tuple[int, ...]) -> Array:
    """The vectors at a kind of site, in the order of its layers."""
    return jnp.stack([jnp.asarray(vectors[sites.index(Site(layer, kind))]) for layer in layers])
