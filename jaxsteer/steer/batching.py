"""Different edits for different rows of one batch: row tables made of single edits, and parts of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxsteer.errors import UserError
from jaxsteer.steer.edits import OFF, Edit, Edits
from jaxsteer.steer.selectors import ANYBODY, NO_TURN


def stack_rows(rows: Sequence[Edit | Edits | None]) -> Edits:
    """Edits for a batch of ``len(rows)`` rows, of which row b does what ``rows[b]`` does alone (None: nothing).

    Edits of the same operation and kind share one table, whatever their layers, vectors, numbers and positions;
    different ones stand side by side, each doing nothing in the rows of the others. The order within a row is kept.
    Raises ``UserError`` for edits that have rows already, and for interventions that are not ``Edit``.
    """
    if not rows:
        raise UserError("stack_rows needs at least one row.")
    slots: list[tuple[Hashable, list[Edit | None]]] = []
    for number, row in enumerate(rows):
        slot = 0
        for edit in _flat(row):
            key = (edit.operation, edit.kind, None if edit.vector is None else edit.vector.shape[-1])
            while slot < len(slots) and slots[slot][0] != key:
                slot += 1
            if slot == len(slots):
                slots.append((key, [None] * len(rows)))
            slots[slot][1][number] = edit
            slot += 1
    return Edits(tuple(_stack(column) for _, column in slots))


def take_rows(edits: Edits | Edit, index: Int[np.ndarray, " b"]) -> Edits | Edit:
    """The edits of rows ``index`` of the batch, in that order; what serves all rows stays as it is.

    Raises ``UserError`` for rows that there are not.
    """
    rows = edits.rows
    chosen = np.asarray(index)
    if rows is not None and chosen.size and (chosen.min() < -rows or chosen.max() >= rows):
        raise UserError(f"the edits have rows 0 to {rows - 1}, asked for {chosen.tolist()[:8]}.")
    return jax.tree.map(lambda a: a if a.shape[0] == 1 else a[index], edits)


def _flat(row: Any) -> list[Edit]:
    """The edits of one row, in order."""
    if row is None:
        return []
    if isinstance(row, Edits):
        return [edit for each in row.edits for edit in _flat(each)]
    if not isinstance(row, Edit):
        raise UserError(f"stack_rows stacks edits of jaxsteer.steer, got {type(row).__name__}.")
    if row.rows is not None:
        raise UserError(
            f"The edit at {row.kind} is made for {row.rows} rows already, and cannot be one row of a batch."
        )
    return [row]


def _stack(column: list[Edit | None]) -> Edit:
    """One edit with a row axis. Sizes that differ are filled with settings that do nothing."""
    first = next(edit for edit in column if edit is not None)
    off = dataclasses.replace(first, layers=np.full_like(first.layers, OFF))
    edits = [off if edit is None else edit for edit in column]

    def join(arrays: list[Any], fill: int) -> Any:
        xp = np if all(isinstance(a, np.ndarray) for a in arrays) else jnp
        sizes = np.max([a.shape for a in arrays], axis=0)
        padded = [
            xp.pad(a, [(0, size - own) for size, own in zip(sizes, a.shape)], constant_values=fill)
            if a.shape != tuple(sizes)
            else a
            for a in arrays
        ]
        return xp.concatenate(padded)

    selectors = [edit.selector for edit in edits]
    return dataclasses.replace(
        first,
        layers=join([edit.layers for edit in edits], OFF),
        amount=join([edit.amount for edit in edits], 0),
        vector=None if first.vector is None else join([edit.vector for edit in edits], 0),
        head=join([edit.head for edit in edits], -1),
        selector=dataclasses.replace(
            first.selector,
            edges=join([s.edges for s in selectors], 0),
            from_prompt=join([s.from_prompt for s in selectors], 0),
            roles=join([s.roles for s in selectors], ANYBODY),
            include_first=join([s.include_first for s in selectors], 0),
            tokens=join([s.tokens for s in selectors], -1),
            turns=join([s.turns for s in selectors], NO_TURN),
            special=join([s.special for s in selectors], 0),
            needs_roles=any(s.needs_roles for s in selectors),
        ),
    )
