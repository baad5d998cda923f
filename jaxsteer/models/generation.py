"""Many prompts continued: which rows are decoded together, with how much room, and what they have so far.

Prompts of alike length share a compiled program (``padding.bucket``); equal prompts are run once.

Letters: B rows, P distinct prompts, U prompt length (left-padded), M slots for new tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.decoding import NOT_FINITE, Batch, State, decide, decode, grow, start
from jaxsteer.models.log_probs import not_finite
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.roles import Rendered, stack_rendered, unlabelled
from jaxsteer.models.sampling import Decoding, make_sampling
from jaxsteer.models.sharding import require_memory, shard_rows
from jaxsteer.models.taps import Intervention, checked
from jaxsteer.ranges import COUNT

NO_TOKEN = -1
"""Stands in results where a row had ended already."""
_FIRST_SLOTS = 64
"""Room that decoding starts with; it doubles as often as rows need it."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a batch of rows has decoded so far."""

    rows: Int[np.ndarray, " B"]
    """Which rows of the call these are: row ``i * samples + j`` is sample j of prompt i."""
    tokens: Int[np.ndarray, "B M"]
    """``NO_TOKEN`` after a row's end."""
    length: Int[np.ndarray, " B"]
    done: Bool[np.ndarray, " B"]


def generate_tokens(
    model: Model,
    prompts: Sequence[Int[np.ndarray, " _"] | Rendered],
    decoding: Decoding,
    *,
    samples: int = 1,
    edits: Intervention | None = None,
    end: Callable[[Int[np.ndarray, " n"]], int | None] | None = None,
    every: int | None = None,
    batch: int = 64,
) -> Iterator[Progress]:
    """Continue prompts of token ids; yields each batch of rows every ``every`` tokens and when it is done.

    Prompts that are ``Rendered`` tell edits whose each token is; what is decoded is the assistant's.

    Stop strings need ``end``: a function that is shown the tokens of a row, every ``every`` tokens, and says how many
    of them the row ends after (None: it goes on).

    Equal prompts (and the samples of one) are run once. At most ``batch`` rows are decoded at a time, those with
    prompts of alike length together; neither this nor ``every`` changes a token. Edits whose arrays differ per row say
    so by an attribute ``rows``: then all rows are decoded at once, in their order, each with its own prompt. Raises
    ``UserError``, before any work, for what does not fit the model.
    """
    rendered = [prompt if isinstance(prompt, Rendered) else unlabelled(prompt) for prompt in prompts]
    _check(model, [prompt.ids for prompt in rendered], samples=samples, batch=batch)
    count, own = len(prompts) * samples, None if edits is None else edits.rows
    if own is not None and own != count:
        raise UserError(f"The edits are made for {own} rows; {len(prompts)} prompts x {samples} samples are {count}.")
    edits = checked(edits, model.config, own)
    plans = _plan(rendered, samples, batch) if own is None else [_every_row(count, samples)]
    return (
        progress for plan in plans for progress in _decode_batch(model, rendered, plan, decoding, edits, end, every)
    )


