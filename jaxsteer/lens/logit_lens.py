"""What the stream says at every depth: its values through the final norm and the unembedding, as statistics per token.

A *place* is a site of the stream, or one head of ``attn.hook_result``. One program runs a batch and reads all places:
the states [S, B, T, D] are kept, logits only of a few tokens at a time, so that nothing of size [S, B, T, V] exists.
The stream after the last block is always read and is the model's own output: norm, soft-cap and tied weights are those
of the model (``transformer.unembed``).

Letters: B rows, T tokens, D width, N heads, V vocabulary, S places, n tokens of all texts, k top tokens, c chosen
ones; Z = S + 1, y = c + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.lens.result import Cells, LensReading, ReadText
from jaxsteer.lens.tuned_lens import TunedLens, translated
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import ready_for, run_and_read
from jaxsteer.models.log_probs import VOCABULARY_BLOCK, not_finite
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.params import Params
from jaxsteer.models.roles import Rendered, Roles, stack_rendered
from jaxsteer.models.run import capture
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import FINAL, KINDS, Site, find_sites, resid_site
from jaxsteer.models.taps import Intervention, checked, make_where, tap_of
from jaxsteer.models.transformer import embed, make_context, norm_weight, positions_of, unembed
from jaxsteer.processes import to_host
from jaxsteer.prompts.generate import Prompt, encode_prompts

EVERY = ("hook_embed", "blocks.*.hook_resid_post")
"""The places that are read where nobody says otherwise: the stream before the first block and after every one."""
ROWS = 32
"""Rows of a batch, at most."""
STATES = 1 << 28
"""Bytes of states that a batch may hold, where that leaves it a row."""
HEADS = "attn.hook_result"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a lens looks: a site of the stream, or what one head writes. Hashable."""

    site: Site
    head: int | None = None

    @property
    def name(self) -> str:
        """The site's name, with the number of the head."""
        return self.site.name if self.head is None else f"{self.site.name}[{self.head}]"


def find_places(sites: str | Sequence[str], config: ModelConfig) -> tuple[Place, ...]:
    """The places called ``sites`` (of a site of heads, all heads) in the given order, and last the model's output.

    Raises ``UserError`` for sites that are not in the stream and write nothing into it.
    """
    found: list[Place] = []
    for site in dict.fromkeys(find_sites(sites, config).values()):
        if site.kind == HEADS:
            found += [Place(site, head) for head in range(config.n_heads)]
        elif KINDS[site.kind].stream:
            found.append(Place(site))
        else:
            possible = ", ".join([name for name, kind in KINDS.items() if kind.stream] + [HEADS])
            raise UserError(
                f"no lens reads {site.name!r}: it is neither the residual stream nor what is added to it as it is. "
                f"Expected one of {possible}"
            )
    last = Place(find_sites([resid_site(config.n_layers - 1)], config)[resid_site(config.n_layers - 1)])
    return (*(place for place in found if place != last), last)


