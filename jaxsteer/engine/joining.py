"""A row on its way into the batch: its gates decided, its edits put into a table, its prompt run piece by piece."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.engine import device
from jaxsteer.engine.batch import Row
from jaxsteer.engine.prefix import Prefixes, piece_keys
from jaxsteer.engine.programs import PIECE, Programs
from jaxsteer.engine.requests import Scored, scored
from jaxsteer.engine.settings import flat, key_of, leaves, table_of
from jaxsteer.engine.table import Table
from jaxsteer.errors import UserError
from jaxsteer.models.decoding import Batch as Prompts
from jaxsteer.models.decoding import decide
from jaxsteer.models.log_probs import not_finite
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.roles import ASSISTANT, Rendered, Roles, stack_rendered
from jaxsteer.models.taps import Intervention
from jaxsteer.steer.gates import Gated


class Joining:
    """One prompt that is run. All of it but the last token, which is the first that the batch runs."""

    def __init__(self, programs: Programs, prefixes: Prefixes, row: Row) -> None:
        """Nothing is computed yet."""
        self.programs, self.prefixes, self.row = programs, prefixes, row
        self._room: device.Room | None = None
        self._table: Table | None = None
        self._mask: np.ndarray | None = None
        self._keys: list[bytes] = []
        self._at = 0

    def step(self) -> bool:
        """One piece more; whether the prompt is done. Raises ``UserError`` where logits are not finite."""
        ids, scoring = self.row.request.prompt.ids, self.row.request.echo and self.row.request.tops is not None
        last = len(ids) - 1
        if self._room is None:
            self._begin(scoring)
        if self._at < last:
            assert self._room is not None
            stop = min(self._at + PIECE, last)
            mask = None if self._mask is None else self._mask[:, self._at : stop]
            self._room, x = self.programs.extend(self._room, ids[self._at : stop], mask, self._table)
            if scoring:
                self._score(x, ids[self._at + 1 : stop + 1])
            if stop - self._at == PIECE and len(self._keys) > self._at // PIECE:
                piece = device.cut(self._room, np.int32(self._at), size=PIECE)
                self.prefixes.keep(self._keys[self._at // PIECE], piece)
            self._at = stop
        return self._at >= last

    def _begin(self, scoring: bool) -> None:
        request, programs = self.row.request, self.programs
        prompt = request.prompt
        edits = request.edits
        decides = edits is not None and edits.conditional
        if edits is not None and decides:
            edits, self.row.gate_open = decided(programs.model, prompt, edits)
        for edit in flat(edits):
            _check_roles(edit, prompt)
        table = table_of(edits, programs.model.config)
        slots = programs.rung(len(prompt.ids))
        if table is not None:
            self._table = jax.tree.map(jnp.asarray, table)
            self._mask = programs.masks(self._table, _roles(prompt), prompt.ids)
            self.row.edited = int(self._mask.any(0).sum())
            self.row.reached = () if decides else tuple(self._mask.sum(-1)[: len(leaves(edits))].tolist())
        if scoring:
            self.row.prompt_scores.append(Scored(token=int(prompt.ids[0]), log_prob=None))
        start = hashlib.sha256(f"{slots} ".encode() + (key_of(table) if table is not None else b"")).digest()
        if self.prefixes.budget:
            self._keys = piece_keys(start, prompt.ids[:-1], self._mask, PIECE)
        self._room = programs.room(slots)
        for piece in self.prefixes.find(self._keys) if not scoring else ():
            self._room = device.lay(self._room, piece)
            self._at += PIECE
        self.row.cached_tokens = self._at

    def _score(self, x: jax.Array, labels: np.ndarray) -> None:
        scores, finite = self.programs.score(x, labels)
        if not finite:
            edits = self.row.request.edits
            raise UserError(not_finite("" if edits is None else edits.label))
        most = self.row.request.tops or 0
        self.row.prompt_scores += scored(labels, scores, most)

    def made(self) -> device.Rows:
        """The row for the batch."""
        request, prompt = self.row.request, self.row.request.prompt
        assert self._room is not None
        return device.row_of(
            self._room,
            token=int(prompt.ids[-1]),
            role=int(prompt.role[-1]),
            turn=int(prompt.turn[-1]),
            turns=prompt.turns,
            prompt_length=len(prompt.ids),
            limit=self.row.limit,
            tops=-1 if request.tops is None else request.tops,
            sampling=self.programs.sampling(request.decoding, request.number),
            table=self.programs.no_edits if self._table is None else self._table,
        )


def decided(model: Model, prompt: Rendered, edits: Intervention) -> tuple[Intervention, bool]:
    """The edits, decided by the prompt, and whether any gate is open."""
    tokens, mask, roles = stack_rendered([prompt], bucket(len(prompt.ids)), left=True)
    one = jnp.asarray([0])
    rows = Prompts(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), groups=one, rows=one, limit=one,
        roles=jax.tree.map(jnp.asarray, roles) if prompt.turns else None,
    )  # fmt: skip
    found = decide(model.params, model.config, rows, edits)
    gates = [edit for edit in flat(found) if isinstance(edit, Gated)]
    return found, any(bool(np.asarray(gate.open).any()) for gate in gates)


def _roles(prompt: Rendered) -> Roles:
    return Roles(
        role=prompt.role, turn=prompt.turn, leads=np.append(prompt.role[1:] == ASSISTANT, False),
        turns=np.asarray([prompt.turns], np.int32),
    )  # fmt: skip


def _check_roles(edit: Any, prompt: Rendered) -> None:
    """Refuse positions by role in a text of which nobody knows whose its tokens are."""
    for one in flat(edit.edits) if isinstance(edit, Gated) else [edit]:
        if one.selector.needs_roles and not prompt.turns:
            raise UserError(
                "These positions are those of a role or turn, and the prompt is no conversation whose roles are known: "
                "ask by messages, or give other positions."
            )
