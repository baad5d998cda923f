"""Where the tokens of a text lie along vectors, as the model reads it as it is and under edits.

Both are of the same text, whoever wrote it. Without edits the projection of a conversation does not depend on what it
was written under; with edits, a cap shows as a bound, and what is added as a shift.

Letters: s sites, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

import jaxsteer.models.run as runs
from jaxsteer.engine.joining import decided
from jaxsteer.engine.settings import table_of
from jaxsteer.engine.table import PLACES, Table, tap_of_table, touched
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.roles import ASSISTANT, ROLES, TEMPLATE, Rendered, stack_rendered
from jaxsteer.models.taps import Intervention, Tap, Where


@struct.dataclass
class Tabled(Intervention):
    """The edits of a table as an intervention: one program whatever they are."""

    table: Table

    @property
    def kinds(self) -> frozenset[str]:
        """All at which a table can act."""
        return frozenset(PLACES)

    @property
    def rows(self) -> int | None:
        """Rows that the table is made for."""
        return len(self.table.index)

    def tap(self, where: Where) -> Tap:
        """See ``Intervention``."""
        table: Table = jax.tree.map(jnp.asarray, self.table)
        return tap_of_table(table, touched(table, where))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Along:
    """Projections of one text, float64, in units of the stream."""

    plain: Float[np.ndarray, "s T"]
    edited: Float[np.ndarray, "s T"] | None
    """The same with edits; None without any."""
    touched: int
    """Tokens that the edits reach."""


def along_of(
    model: Model,
    text: Rendered,
    units: Sequence[Float[np.ndarray, " D"]],
    sites: Sequence[str],
    edits: Intervention | None = None,
) -> Along:
    """<h, u> at every token of a text for unit vectors u, each at its site, in one pass; a site may come several times.
    There is a program for each bucket of lengths and each set of sites.

    Raises ``UserError`` for a text longer than the model's positions and for edits that no table holds.
    """
    n = len(text.ids)
    tokens, mask, roles = stack_rendered([text], min(bucket(n, 64), max(model.config.max_positions, n)))
    length = np.asarray([_prompt_length(text)])
    if edits is not None and edits.conditional:
        edits, _ = decided(model, _prompt(text, int(length[0])), edits)
    table = table_of(edits, model.config)

    def read(own: Intervention | None) -> Float[np.ndarray, "s T"]:
        found: dict[str, Array] = runs.capture(
            model, tokens, list(dict.fromkeys(sites)), mask, edits=own, prompt_length=length, roles=roles
        )
        states = np.stack([np.asarray(found[site], np.float64)[0, :n] for site in sites])
        return np.einsum("std,sd->st", states, np.asarray(units, np.float64))

    if table is None:
        return Along(plain=read(None), edited=None, touched=0)
    where = Where(
        tokens=jnp.asarray(tokens), positions=jnp.arange(tokens.shape[1])[None], valid=jnp.asarray(mask),
        prompt_length=jnp.asarray(length), roles=jax.tree.map(jnp.asarray, roles),
    )  # fmt: skip
    reached = np.asarray(_touched(table, where))[0, :, :n].any(0)
    return Along(plain=read(None), edited=read(Tabled(table)), touched=int(reached.sum()))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TurnAlong:
    """The content tokens of one message on average."""

    turn: int
    """Number of the message, from 0; 0 of a text that is no conversation."""
    role: str
    """"text" where there are no roles."""
    tokens: int
    plain: tuple[float, ...]
    """By site, in units of the stream."""
    edited: tuple[float, ...] | None


def by_turn(text: Rendered, along: Along) -> list[TurnAlong]:
    """The mean of every message's content tokens, without the first token of all, whose norm is out of line."""
    content = (text.role > TEMPLATE) | (text.turns == 0)
    content &= np.arange(len(text.ids)) > 0
    found = []
    for turn in np.unique(text.turn[content]).tolist():
        own = content & (text.turn == turn)
        mean = lambda a, own=own: tuple(a[:, own].mean(-1).tolist())  # noqa: E731
        found.append(
            TurnAlong(
                turn=max(turn, 0),
                role=ROLES[int(text.role[own][0])] if text.turns else "text",
                tokens=int(own.sum()),
                plain=mean(along.plain),
                edited=None if along.edited is None else mean(along.edited),
            )  # fmt: skip
        )
    return found


_touched = jax.jit(touched)


def _prompt_length(text: Rendered) -> int:
    """Where the assistant's last answer begins; the whole text where it ends with somebody else."""
    own = (text.role == ASSISTANT) & (text.turn == text.turns - 1)
    return int(own.argmax()) if own.any() else len(text.ids)


def _prompt(text: Rendered, n: int) -> Rendered:
    return dataclasses.replace(text, ids=text.ids[:n], role=text.role[:n], turn=text.turn[:n])
