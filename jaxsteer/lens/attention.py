"""What heads attend to: statistics over many texts, reduced layer by layer, and chosen patterns as they are.

A query is a token that attends, a key one that is attended to. Every statistic is a mean over a text's queries, and
then over texts:

* entropy of the pattern, in nats, mean distance from query to key, in tokens, and the shares on the first token (BOS,
  where the model has one) and on the previous one; of all queries but the first, which has no choice
* duplicate: share on earlier copies of the query's token, and induction: on the tokens that followed these; of queries
  whose token stood before
* system, user, assistant: share on messages of a role, of all queries behind the first of them; span: on a given text
* the same three of tokens in random order that come twice, of the second time: no other knowledge helps there
  (Olsson et al. 2022, In-context Learning and Induction Heads)

Letters: B rows, T tokens, N query heads, L layers, S statistics, n texts.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.files import write_bytes
from jaxsteer.lens.attention_result import AttentionStatistics, statistic
from jaxsteer.lens.texts import Text, rows_of_texts
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, ready_for, scan_blocks
from jaxsteer.models.log_probs import not_finite
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.reading import BATCH, batches
from jaxsteer.models.roles import ASSISTANT, SYSTEM, USER, Rendered, stack_rendered, unlabelled
from jaxsteer.models.run import capture
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import Site
from jaxsteer.models.taps import Intervention, checked, make_where, tap_of
from jaxsteer.models.transformer import embed, make_context, positions_of
from jaxsteer.processes import is_first, to_host
from jaxsteer.ranges import CountFrom0, Seed, check_ranges

NAMES = ("entropy", "distance", "first", "previous", "duplicate", "induction", "system", "user", "assistant", "span")
REPEATED = ("previous", "duplicate", "induction")
"""Statistics that are also told of repeated random tokens."""
_HELD = 1 << 26
"""Numbers of one layer's patterns that are held at once: 256 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is read, and on what."""

    span: str = ""
    """Also tell the share on this text (a prompt, a name), which every text must contain."""
    repeated: CountFrom0 = 16
    """Rows of random tokens that come twice; 0 for none."""
    length: int = 48
    """Random tokens of such a row, before they come again."""
    seed: Seed = 0
    """Of the random tokens."""
    batch: int = BATCH
    """Rows at once; fewer of long texts."""


@struct.dataclass
class _Batch:
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    keys: Bool[Array, "B 4 T"]
    """Tokens of the system message, the user's, the assistant's, and of the span."""
    queries: Bool[Array, "B T"]
    """Tokens whose attention counts."""