def read(
    model: Model,
    texts: Prompt | Sequence[Prompt],
    *,
    sites: str | Sequence[str] = EVERY,
    lens: TunedLens | None = None,
    edits: Intervention | None = None,
    tokens: Sequence[int] = (),
    top: int = 10,
    progress: Callable[[int], None] | None = None,
) -> LensReading:
    """Read every token of ``texts`` at every place, by the logit lens or a tuned one.

    Args:
        texts: texts, conversations or token ids, as ``generate`` takes them: a conversation ends where the assistant is
            to answer. Of one with its answer give ``prompts.encode_turns(..., generation_prompt=False)``.
        sites: sites of the stream, wildcards included ("blocks.*.hook_resid_mid"); "blocks.3.attn.hook_result" reads
            what each head writes as if it were the stream. The model's output is always the last place.
        lens: a tuned lens, for the sites that it has translators of.
        edits: steer the run (``Vectors.edits()``); states are those after them.
        tokens: ids of chosen tokens, whose rank and log-probability is kept at every place.
        top: most likely tokens that are kept.
        progress: gets the number of texts that are done.

    Returns:
        Entropy, KL(output || lens), the top tokens, rank and log-probability of the token that follows and of the
        chosen ones. Nats; ranks from 0.

    Raises:
        UserError: for sites outside the stream, texts that do not fit the model, edits that do not fit or act behind
            the last block, a lens of another model, ids outside the vocabulary.
    """
    places, rows = find_places(sites, model.config), encoded(model, texts)
    chosen = checked_tokens(model, tokens)
    top = _checked_top(top, model.config)
    edits = checked_edits(model, edits)
    along = None if lens is None else lens.along(model, places)
    found: list[Any] = [None] * len(rows)
    done = 0
    for numbers, [batch] in batches(model, [rows], len(places)):
        stats = to_host(_read(
            model.params, model.config, batch, edits, along, chosen, places=places, top=top,
            step=step_of(model.config, batch.tokens.shape),
        ))  # fmt: skip
        for at, number in enumerate(numbers):
            length = len(rows[number].ids)
            found[number] = jax.tree.map(lambda a, at=at, length=length: a[:, at, :length], stats)
        done += len(numbers)
        if progress is not None:
            progress(done)
    cells = _cells(rows, found)
    if not np.isfinite(cells.entropy[-1]).all():
        raise UserError(not_finite("" if edits is None else edits.label))
    return LensReading.of(
        model,
        lens="logit lens" if lens is None else f"tuned lens {lens.name}",
        places=tuple(place.name for place in places),
        texts=tuple(ReadText(tokens=shown(model, row.ids)) for row in rows),
        chosen=tuple(int(token) for token in chosen),
        steered="" if edits is None else edits.label,
        cells=cells,
    )


def site_logits(
    model: Model,
    tokens: Int[np.ndarray, "B T"] | Int[Array, "B T"],
    mask: Bool[np.ndarray, "B T"] | Bool[Array, "B T"] | None = None,
    *,
    sites: str | Sequence[str] = EVERY,
    lens: TunedLens | None = None,
    edits: Intervention | None = None,
) -> dict[str, Float[Array, "B T V"]]:
    """All logits that a lens reads, float32, by place: of a few short texts, where statistics are not enough.

    Those of the last place are the model's own (``jaxsteer.logits``), bit for bit. Arguments and errors as in ``read``.
    """
    places = find_places(sites, model.config)
    if any(place.head is not None for place in places):
        raise UserError("logits of heads are not kept, since they are many: use read, which keeps statistics")
    edits = checked_edits(model, edits)
    along = None if lens is None else lens.along(model, places)
    states = capture(model, tokens, [place.name for place in places], mask, edits=edits)
    logits = {}
    for number, place in enumerate(places):
        own = None if along is None else jax.tree.map(lambda a, number=number: a[number + 1], along)
        logits[place.name] = _logits(model.params, model.config, states[place.name], own)
    return logits


# Texts as batches


