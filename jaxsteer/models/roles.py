"""Whose tokens these are: the role and the turn of every token of a conversation.

Letters: B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.padding import pad_rows

ROLES = ("template", "system", "user", "assistant")
"""Names of roles by their numbers. Tokens of a message's content have the role of the message, all others belong to the
template: BOS, headers, ends of turns, the generation prompt."""
TEMPLATE, SYSTEM, USER, ASSISTANT = range(len(ROLES))
UNKNOWN = -1
"""In place of a role or a turn: the token belongs to a text that is no conversation."""


@struct.dataclass
class Roles:
    """Roles and turns of a batch of rows. Padding may hold anything."""

    role: Int[Array | np.ndarray, "B T"]
    """Index into ``ROLES``, or ``UNKNOWN``."""
    turn: Int[Array | np.ndarray, "B T"]
    """Number of the message, from 0. What the template writes around a content is of the same turn."""
    leads: Bool[Array | np.ndarray, "B T"]
    """Whether the next token is of the assistant's content."""
    turns: Int[Array | np.ndarray, " B"]
    """Turns of the whole conversation, the one that is to be answered included; 0 where there are none."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rendered:
    """A conversation in token space. Made by ``prompts.encode_turns``."""

    text: str
    ids: Int[np.ndarray, " T"]
    """int32, BOS included where the model has one."""
    role: Int[np.ndarray, " T"]
    """int8: index into ``ROLES``."""
    turn: Int[np.ndarray, " T"]
    """int32: number of the message. A generation prompt is the turn after the last message."""
    turns: int
    """Number of turns, that of a generation prompt included."""

    def mask(self, *roles: str, turns: Sequence[int] | None = None) -> Bool[np.ndarray, " T"]:
        """The tokens of these roles (all: none given) in these turns; -1 is the last turn.

        Raises ``UserError`` for a role that is not among ``ROLES``.
        """
        mask = np.isin(self.role, [role_number(role) for role in roles or ROLES])
        if turns is None:
            return mask
        return mask & np.isin(self.turn, [turn + self.turns * (turn < 0) for turn in turns])

    def answered(self, ids: Int[np.ndarray, " n"], text: str = "") -> Rendered:
        """With tokens that were generated behind it: they are the assistant's, of the last turn."""
        behind = np.full(len(ids), self.turns - 1, np.int32)
        return dataclasses.replace(
            self,
            text=self.text + text,
            ids=np.concatenate([self.ids, np.asarray(ids, np.int32)]),
            role=np.concatenate([self.role, np.full(len(ids), ASSISTANT, np.int8)]),
            turn=np.concatenate([self.turn, behind]),
        )


def unlabelled(ids: Int[np.ndarray, " T"]) -> Rendered:
    """Ids of which nobody knows whose they are."""
    unknown = np.full(len(ids), UNKNOWN, np.int32)
    return Rendered(text="", ids=np.asarray(ids, np.int32), role=unknown.astype(np.int8), turn=unknown, turns=0)


def role_number(name: str) -> int:
    """Index into ``ROLES``. Raises ``UserError`` for another name."""
    if name not in ROLES:
        raise UserError(f"unknown role {name!r}: expected one of {', '.join(ROLES)}")
    return ROLES.index(name)


def stack_rendered(
    rows: Sequence[Rendered], width: int | None = None, *, left: bool = False
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Roles]:
    """(tokens, mask, roles) of a batch, padded as by ``pad_rows``."""
    tokens, mask = pad_rows([row.ids for row in rows], width, left=left)
    labels = [(row.role, row.turn, np.append(row.role[1:] == ASSISTANT, False)) for row in rows]
    role, turn, leads = (pad_rows(each, width, left=left)[0] for each in zip(*labels, strict=True))
    turns = np.asarray([row.turns for row in rows], np.int32)
    return tokens, mask, Roles(role=role, turn=turn, leads=leads.astype(bool), turns=turns)