def attention_statistics(
    model: Model,
    texts: Sequence[Text],
    options: AttentionOptions = AttentionOptions(),
    *,
    edits: Intervention | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AttentionStatistics:
    """Statistics of every head's attention on ``texts``, and on repeated random tokens.

    Only numbers per text and head leave a layer: patterns of one layer are held at a time. ``progress`` is called with
    (texts done, of how many). Raises ``UserError`` for texts that do not fit the model, a span that a text does not
    contain, random tokens that do not fit, edits of the cache, and attention that is not finite.
    """
    check_ranges(options)
    rows = rows_of_texts(model, texts)
    edits = checked(edits, model.config, None)
    if edits is not None and edits.on_cache:
        raise UserError(
            "edits of the cache change what is attended to between texts and cache: they have no one pattern"
        )
    spans = [_span(model, row, text, options.span) for row, text in zip(rows, texts, strict=True)]
    values, uniform = _over(model, rows, spans, None, options, edits, progress)
    statistics = [statistic(name, values[..., i], uniform[:, i]) for i, name in enumerate(NAMES)]
    if options.repeated:
        twice, second = _repeated(model, options)
        values, uniform = _over(model, twice, None, second, options, edits, None)
        for name in REPEATED:
            at = NAMES.index(name)
            statistics.append(statistic(f"{name}, repeated", values[..., at], uniform[:, at]))
    return AttentionStatistics(
        model=model.name, texts=len(rows), tokens=sum(len(row.ids) for row in rows), statistics=tuple(statistics),
        repeated=options.repeated, span=options.span, edits="" if edits is None else edits.label,
    )  # fmt: skip


def _over(
    model: Model,
    rows: Sequence[Rendered],
    spans: Sequence[np.ndarray] | None,
    queries: Sequence[np.ndarray] | None,
    options: AttentionOptions,
    edits: Intervention | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Float[np.ndarray, "n L N S"], Float[np.ndarray, "n S"]]:
    """Statistics of every row and head, and of uniform attention; NaN where a row has no query for one."""
    config = model.config
    values = np.zeros((len(rows), config.n_layers, config.n_heads, len(NAMES)))
    uniform = np.zeros((len(rows), len(NAMES)))
    longest = max(len(row.ids) for row in rows)
    batch = max(1, min(options.batch, _HELD // (config.n_heads * longest * longest)))
    done = 0
    for chunk, tokens in batches(model, [row.ids for row in rows], batch):
        here = [rows[number] for number in chunk]
        padding = [unlabelled(np.zeros(0, np.int32))] * (batch - len(here))
        _, mask, roles = stack_rendered([*here, *padding], tokens.shape[1])
        keys = np.stack(
            [mask & (np.asarray(roles.role) == role) for role in (SYSTEM, USER, ASSISTANT)] + [mask & False], 1
        )
        counted = mask.copy()
        for at, number in enumerate(chunk):
            length = len(rows[number].ids)
            if spans is not None:
                keys[at, 3, :length] = spans[number]
            if queries is not None:
                counted[at, :length] &= queries[number]
        placed = [shard_rows(model.mesh, array) for array in (tokens, mask, keys, counted)]
        found, flat, sums = to_host(_statistics(model.params, config, _Batch(*placed), edits))  # type: ignore[arg-type, call-arg]
        if not np.isfinite(sums).all() or np.abs(sums - 1)[:, : len(chunk)].max() > 0.05:
            raise UserError(not_finite("" if edits is None else edits.label))
        values[chunk] = np.moveaxis(found, 0, 1)[: len(chunk)]
        uniform[chunk] = flat[: len(chunk)]
        done += len(chunk)
        if progress is not None:
            progress(done, len(rows))
    return values, uniform


@partial(jax.jit, static_argnames=("config",))
def _statistics(
    params: Params, config: ModelConfig, batch: _Batch, edits: Intervention | None
) -> tuple[Float[Array, "L B N S"], Float[Array, "B S"], Float[Array, "L B"]]:
    """Statistics, those of uniform attention, and for every layer and row the sum of weights farthest from 1."""
    positions = positions_of(batch.mask)
    where = make_where(batch.tokens, positions, batch.mask)
    edits, context = ready_for(params, config, edits, where, make_context(config, positions, batch.mask))
    tap = tap_of(edits, where)
    steps = jnp.arange(batch.tokens.shape[1])
    behind = steps[:, None] - steps[None]
    pairs = batch.mask[:, :, None] & batch.mask[:, None, :] & (behind >= 0)
    same = pairs & (batch.tokens[:, :, None] == batch.tokens[:, None, :]) & (behind > 0)
    after = jnp.pad(same, ((0, 0), (0, 0), (1, 0)))[:, :, :-1] & (behind > 0)
    later = batch.queries & (steps > 0)
    seen = (jnp.cumsum(batch.keys, -1) > 0) & ~batch.keys & batch.queries[:, None]
    counts = [later, later, later, later, batch.queries & same.any(-1), batch.queries & after.any(-1)]
    count = jnp.concatenate([jnp.stack(counts, 1), seen], 1).astype(jnp.float32)  # [B, S, T]
    total = count.sum(-1)

    def reduce(p: Float[Array, "B N T T"]) -> Float[Array, "B N S"]:
        p = p.astype(jnp.float32)
        dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        shares = [
            -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1),
            dot("bnqk,qk->bnq", p, behind.astype(jnp.float32)),
            p[..., 0],
            jnp.pad(jnp.diagonal(p, -1, -2, -1), ((0, 0), (0, 0), (1, 0))),
            dot("bnqk,bqk->bnq", p, same.astype(jnp.float32)),
            dot("bnqk,bqk->bnq", p, after.astype(jnp.float32)),
        ]
        by_key = dot("bnqk,bsk->bnsq", p, batch.keys.astype(jnp.float32))
        by_query = jnp.concatenate([jnp.stack(shares, 2), by_key], 2)
        return dot("bnsq,bsq->bns", by_query, count) / jnp.where(total > 0, total, jnp.nan)[:, None]

    def pick(p: Float[Array, "B N T T"], _: Array | None) -> tuple[Array, Array]:
        sums = jnp.where(batch.mask[:, None], p.astype(jnp.float32).sum(-1), 1.0)
        worst = jnp.abs(sums - 1).max((1, 2))
        return reduce(p), 1 + jnp.where(jnp.isnan(sums).any((1, 2)), jnp.nan, worst)

    keep = [Keep(("attn.hook_pattern",), pick)]
    x = embed(params, config, batch.tokens, context.positions, tap)
    _, [(found, sums)] = scan_blocks(params, config, x, context, 0, config.n_layers, tap=tap, keep=keep)
    even = pairs / jnp.maximum(pairs.sum(-1, keepdims=True), 1)
    return found, reduce(even[:, None])[:, 0], sums


def _span(model: Model, row: Rendered, text: Text, span: str) -> Bool[np.ndarray, " T"]:
    """The tokens of a row that stand for a text in it, wherever it occurs."""
    found = np.zeros(len(row.ids), bool)
    if not span:
        return found
    whole = row.text or str(text)
    encoded = model.tokenizer(whole, add_special_tokens=not row.text, return_offsets_mapping=True)
    if encoded["input_ids"] != row.ids.tolist():
        raise UserError("this tokenizer does not tell which letters its tokens stand for: leave out the span")
    at = whole.find(span)
    if at < 0:
        raise UserError(f"the span {span!r} is not in the text {whole[:80]!r}: every text must contain it")
    while at >= 0:
        found |= [a < at + len(span) and b > at for a, b in encoded["offset_mapping"]]
        at = whole.find(span, at + len(span))
    return found


def _repeated(model: Model, options: AttentionOptions) -> tuple[list[Rendered], list[Bool[np.ndarray, " T"]]]:
    """Rows of random tokens that come twice, behind a BOS where the model has one, and where the second time is."""
    from jaxsteer.prompts import bos_id

    bos = bos_id(model.tokenizer)
    special = {int(i) for i in model.tokenizer.all_special_ids}
    usable = np.asarray([i for i in range(min(len(model.tokenizer), model.config.vocab_size)) if i not in special])
    start = [] if bos is None else [bos]
    length = len(start) + 2 * options.length
    if length > model.config.max_positions or options.length > len(usable):
        raise UserError(
            f"{options.length} random tokens that come twice make rows of {length} tokens: the model has "
            f"{model.config.max_positions} positions and {len(usable)} usable tokens"
        )
    rng, rows = np.random.default_rng([options.seed, 4]), []
    for _ in range(options.repeated):
        drawn = rng.choice(usable, options.length, replace=False)
        rows.append(unlabelled(np.asarray([*start, *drawn, *drawn], np.int32)))
    second = np.arange(length) >= len(start) + options.length
    return rows, [second] * len(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns:
    """Attention of one text in some layers."""

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    weights: Float[np.ndarray, "l N T T"]
    """float32 by layer, head, query and key; every row of keys sums to 1."""

    def write(self, path: Path) -> Path:
        """Write a NumPy file (.npz) with arrays "weights", "layers" and "tokens". Returns its path.

        Raises ``UserError`` for another ending.
        """
        if path.suffix != ".npz":
            raise UserError(f"{path}: patterns are written as a NumPy file, which ends in .npz")
        out = io.BytesIO()
        np.savez_compressed(out, weights=self.weights, layers=np.asarray(self.layers), tokens=np.asarray(self.tokens))
        if is_first():
            write_bytes(path, out.getvalue())
        return path


def attention_patterns(
    model: Model, text: Text, layers: Sequence[int], *, edits: Intervention | None = None
) -> Patterns:
    """The attention of every head of some layers in one text.

    Raises ``UserError`` for a layer that the model does not have and a text that does not fit it.
    """
    [row] = rows_of_texts(model, [text])
    if not layers or any(not 0 <= layer < model.config.n_layers for layer in layers):
        raise UserError(f"layers must be some of 0 to {model.config.n_layers - 1}, got {list(layers)}")
    names = [Site(layer, "attn.hook_pattern").name for layer in layers]
    found = to_host(capture(model, row.ids[None], names, edits=edits))
    return Patterns(
        tokens=tuple(model.tokenizer.decode([int(token)]) for token in row.ids),
        layers=tuple(layers),
        weights=np.stack([np.asarray(found[name][0], np.float32) for name in names]),
    )