def _check(model: Model, prompts: Sequence[np.ndarray], **counts: int) -> None:
    vocab, longest = len(model.params.embed), model.config.max_positions - 1
    for name, value in counts.items():
        if why := COUNT.refusal(value):
            raise UserError(f"{name} {why}.")
    for i, ids in enumerate(prompts):
        if not 1 <= len(ids) <= longest:
            raise UserError(
                f"Prompt {i} has {len(ids)} tokens. This model's positions end at {longest + 1}, so a prompt may have "
                f"1 to {longest} tokens if at least one is to follow."
            )
        if min(ids) < 0 or max(ids) >= vocab:
            raise UserError(
                f"Prompt {i} holds token ids from {min(ids)} to {max(ids)}; they must lie in 0 ... {vocab - 1}. Do "
                f"they come from this model's tokenizer?"
            )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One batch: its prompts, which of them each group continues, the rows of each group."""

    prompts: list[int]
    groups: list[int]
    rows: list[list[int]]


def _every_row(count: int, samples: int) -> _Plan:
    return _Plan([row // samples for row in range(count)], list(range(count)), [[row] for row in range(count)])


def _plan(prompts: Sequence[Rendered], samples: int, batch: int) -> list[_Plan]:
    """Batches of at most ``batch`` rows. All groups have one size, which divides the number of rows of every prompt."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        key = *map(int, prompt.ids), *map(int, prompt.role), *map(int, prompt.turn)
        rows.setdefault(key, []).extend(range(i * samples, (i + 1) * samples))
    common = math.gcd(*map(len, rows.values()))
    size = max((d for d in range(1, min(common, batch) + 1) if common % d == 0), default=1)
    groups = [
        (members[0] // samples, members[i : i + size])
        for _, members in sorted(rows.items(), key=lambda item: len(item[0]))
        for i in range(0, len(members), size)
    ]
    plans = []
    for i in range(0, len(groups), batch // size):
        held = groups[i : i + batch // size]
        distinct = list(dict.fromkeys(prompt for prompt, _ in held))
        plans.append(_Plan(distinct, [distinct.index(prompt) for prompt, _ in held], [group for _, group in held]))
    return plans


def _decode_batch(
    model: Model,
    prompts: Sequence[Rendered],
    plan: _Plan,
    decoding: Decoding,
    edits: Intervention | None,
    end: Callable[[np.ndarray], int | None] | None,
    every: int | None,
) -> Iterator[Progress]:
    params, config, mesh = model.params, model.config, model.mesh
    held = [prompts[i] for i in plan.prompts]
    tokens, mask, roles = stack_rendered(held, bucket(max(len(prompt.ids) for prompt in held)), left=True)
    groups, rows = np.asarray(plan.groups, np.int32), np.asarray(plan.rows, np.int32)
    limit = np.minimum(config.max_positions - mask.sum(-1)[groups], decoding.max_new_tokens).repeat(rows.shape[1])
    most, kept = int(limit.max()), rows.size
    if mesh is not None and (edits is None or edits.rows is None):  # rows that end at once fill up the devices
        devices = mesh.shape.get("prompts", 1)
        spare = -len(groups) % (devices // math.gcd(devices, rows.shape[1]))
        groups, rows = np.pad(groups, (0, spare)), np.pad(rows, [(0, spare), (0, 0)])
        limit = np.pad(limit, (0, rows.size - kept))
    ends: dict[int, int] = {}

    def look(state: State) -> tuple[State, Progress]:
        """What there is on the device, and the rows ended that ``end`` wants to end."""
        tokens, length, done = (np.array(a[:kept]) for a in jax.device_get((state.tokens, state.length, state.done)))
        if (tokens == NOT_FINITE).any():
            raise UserError(not_finite(edits.label if edits is not None else ""))
        ask = end or (lambda made: None)
        found = {row: ask(tokens[row, : length[row]]) for row in range(kept) if row not in ends}
        new = {row: n for row, n in found.items() if n is not None}
        if not done[list(new)].all():
            ended = np.isin(np.arange(rows.size), list(new)) | np.pad(done, (0, rows.size - kept), constant_values=True)
            state = dataclasses.replace(state, done=shard_rows(mesh, ended))
        ends.update(new)
        for row, n in ends.items():
            length[row], done[row] = n, True
        tokens = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, NO_TOKEN)
        return state, Progress(rows.ravel()[:kept], tokens, length, done)

    spread = partial(shard_rows, mesh)
    numbers = rows.ravel() // (1 if edits is None else edits.together)
    arrays = dict(tokens=tokens, mask=mask, groups=groups, rows=numbers, limit=limit.astype(np.int32))
    known = edits is not None and any(prompt.turns for prompt in prompts)
    placed = Batch(
        **{name: spread(array) for name, array in arrays.items()}, roles=jax.tree.map(spread, roles) if known else None
    )
    slots, sampling = min(_FIRST_SLOTS, bucket(most)), make_sampling(model, decoding)

    def make_room(slots: int) -> None:
        """Refuse rows whose keys and values, and their logits, do not fit."""
        keys = 2 * config.n_layers * config.n_kv_heads * config.d_head * params.embed.dtype.itemsize
        needed = rows.size * (slots * keys + 4 * config.vocab_size)
        require_memory(f"Decoding {rows.size:,} rows at a time", needed, mesh, "choose a smaller batch.")

    make_room(slots)
    of_rows = edits
    if edits is not None and edits.conditional:
        edits = decide(params, config, placed, edits)
        # Without edits where all gates are closed: the same program, and so the same bits, as ever.
        edits = None if edits.neutral else edits
        of_rows = edits and edits.of_rows(placed.groups.repeat(rows.shape[1]))
    prefix, state = start(params, config, placed, sampling, edits, slots=slots, mesh=mesh)
    state, progress = look(state)
    while not progress.done.all():
        if every is not None:
            yield progress
        goal = int(progress.length.max()) + (every or most)
        while not progress.done.all() and (length := int(progress.length.max())) < goal:
            if length == state.tokens.shape[1]:
                make_room(2 * length)
                state = grow(state, slots=2 * length, mesh=mesh)
            state = decode(params, config, prefix, state, of_rows, np.int32(goal - length))
            state, progress = look(state)
    yield progress