@struct.dataclass
class LensRows:
    """Rows on the devices, padded on the right."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    roles: Roles | None = None


def encoded(model: Model, texts: Prompt | Sequence[Prompt]) -> list[Rendered]:
    """Texts in token space. Raises ``UserError`` for none, for empty ones, and for those that the model cannot run."""
    rows = encode_prompts(model, texts, roles=True)
    lengths = [len(row.ids) for row in rows]
    if not min(lengths) or max(lengths) > model.config.max_positions:
        raise UserError(
            f"a lens reads texts of 1 to {model.config.max_positions} tokens, got {min(lengths)} to {max(lengths)}"
        )
    if (most := max(int(row.ids.max()) for row in rows)) >= model.config.vocab_size:
        raise UserError(f"token ids must be below {model.config.vocab_size}, got {most}: are they of this model?")
    return rows


def batches(
    model: Model, rows: Sequence[Sequence[Rendered]], places: int
) -> Iterator[tuple[list[int], list[LensRows]]]:
    """(numbers of the rows, the rows of each list) of every batch: lists of equally many rows that go together.

    Rows of a batch are of similar lengths, in few shapes; its last ones may be copies that nobody reads.
    """
    config, groups = model.config, dict[tuple[int, ...], list[int]]()
    for number, together in enumerate(zip(*rows, strict=True)):
        widths = tuple(min(bucket(len(row.ids)), config.max_positions) for row in together)
        groups.setdefault(widths, []).append(number)
    known = [all(row.turns for row in each) for each in rows]
    each = (places + 1) * config.d_model * model.params.embed.dtype.itemsize
    put = partial(shard_rows, model.mesh)
    for widths, numbers in sorted(groups.items()):
        count = len(numbers) if len(numbers) < 3 else bucket(len(numbers), 2)
        size = min(ROWS, max(1, STATES // (each * sum(widths))), count)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            filled, found = part + part[:1] * (size - len(part)), []
            for some, width, whose in zip(rows, widths, known, strict=True):
                tokens, mask, roles = stack_rendered([some[number] for number in filled], width)
                found.append(LensRows(put(tokens), put(mask), jax.tree.map(put, roles) if whose else None))
            yield part, found


def step_of(config: ModelConfig, shape: tuple[int, ...]) -> int:
    """Tokens of every row whose logits are held at once: a divisor of the rows' length."""
    most = max(1, VOCABULARY_BLOCK // (config.vocab_size * shape[0]))
    return max(step for step in range(1, shape[1] + 1) if shape[1] % step == 0 and step <= most)


def checked_edits(model: Model, edits: Intervention | None) -> Intervention | None:
    """The edits, if a lens can be read under them."""
    edits = checked(edits, model.config, None)
    if edits is not None and not edits.kinds.isdisjoint(FINAL):
        raise UserError(
            "these edits act on the final norm, which a lens uses at every place: it reads runs that are edited in or "
            "before the blocks"
        )
    return edits


def checked_tokens(model: Model, tokens: Sequence[int]) -> Int[np.ndarray, " c"]:
    """The chosen tokens as an array. Raises ``UserError`` for ids outside the vocabulary."""
    chosen = np.asarray(tokens, np.int32).reshape(-1)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= model.config.vocab_size):
        raise UserError(f"tokens must be ids from 0 to {model.config.vocab_size - 1}, got {chosen.tolist()[:8]}")
    return chosen


def _checked_top(top: int, config: ModelConfig) -> int:
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    return min(top, config.vocab_size)


def shown(model: Model, ids: Int[np.ndarray, " n"]) -> tuple[str, ...]:
    """The text of every token alone; a number in brackets where there is none."""
    known = 0 if model.tokenizer is None else len(model.tokenizer)
    return tuple(model.tokenizer.decode([int(i)]) if i < known else f"<{int(i)}>" for i in ids)


# Inside programs


def states_at(
    params: Params, config: ModelConfig, rows: LensRows, edits: Intervention | None, places: Sequence[Place]
) -> Float[Array, "Z B T D"]:
    """The stream after the last block, then what is at every place, in the model's dtype."""
    positions = positions_of(rows.mask)
    where = make_where(rows.tokens, positions, rows.mask, None, rows.roles)
    edits, context = ready_for(params, config, edits, where, make_context(config, positions, rows.mask))
    tap = tap_of(edits, where)
    sites = {place.site for place in places}
    if config.post_norms:
        sites |= {Site(site.layer, "ln1_post.hook_scale") for site in sites if site.kind == HEADS}
    x = embed(params, config, rows.tokens, context.positions, tap)
    x, [found] = run_and_read(params, config, x, context, config.n_layers, [(sorted(sites), lambda _, v: v)], tap=tap)

    def value(place: Place) -> Float[Array, "B T D"]:
        if place.head is None:
            return found[place.site]
        own = found[place.site][:, :, place.head]
        if params.layers.post_attn_norm is None:
            return own
        weight = norm_weight(params.layers.post_attn_norm[place.site.layer], config)
        scale = found[Site(place.site.layer, "ln1_post.hook_scale")]
        return (own / scale * weight).astype(own.dtype)

    return jnp.stack([x, *map(value, places)])


@struct.dataclass
class Statistics:
    """What is kept of every place and token; ranks count the tokens that are more likely."""

    entropy: Float[Array, "S B T"]
    kl: Float[Array, "S B T"]
    top_ids: Int[Array, "S B T k"]
    top_log_probs: Float[Array, "S B T k"]
    ranks: Int[Array, "S B T y"]
    """Of the token that follows, then of the chosen ones."""
    log_probs: Float[Array, "S B T y"]


