"""What prompts are scored against: contexts with their cached beginnings, a token mask, what the objective reads.

Letters: C contexts, O openings (texts before the slot: C, or 1 where all contexts have the same), S prompt length,
A tokens after the slot, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.attention import Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import prefill
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.params import Params
from jaxsteer.objectives import Needs
from jaxsteer.objectives.reads import Target
from jaxsteer.prompts.slots import Slots

COMBINE = ("mean", "worst", "soft-min")
ROWS = 512
"""Rows (candidates times contexts) scored at once by default: on a CPU larger batches only leave its caches."""


@dataclasses.dataclass(frozen=True)
class Combination:
    """How an objective's values in the contexts become one: their "mean", the "worst" of them, or their "soft-min"."""

    how: str = "mean"
    temperature: float = 1.0
    """Of "soft-min", in units of the objective. It lies between the other two: near the mean where the temperature is
    large against the differences between contexts, near the worst where it is small."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for another name or a temperature that is not above 0."""
        if self.how not in COMBINE or not self.temperature > 0:
            raise UserError(
                f"combine must be one of {', '.join(COMBINE)}, temperature above 0: got {self.how!r}, "
                f"{self.temperature}"
            )

    def __call__(self, scores: Float[Array, "C M"], weight: Float[Array, " C"]) -> Float[Array, " M"]:
        """One float32 value per candidate, contexts weighted by ``weight`` (the worst is the worst of all)."""
        scores = scores.astype(jnp.float32)
        if self.how == "worst":
            return jnp.min(scores, axis=0)
        if self.how == "soft-min":
            share = (weight / jnp.sum(weight))[:, None]
            return -self.temperature * jax.nn.logsumexp(-scores / self.temperature, axis=0, b=share)
        return jnp.sum(weight[:, None] * scores, axis=0)


MEAN = Combination()


class TokenMask(NamedTuple):
    """The tokens that a prompt may hold: in any position, and as its first token."""

    allowed: Bool[np.ndarray, " V"]
    first: Bool[np.ndarray, " V"]
    """Counts where ``allowed`` holds, too."""


@struct.dataclass
class Task:
    """What the candidates of one program are scored against; a pytree, so that a jitted step takes it as argument."""

    prefix: Prefix
    """Of the O openings."""
    last_hidden: Float[Array, "O D"]
    """Stream of the last token before the slot: predicts the slot's first token."""
    after: Int[Array, "C A"]
    after_mask: Bool[Array, "C A"]
    read_index: Int[Array, " C"]
    """Where the objective reads, counted from the slot's first token."""
    target: Target | None
    """Per context, the answer whose probability is asked for, at the end of ``after``; counted like ``read_index``."""
    weight: Float[Array, " C"]
    allowed: Bool[Array, " V"]
    allowed_first: Bool[Array, " V"]
    """Tokens that may stand first in the slot (where the text has a space before it, they bring that space)."""
    ids: Int[Array, " n"]
    """The allowed tokens, and ``first_ids`` those allowed first, as lists to draw from."""
    first_ids: Int[Array, " n1"]
    config: ModelConfig = struct.field(pytree_node=False)
    needs: Needs = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)
    """Tokens of a prompt, S; the most of them where prompts vary."""
    least: int = struct.field(pytree_node=False)
    """The fewest tokens of a prompt; S where all have the same."""
    batch: int = struct.field(pytree_node=False)
    """Candidates scored at once (each in all contexts)."""
    scores_first: bool = struct.field(pytree_node=False)
    """Whether something precedes the slot, so that its first token has a probability."""
    slot_once: bool = struct.field(pytree_node=False)
    """Whether a candidate's slot is run once for all contexts; O is 1 then."""
    reads_last: bool = struct.field(pytree_node=False)
    """Whether nothing before the slot's last token is read, in any context."""
    combine: Combination = struct.field(pytree_node=False, default=MEAN)
    draft: Any = None
    """A ``probe_sampling.Draft``: the small model that chooses which children are scored."""

    @property
    def contexts(self) -> int:
        """Number of contexts C."""
        return self.after.shape[0]

    @property
    def varies(self) -> bool:
        """Whether prompts may differ in length."""
        return self.least < self.length

    @property
    def opening_weight(self) -> Float[Array, " O"]:
        """Weight of every opening in the cross-entropy."""
        return jnp.sum(self.weight, keepdims=True) if self.slot_once else self.weight


