"""The compiled programs of an engine: which there are, made at start or when first needed, and then said.

Letters: B rows, T tokens of a piece, M room of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsteer.engine import device
from jaxsteer.engine.table import SELECTORS, Table, empty
from jaxsteer.models.decoding import CACHE_SPEC
from jaxsteer.models.model import Model
from jaxsteer.models.roles import UNKNOWN, Roles
from jaxsteer.models.sampling import Decoding, Sampling, make_sampling, of_rows
from jaxsteer.models.sharding import place
from jaxsteer.models.taps import Where

log = logging.getLogger(__name__)

PIECE = 64
"""T of whole pieces; beginnings of prompts are kept in such pieces."""
PIECES = (16, 32, PIECE)
"""T: what is left of a prompt runs in the smallest that holds it."""


def ladder(most: int, factor: int, least: int) -> tuple[int, ...]:
    """``least``, and multiples of it by ``factor``, up to ``most``, which is the last."""
    rungs = [least]
    while rungs[-1] < most:
        rungs.append(rungs[-1] * factor)
    return (*rungs[:-1], most) if rungs[-1] != most and len(rungs) > 1 else tuple(rungs)


class Programs:
    """Calls of ``device`` for one model; all arrays that they make are laid out on its mesh."""

    def __init__(self, model: Model, widths: tuple[int, ...], slots: tuple[int, ...]) -> None:
        """``widths`` are those of the batch, ``slots`` the rooms of rows, which are multiples of ``PIECE``."""
        self.model, self.widths = model, widths
        self.slots = tuple(-(-m // PIECE) * PIECE for m in slots)
        self.dtype = model.params.layers.k.dtype
        self.no_edits: Table = jax.tree.map(jnp.asarray, empty(model.config, 1))
        known = model.config.vocab_size if model.tokenizer is None else len(model.tokenizer)
        self.vocab = min(known, model.config.vocab_size)
        self.compiling = ""
        self._seen: set[Hashable] = set()

    @property
    def compiled(self) -> int:
        """Programs made so far."""
        return len(self._seen)

    def _placed(self, tree: Any) -> Any:
        """Rows or a room on the model's devices: arrays of one kind, so that each program is compiled once.

        What came from the host, from a program without weights, or from one with weights would be three kinds.
        """

        def where(a: Any) -> jax.sharding.Sharding:
            return place(self.model.mesh, CACHE_SPEC if np.ndim(a) == 5 else P(), np.shape(a))

        return jax.device_put(tree, jax.tree.map(where, tree))

    @contextlib.contextmanager
    def _said(self, name: str, *sizes: int) -> Iterator[None]:
        """Say what is compiled where it is new."""
        key = (name, *sizes)
        if key in self._seen:
            yield
            return
        self.compiling, began = f"{name} {' x '.join(map(str, sizes))}".strip(), time.perf_counter()
        try:
            yield
        finally:
            log.info("compiled %s in %.1f s", self.compiling, time.perf_counter() - began)
            self._seen.add(key)
            self.compiling = ""

    def rung(self, tokens: int) -> int:
        """The smallest room for so many tokens."""
        return next((m for m in self.slots if m >= tokens), self.slots[-1])

    def width(self, rows: int) -> int:
        """The smallest width for so many rows."""
        return next(b for b in self.widths if b >= rows)

    def sampling(self, decoding: Decoding, number: int) -> Sampling:
        """Settings of one row."""
        made = of_rows(make_sampling(self.model, decoding), jnp.asarray([number]))
        missing = device.STOPS - made.stop.shape[1]
        stop = jnp.pad(made.stop, ((0, 0), (0, missing)), constant_values=-1)
        return dataclasses.replace(made, stop=stop)

    def blank(self, rows: int, slots: int) -> device.Rows:
        """An empty batch."""
        with self._said("blank", rows, slots):
            made = device.blank(
                self.model.config, rows=rows, slots=slots, vocab=self.vocab, dtype=self.dtype, mesh=self.model.mesh
            )
            return self._placed(made)

    def room(self, slots: int) -> device.Room:
        """Room for one row."""
        return self._placed(device.empty_room(self.model.config, slots=slots, dtype=self.dtype))

    def extend(
        self, room: device.Room, tokens: np.ndarray, mask: np.ndarray | None, table: Table | None
    ) -> tuple[device.Room, jax.Array]:
        """At most ``PIECE`` tokens of a prompt more."""
        count = len(tokens)
        size = next(size for size in PIECES if size >= count)
        ids, chosen = np.zeros((1, size), np.int32), np.zeros((1, SELECTORS, size), bool)
        ids[0, :count] = tokens
        if mask is not None:
            chosen[0, :, :count] = mask
        with self._said("prompt", size, room.k.shape[-1]):
            return device.extend(
                self.model.params, self.model.config, room, ids, np.int32(count), chosen, table or self.no_edits
            )

    def score(self, x: jax.Array, labels: np.ndarray) -> tuple[device.Scores, bool]:
        """How likely each label is after the stream [1, T, D] before it."""
        padded = np.zeros((1, x.shape[1]), np.int32)
        padded[0, : len(labels)] = labels
        with self._said("score", x.shape[1]):
            scores, finite = device.score(self.model.params, self.model.config, x, padded)
            return jax.tree.map(lambda a: np.asarray(a)[0, : len(labels)], scores), bool(finite)

    def masks(self, table: Table, prompt: Roles, ids: np.ndarray) -> np.ndarray:
        """[G, T]: the tokens of a prompt that each selector selects. ``prompt`` has roles [T] and turns [1]."""
        n, size = len(ids), self.rung(len(ids))

        def fill(a: Any, value: int, dtype: Any) -> Any:
            return np.pad(np.asarray(a, dtype), (0, size - n), constant_values=value)[None]

        steps: Any = np.arange(size, dtype=np.int32)[None]
        length: Any = np.asarray([n], np.int32)
        where = Where(
            tokens=fill(ids, 0, np.int32),
            positions=steps,
            valid=steps < n,
            prompt_length=length,
            roles=Roles(
                role=fill(prompt.role, UNKNOWN, np.int32),
                turn=fill(prompt.turn, UNKNOWN, np.int32),
                leads=fill(prompt.leads, False, bool),
                turns=np.asarray(prompt.turns, np.int32),
            ),
        )
        with self._said("masks", size):
            return np.asarray(device.masks(table, where))[0, :, :n]

    def put(self, rows: device.Rows, one: device.Rows, at: int) -> device.Rows:
        """A row in its place; its room is made to fit."""
        slots = rows.room.k.shape[-1]
        if (own := one.room.k.shape[-1]) != slots:
            with self._said("fit", own, slots):
                one = dataclasses.replace(one, room=device.fit(one.room, slots=slots))
        with self._said("put", len(rows.token), slots):
            return device.put(rows, self._placed(one), np.int32(at), mesh=self.model.mesh)

    def take(self, rows: device.Rows, at: int) -> device.Rows:
        """A row out of its place."""
        with self._said("take", *rows.room.k.shape[1::3]):
            return device.take(rows, np.int32(at))

    def advance(self, rows: device.Rows, alive: np.ndarray, steps: int) -> tuple[device.Rows, device.Made]:
        """Steps of all rows; what they made, on the host."""
        with self._said("decode", len(rows.token), rows.room.k.shape[-1]):
            rows, made = device.advance(
                self.model.params, self.model.config, rows, alive, np.int32(steps), mesh=self.model.mesh
            )
            return rows, jax.device_get(made)

    def warm(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compile all of them, shorter rows first; ends early when ``stopped``."""
        decoding = Decoding(max_new_tokens=1)
        for slots in self.slots:
            room = self.room(slots)
            for size in PIECES:
                room, x = self.extend(room, np.zeros(size, np.int32), None, None)
                self.score(x, np.zeros(size, np.int32))
            piece = device.cut(room, np.int32(0), size=PIECE)
            device.lay(self.room(slots), piece)
            nobody = Roles(role=np.zeros(1), turn=np.zeros(1), leads=np.zeros(1), turns=np.zeros(1))
            self.masks(self.no_edits, nobody, np.zeros(1, np.int32))
            for width, own in itertools.product(self.widths, (m for m in self.slots if m <= slots)):
                if stopped():
                    return
                one = device.row_of(
                    self.room(own), token=0, role=0, turn=0, turns=0, prompt_length=1, limit=1, tops=-1,
                    sampling=self.sampling(decoding, 0), table=self.no_edits,
                )  # fmt: skip
                rows = self.put(self.blank(width, slots), one, 0)
                rows, _ = self.advance(rows, np.ones(width, bool), 1)
                self.take(rows, 0)
