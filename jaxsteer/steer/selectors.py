"""Which tokens an edit touches, as data: ranges of positions, counted without padding, and token ids.

Letters: B rows of the batch, R rows of the selector (1 or B), T time, n ranges, m token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.taps import Where

END = 2**30
"""Later than any position."""

# (start, counted from the end of the prompt?), (stop, counted from the end of the prompt?), takes position 0 in?
_RANGES: dict[str, tuple[tuple[int, bool], tuple[int, bool], bool]] = {
    "all": ((0, False), (END, False), False),
    "every": ((0, False), (END, False), True),
    "prompt": ((0, False), (0, True), False),
    "response": ((0, True), (END, False), False),
    "last_and_response": ((-1, True), (END, False), False),
    "last": ((-1, True), (0, True), True),
}


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
    include_first: Bool[Array | np.ndarray, " R"]
    """Whether the ranges take in position 0."""
    tokens: Int[Array | np.ndarray, "R m"]
    """Token ids; -1 stands for none."""

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True where a token is selected. Never on padding."""
        ends = self.edges + jnp.where(self.from_prompt, where.prompt_length[:, None, None], 0)
        at = where.positions[:, :, None]
        inside = ((at >= ends[:, None, :, 0]) & (at < ends[:, None, :, 1])).any(-1)
        inside = inside & (self.include_first[:, None] | (where.positions > 0))
        named = (where.tokens[:, :, None] == self.tokens[:, None, :]).any(-1)
        return where.valid & (inside | named)


Positions = str | int | slice | Sequence[int] | np.ndarray | Array | Selector
"""What ``select`` accepts."""


def select(
    positions: Positions | None = None,
    *,
    tokens: Sequence[int] | np.ndarray | Array = (),
    include_first: bool | None = None,
) -> Selector:
    """The tokens at ``positions``, and those whose id is among ``tokens``.

    ===================== =====================================================================================
    ``positions``         a token at position p (0 is the first token; padding does not count) is selected if
    ===================== =====================================================================================
    "all"                 always (the default where no ``tokens`` are given)
    "every"               always, and position 0 too
    "prompt"              p < prompt_length
    "response"            p >= prompt_length: tokens of the response, so not what predicts the first of them
    "last"                p == prompt_length - 1
    "last_and_response"   p >= prompt_length - 1: all that predicts response tokens. What persona_vectors'
                          code calls "response"
    5, [0, 4, -2]         p is listed; negative numbers count from the end of the prompt (-1 is its last token)
    slice(2, -1)          start <= p < stop, edges counted as above; slice(-3, None) runs on into the response
    ===================== =====================================================================================

    Position 0 (BOS, where a model has one, and an attention sink of outsize norm where it has none) is left alone by
    the names "all", "prompt", "response" and "last_and_response", unless ``include_first``; positions, slices and
    tokens that are given explicitly may touch it, and so may "last" of a prompt of one token. Padding is never
    touched. Raises ``UserError`` for anything else.
    """
    if isinstance(positions, Selector):
        if len(tokens) or include_first is not None:
            raise UserError("positions is a Selector already: give tokens and include_first where it is made.")
        return positions
    if positions is None:
        positions = [] if len(tokens) else "all"
    if isinstance(positions, str):
        if positions not in _RANGES:
            raise UserError(
                f"positions {positions!r} is not known. Give one of {', '.join(map(repr, _RANGES))}, a position, a "
                f"list of positions, a slice, or jaxsteer.steer.select(...)."
            )
        first, last, takes_first = _RANGES[positions]
        ranges = [(first, last)]
    elif isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise UserError(f"positions {positions}: a slice of positions has step 1. List the positions instead.")
        start = _edge(positions.start or 0)
        ranges, takes_first = [(start, (END, False) if positions.stop is None else _edge(positions.stop))], True
    else:
        listed = _integers(positions, "positions")
        ranges, takes_first = [(_edge(p), (p + 1, p < 0)) for p in listed], True
    ids = _integers(tokens, "tokens")
    if not ranges and not ids:
        raise UserError("No positions and no tokens are given: the edit would touch nothing.")
    if min(ids, default=0) < 0:
        raise UserError(f"tokens must be token ids (0 or more), got {min(ids)}.")
    pairs = np.asarray(ranges, np.int64).reshape(1, -1, 2, 2)
    return Selector(
        edges=pairs[..., 0].astype(np.int32),
        from_prompt=pairs[..., 1].astype(bool),
        include_first=np.asarray([takes_first if include_first is None else include_first]),
        tokens=np.asarray(ids, np.int32).reshape(1, -1),
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