def inner(a: Float[Array, "... V"], b: Float[Array, "... V"]) -> Float[Array, ...]:
    """Inner products over the vocabulary. On the CPU XLA takes ten times as long for the sum of a product."""
    return jnp.einsum("...v,...v->...", a, b, precision=lax.Precision.HIGHEST)


def over_tokens(states: Any, step: int, one: Callable[[Any], Any]) -> Any:
    """``one`` of ``step`` tokens after the other: of trees of [S, B, step, ...], joined again along the tokens."""
    width = jax.tree.leaves(states)[0].shape[2]

    def part(start: Array) -> Any:
        return one(jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, step, 2), states))

    found = lax.map(part, jnp.arange(0, width, step))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], width, *a.shape[4:]), found)


@partial(jax.jit, static_argnames=("config", "places", "top", "step"))
def _read(
    params: Params,
    config: ModelConfig,
    rows: LensRows,
    edits: Intervention | None,
    along: Any,
    chosen: Int[Array | np.ndarray, " c"],
    *,
    places: tuple[Place, ...],
    top: int,
    step: int,
) -> Statistics:
    """Many parameters: a run, what it is read by, and what is kept."""
    states = states_at(params, config, rows, edits, places)
    following = jnp.pad(rows.tokens[:, 1:], ((0, 0), (0, 1)))
    wanted = jnp.concatenate(
        [following[..., None], jnp.broadcast_to(jnp.asarray(chosen), (*following.shape, len(chosen)))], -1
    )

    def some(part: tuple[Array, Array]) -> Statistics:
        x, [labels] = part
        # The output comes first, by the same code as the places: where they are equal, their KL is 0 and no less.
        first = jnp.zeros(x.shape[1:3] + (config.vocab_size,), jnp.float32)
        numbers = jnp.arange(len(x))

        def place(output: Array, at: tuple[Array, Array, Any]) -> tuple[Array, Statistics]:
            number, x, own = at
            logits = unembed(params, config, translated(x, own))
            log_p = jax.nn.log_softmax(logits)
            output = jnp.where(number == 0, log_p, output)
            values, ids = lax.top_k(log_p, top)
            picked = jnp.take_along_axis(log_p, labels, -1)
            ranks = lax.map(lambda one: (log_p > one[..., None]).sum(-1), jnp.moveaxis(picked, -1, 0))
            return output, Statistics(
                entropy=-inner(jnp.exp(log_p), log_p),
                kl=inner(jnp.exp(output), output - log_p),
                top_ids=ids,
                top_log_probs=values,
                ranks=jnp.moveaxis(ranks, 0, -1),
                log_probs=picked,
            )

        return jax.tree.map(lambda a: a[1:], lax.scan(place, first, (numbers, x, along))[1])

    return over_tokens((states, wanted[None]), step, some)


@partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: ModelConfig, x: Float[Array, "B T D"], own: Any) -> Float[Array, "B T V"]:
    return unembed(params, config, translated(x.astype(params.embed.dtype), own))


def _cells(rows: Sequence[Rendered], found: Sequence[Statistics]) -> Cells:
    """The statistics of all texts, one behind the other."""
    stats = jax.tree.map(lambda *parts: np.concatenate(parts, 1), *found)
    lengths = [len(row.ids) for row in rows]
    last = np.cumsum(lengths) - 1
    log_probs, ranks = stats.log_probs.copy(), stats.ranks.astype(np.int32)
    log_probs[:, last, 0], ranks[:, last, 0] = np.nan, -1
    return Cells(
        ids=np.concatenate([row.ids for row in rows]).astype(np.int32),
        text=np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
        entropy=stats.entropy,
        kl=stats.kl,
        top_ids=stats.top_ids,
        top_log_probs=stats.top_log_probs,
        next_rank=ranks[..., 0],
        next_log_prob=log_probs[..., 0],
        chosen_ranks=ranks[..., 1:],
        chosen_log_probs=log_probs[..., 1:],
    )
