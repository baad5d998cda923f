"""Which tokens an edit touches, as data: ranges of positions, counted without padding, roles, turns and token ids.

Letters: B rows of the batch, R rows of the selector (1 or B), T time, n ranges, k turns, m token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.roles import ASSISTANT, ROLES, TEMPLATE, UNKNOWN
from jaxsteer.models.taps import Where

END = 2**30
"""Later than any position."""
EVERY_TURN, NO_TURN = END, -END
"""In place of a turn."""
ANYBODY, PROMPT, LEADS = range(len(ROLES), len(ROLES) + 3)
"""In place of a role: every token; what stands in the prompt and is not the assistant's; what predicts a token of the
assistant's."""

# Whose tokens (of any of these), and whether position 0 is taken in.
_NAMED: dict[str, tuple[tuple[int, ...], bool]] = {
    "all": ((ANYBODY,), False),
    "every": ((ANYBODY,), True),
    "last": ((ANYBODY,), True),
    "prompt": ((PROMPT,), False),
    "response": ((ASSISTANT,), False),
    "last_and_response": ((LEADS, ASSISTANT), False),
    **{name: ((number,), False) for number, name in enumerate(ROLES)},
}
# (start, counted from the end of the prompt?), (stop, counted from the end of the prompt?)
_WHOLE, _LAST = ((0, False), (END, False)), ((-1, True), (0, True))