def make_task(
    params: Params,
    config: ModelConfig,
    slots: Slots,
    *,
    needs: Needs,
    allowed: Bool[np.ndarray, " V"] | TokenMask,
    batch: int | None = None,
    combine: Combination = MEAN,
    least: int | None = None,
) -> Task:
    """Check that everything fits, run what stands before the slot once and keep its keys and values.

    Args:
        params: The model's parameters.
        config: Its config.
        slots: The ids around the slot and the read position of every context.
        needs: What the objective reads (``objectives.needs``).
        allowed: The token mask; a ``TokenMask`` where the slot's first token has one of its own.
        batch: Candidates scored at once (default: about ``ROWS`` rows of a candidate in one context).
        combine: What becomes of the objective's values in the contexts.
        least: The fewest tokens of a prompt; the most are ``slots.length`` (default: exactly as many).

    Raises:
        UserError: a context with its prompt is longer than the model's positions, a read position lies outside of slot
            and tail, too few tokens are allowed, or ``least`` is no length.
    """
    mask = allowed if isinstance(allowed, TokenMask) else TokenMask(allowed, allowed)
    first = mask.allowed & mask.first
    least = slots.length if least is None else least
    _check_fit(config, slots, mask.allowed, first, least)
    contexts, tails, target = len(slots), row_tails(slots), make_target(slots)
    slot_once = _same_before_and_unread(slots, needs, target)
    before = slots.before[:1] if slot_once else slots.before
    opened = pad_rows(before, max(1, *map(len, before)), left=True)
    prefix, hidden = jax.jit(prefill, static_argnums=1)(params, config, *map(jnp.asarray, opened))
    after, after_mask = pad_rows(tails)
    return Task(
        prefix=prefix,
        last_hidden=hidden[:, -1],
        after=jnp.asarray(after),
        after_mask=jnp.asarray(after_mask),
        read_index=jnp.asarray(slots.read_index, jnp.int32),
        target=target,
        weight=jnp.full((contexts,), 1.0 / contexts, jnp.float32),
        allowed=jnp.asarray(mask.allowed),
        allowed_first=jnp.asarray(first),
        ids=jnp.asarray(np.flatnonzero(mask.allowed), jnp.int32),
        first_ids=jnp.asarray(np.flatnonzero(first), jnp.int32),
        config=config,
        needs=needs,
        length=slots.length,
        least=least,
        batch=batch or max(1, ROWS // contexts),
        scores_first=bool(all(len(b) for b in before)),
        slot_once=slot_once,
        reads_last=min(map(int, slots.read_index)) >= slots.length - 1,
        combine=combine,
    )


def _check_fit(
    config: ModelConfig, slots: Slots, allowed: Bool[np.ndarray, " V"], first: Bool[np.ndarray, " V"], least: int
) -> None:
    length = slots.length
    if not 1 <= least <= length:
        raise UserError(f"prompts of {least} to {length} tokens: expected a range of 1 or more, smaller number first")
    longest = max(len(b) + length + len(a) for b, a in zip(slots.before, slots.after, strict=True))
    if longest > config.max_positions:
        raise UserError(
            f"the longest context needs {longest} tokens with its {length}-token prompt, but the model has "
            f"{config.max_positions} positions: shorten the questions or the prompt"
        )
    for index, tail in zip(map(int, slots.read_index), slots.after, strict=True):
        if not length - least <= index < length + len(tail):
            raise UserError(f"read position {index} lies outside of the {length} slot and {len(tail)} tail tokens")
    if min(int(allowed.sum()), int(first.sum())) < 2:
        raise UserError(
            f"{int(allowed.sum())} tokens are allowed, {int(first.sum())} of them at the start of the prompt; a search "
            "needs at least 2 of both: loosen the token filter"
        )


def _same_before_and_unread(slots: Slots, needs: Needs, target: Target | None) -> bool:
    """Whether the slot can be run once for all contexts: the same text stands before it, and nothing in it is read."""
    looked_at = [*map(int, slots.read_index), *([] if target is None else target.start.tolist())]
    unread = min(looked_at) >= slots.length and not needs.spans
    return len(slots) > 1 and unread and all(np.array_equal(b, slots.before[0]) for b in slots.before)


def row_tails(slots: Slots) -> list[np.ndarray]:
    """Per context, the ids to run after the slot: up to the last one that is read or predicts a target token."""
    if slots.target:
        return [np.concatenate([c, t[:-1]]) for c, t in zip(slots.closing, slots.target, strict=True)]
    # Tokens behind the read position cannot influence it, and fluency needs the slot alone.
    needed = max(0, int(max(slots.read_index)) + 1 - slots.length)
    return [tail[:needed] for tail in slots.after]


def make_target(slots: Slots) -> Target | None:
    """The slots' target answers, counted from the slot's first token."""
    if not slots.target:
        return None
    ids, mask = map(jnp.asarray, pad_rows(slots.target))
    start = [slots.length - 1 + len(closing) for closing in slots.closing]
    return Target(ids=ids, mask=mask, start=jnp.asarray(start, jnp.int32))