@struct.dataclass
class Selector:
    """The union of ranges of positions and of token ids, for all rows (R = 1) or for each (R = B).

    Data, not structure: rows of one batch may select differently, and another selection of the same sizes does not
    recompile. Made by ``select``.
    """

    edges: Int[Array | np.ndarray, "R n 2"]
    """Start and stop (excluded) of every range."""
    from_prompt: Bool[Array | np.ndarray, "R n 2"]
    """Whether the edge counts from the end of the prompt rather than from the first token."""
    roles: Int[Array | np.ndarray, "R n"]
    """Whose tokens in the range: index into ``ROLES``, ``ANYBODY``, ``PROMPT`` or ``LEADS``."""
    include_first: Bool[Array | np.ndarray, " R"]
    """Whether the ranges take in position 0."""
    tokens: Int[Array | np.ndarray, "R m"]
    """Token ids; -1 stands for none."""
    turns: Int[Array | np.ndarray, "R k"]
    """The turns that all this is confined to, negative ones counted from the last; ``EVERY_TURN``; ``NO_TURN``."""
    special: Bool[Array | np.ndarray, " R"]
    """Whether tokens of the template count."""
    needs_roles: bool = struct.field(pytree_node=False, default=False)
    """Whether the rows must be conversations whose roles are known."""

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True where a token is selected. Never on padding. Raises ``UserError`` without the roles that it needs."""
        if self.needs_roles and where.roles is None:
            raise UserError(
                f"Positions like {', '.join(map(repr, ROLES))}, turns and special=False need to know whose each token "
                "is. jaxsteer.generate knows that of conversations; elsewhere give roles=... "
                "(jaxsteer.models.roles.stack_rendered)."
            )
        ends = self.edges + jnp.where(self.from_prompt, where.prompt_length[:, None, None], 0)
        at = where.positions[:, :, None]
        inside = (at >= ends[:, None, :, 0]) & (at < ends[:, None, :, 1])
        kinds = _kinds(where)
        mine = kinds[:, :, None] & (self.roles[:, None, :, None] == jnp.arange(kinds.shape[-1]))
        inside = (inside & mine.any(-1)).any(-1)
        inside = inside & (self.include_first[:, None] | (where.positions > 0))
        named = (where.tokens[:, :, None] == self.tokens[:, None, :]).any(-1)
        touched = where.valid & (inside | named) & (self.special[:, None] | ~kinds[..., TEMPLATE])
        if where.roles is None:
            return touched
        turn, wanted = where.roles.turn[:, :, None], self.turns[:, None]
        ours = (wanted == turn) | (wanted == turn - where.roles.turns[:, None, None])
        return touched & ((wanted == EVERY_TURN) | (turn != UNKNOWN) & ours).any(-1)


def _kinds(where: Where) -> Bool[Array, "B T kinds"]:
    """Whether a token counts as of each role, and as ``ANYBODY``, ``PROMPT`` and ``LEADS``."""
    response, last = (where.positions >= where.prompt_length[:, None] - lead for lead in (0, 1))
    role, leads = jnp.where(response, ASSISTANT, UNKNOWN), last
    if where.roles is not None:
        known = where.roles.role != UNKNOWN
        role = jnp.where(known, where.roles.role, role)
        leads = jnp.where(known, where.roles.leads | (last & ~response), leads)
    spoken = role == ASSISTANT
    others = [jnp.ones_like(spoken), ~response & ~spoken, leads]
    return jnp.stack([*(role == number for number in range(len(ROLES))), *others], axis=-1)


Positions = str | int | slice | Sequence[int] | np.ndarray | Array | Selector
"""What ``select`` accepts."""


def select(
    positions: Positions | None = None,
    *,
    tokens: Sequence[int] | np.ndarray | Array = (),
    turns: Sequence[int] | np.ndarray | None = None,
    special: bool = True,
    include_first: bool | None = None,
) -> Selector:
    """The tokens at ``positions``, and those whose id is among ``tokens``; of them those in ``turns``.

    ========================== =================================================================================
    ``positions``              a token at position p (0 is the first token; padding does not count) is selected if
    ========================== =================================================================================
    "all"                      always (the default where no ``tokens`` are given)
    "every"                    always, and position 0 too
    "response"                 it is of the assistant's content, in whatever turn; so not what predicts the first
                               token of it. Where roles are not known: p >= prompt_length
    "prompt"                   p < prompt_length, and it is not of the response
    "last"                     p == prompt_length - 1
    "last_and_response"        it is of the response or right before it: all that predicts response tokens. What
                               persona_vectors' code calls "response"
    "system", "user",          it is of the content of such a message
    "assistant"
    "template"                 it is of no content: BOS, headers, ends of turns, the generation prompt
    5, [0, 4, -2]              p is listed; negative numbers count from the end of the prompt (-1 is its last token)
    slice(2, -1)               start <= p < stop, edges counted as above; slice(-3, None) runs on into the response
    ========================== =================================================================================

    ``turns`` are numbers of messages, from 0, negative ones counted from the last turn (the one that is answered); what
    the template writes around a content is of its turn. ``special=False`` leaves out what is of no content. These two,
    and the names of roles, need conversations whose roles are known (``Where.roles``).

    Position 0 (BOS, where a model has one, and an attention sink of outsize norm where it has none) is left alone by
    all names but "every", and "last" of a prompt of one token, unless ``include_first``; positions, slices and tokens
    that are given explicitly may touch it. Padding is never touched. Raises ``UserError`` for anything else.
    """
    if isinstance(positions, Selector):
        if len(tokens) or include_first is not None or turns is not None or not special:
            raise UserError("positions is a Selector already: give tokens, turns and the rest where it is made.")
        return positions
    if positions is None:
        positions = "all" if isinstance(tokens, tuple) and not tokens else []
    roles: tuple[int, ...] = (ANYBODY,)
    if isinstance(positions, str):
        if positions not in _NAMED:
            raise UserError(
                f"positions {positions!r} is not known. Give one of {', '.join(map(repr, _NAMED))}, a position, a "
                f"list of positions, a slice, or jaxsteer.steer.select(...)."
            )
        roles, takes_first = _NAMED[positions]
        ranges = [_LAST if positions == "last" else _WHOLE] * len(roles)
    elif isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise UserError(f"positions {positions}: a slice of positions has step 1. List the positions instead.")
        start = _edge(positions.start or 0)
        ranges, takes_first = [(start, (END, False) if positions.stop is None else _edge(positions.stop))], True
    else:
        listed = _integers(positions, "positions")
        ranges, takes_first = [(_edge(p), (p + 1, p < 0)) for p in listed], True
        roles = (ANYBODY,) * len(ranges)
    ids = _integers(tokens, "tokens")
    if not ranges and not ids:
        raise UserError("No positions and no tokens are given: the edit would touch nothing.")
    if min(ids, default=0) < 0:
        raise UserError(f"tokens must be token ids (0 or more), got {min(ids)}.")
    numbers = [EVERY_TURN] if turns is None else _integers(turns, "turns")
    if not numbers:
        raise UserError("turns is empty: the edit would touch nothing.")
    pairs = np.asarray(ranges, np.int64).reshape(1, -1, 2, 2)
    return Selector(
        edges=pairs[..., 0].astype(np.int32),
        from_prompt=pairs[..., 1].astype(bool),
        roles=np.asarray(roles, np.int32).reshape(1, -1),
        include_first=np.asarray([takes_first if include_first is None else include_first]),
        tokens=np.asarray(ids, np.int32).reshape(1, -1),
        turns=np.asarray(numbers, np.int32).reshape(1, -1),
        special=np.asarray([special]),
        needs_roles=turns is not None or not special or (isinstance(positions, str) and positions in ROLES),
    )


def _edge(position: Any) -> tuple[int, bool]:
    if not isinstance(position, int | np.integer) or isinstance(position, bool):
        raise UserError(f"positions must be integers, got {position!r}.")
    return int(position), bool(position < 0)


def _integers(given: Any, name: str) -> list[int]:
    array = np.atleast_1d(np.asarray(given))
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise UserError(f"{name} must be integers in one list, got {given!r}.")
    return [int(p) for p in array]
