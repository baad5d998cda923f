"""The edits of one request turned into the numbers of a table (``table``), or refused by name.

Letters: D width, E entries, S latents.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from jaxsteer.engine.table import (
    _AT,
    ENTRIES,
    NUMBERS,
    PLACES,
    RANGES,
    SELECTORS,
    TOGETHER,
    TOKENS,
    TURNS,
    Table,
    empty,
)
from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import ELEMENTWISE
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.taps import Intervention
from jaxsteer.sae.steering import LatentEdit
from jaxsteer.steer.edits import EVERY, OFF, Edit, Edits
from jaxsteer.steer.gates import Gated
from jaxsteer.steer.selectors import Selector

_INF = np.float32(np.inf)
_PLAIN = dict(gain=1.0, bias=0.0, least=-_INF, open=-_INF, constant=0.0, slope=0.0, low=-_INF, high=_INF, factor=1.0,
              keep=0.0, fresh=1.0)  # fmt: skip
_FORMULAS = {
    "add": lambda a: dict(constant=a),
    "add_keep_norm": lambda a: dict(constant=a, keep=1.0),
    "ablate": lambda a: dict(slope=-a),
    "floor": lambda a: dict(constant=a, slope=-1.0, low=0.0),
    "ceiling": lambda a: dict(constant=a, slope=-1.0, high=0.0),
    "clamp": lambda a: dict(constant=a, slope=-1.0),
    "scale": lambda a: dict(factor=a),
}
"""The numbers of an entry by the operation and its amount."""


def check_served(edits: Intervention | None, config: ModelConfig) -> None:
    """Refuse, with a ``UserError``, edits that a table cannot hold or that do not fit a model of this ``config``."""
    _Builder(config).table(edits, dry=True)


def serves(edits: Intervention | None, config: ModelConfig) -> bool:
    """Whether a table can hold edits that fit the model."""
    try:
        check_served(edits, config)
    except UserError:
        return False
    return True


def table_of(edits: Intervention | None, config: ModelConfig) -> Table | None:
    """The table of one row, on the host; None where nothing is changed. Gates must have been decided.

    Raises ``UserError`` for operations, sites and numbers of them that the engine does not serve, each by name.
    """
    return _Builder(config).table(edits)


def key_of(table: Table | None) -> bytes:
    """What tells tables apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(table):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.digest()


def flat(edits: Any) -> list[Any]:
    """The edits in order, without those that change nothing."""
    if edits is None or (isinstance(edits, Intervention) and not edits.conditional and edits.neutral):
        return []
    if isinstance(edits, Edits):
        return [each for edit in edits.edits for each in flat(edit)]
    return [edits]


def leaves(edits: Any) -> list[Any]:
    """The edits of vectors and latents in order, those behind gates included: a table has a selector for each."""
    return [leaf for one in flat(edits) for leaf in (leaves(one.edits) if isinstance(one, Gated) else [one])]


class _Builder:
    """Fills the table of one row."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.made = empty(config, 1)
        self.entries = self.selectors = 0
        self.used = np.zeros((len(PLACES), config.n_layers), int)

    def table(self, edits: Any, *, dry: bool = False) -> Table | None:
        for edit in flat(edits):
            self._edit(edit, dry)
        return self.made if self.entries else None

    def _edit(self, edit: Any, dry: bool) -> None:
        if isinstance(edit, Gated):
            if edit.open is not None and not bool(np.asarray(edit.open).all()):
                return
            if edit.open is None and not dry:
                raise UserError("A gate is decided by a prompt before its edits are put into a table.")
            edit.check(self.config, 1)
            for inner in flat(edit.edits):
                self._edit(inner, dry)
        elif isinstance(edit, Edit):
            edit.check(self.config, 1)
            self._of_vectors(edit)
        elif isinstance(edit, LatentEdit):
            edit.check(self.config, 1)
            self._of_latents(edit)
        else:
            raise UserError(f"{type(edit).__name__} cannot be served: edits of vectors, caps, latents and gates can.")

    def _of_vectors(self, edit: Edit) -> None:
        if edit.operation not in _FORMULAS:
            raise UserError(f"{edit.operation} cannot be served; these can: {', '.join(_FORMULAS)}.")
        place = _place(edit.kind)
        if edit.rows is not None:
            raise UserError("An edit of one request is made for one row.")
        selector = self._selector(edit.selector)
        layers, amounts = np.asarray(edit.layers)[0], np.asarray(edit.amount)[0]
        vectors = None if edit.vector is None else np.asarray(edit.vector)[0]
        for m, layer in enumerate(layers.tolist()):
            if layer == OFF:
                continue
            where = range(self.config.n_layers) if layer == EVERY else [layer]
            numbers = _FORMULAS[edit.operation](float(amounts[m if len(amounts) > 1 else 0]))
            if vectors is None:
                self._entry(place, where, selector, None, None, numbers)
                continue
            for j, vector in enumerate(vectors[m if len(vectors) > 1 else 0]):
                self._entry(place, where, selector, vector, vector, numbers | dict(fresh=float(j == 0)))

    def _of_latents(self, edit: LatentEdit) -> None:
        sae, place = edit.sae, _place(edit.site.kind)
        if edit.operation == "released" or sae.config.activation not in ELEMENTWISE:
            what = edit.operation if edit.operation == "released" else f"an SAE of {sae.config.activation}"
            raise UserError(f"Steering latents by {what} cannot be served: each latent has to stand by itself.")
        if sae.config.input_scale != 1.0 or sae.config.subtract_b_dec:
            raise UserError("The SAE is not in its canonical form: load it with jaxsteer.load_sae.")
        selector, amount = self._selector(edit.selector), float(np.asarray(edit.amount)[0])
        steered = (
            dict(slope=amount - 1.0) if edit.operation == "amplify" else dict(constant=amount, slope=-1.0, low=0.0)
        )
        for j, c in enumerate(np.asarray(edit.latents).tolist()):
            bias = float(sae.b_enc[c])
            numbers = dict(bias=bias, least=0.0, fresh=float(j == 0))
            if sae.threshold is not None:
                numbers["open"] = float(sae.threshold[c]) - bias
            if sae.b_mag is not None and sae.mag_scale is not None:
                numbers |= dict(open=-bias, gain=float(sae.mag_scale[c]), bias=float(sae.b_mag[c]))
            read, write = (np.asarray(a, np.float32) for a in (sae.W_enc[:, c], sae.W_dec[c]))
            self._entry(place, [edit.site.layer], selector, read, write, numbers | steered)

    def _entry(
        self, place: int, layers: Any, selector: int, read: np.ndarray | None, write: np.ndarray | None, numbers: dict
    ) -> None:
        e = self.entries
        if e >= ENTRIES:
            raise UserError(f"One request may steer by at most {ENTRIES} vectors and latents, counted layer by layer.")
        self.made.selector[0, e] = selector
        if read is not None and write is not None:
            self.made.read[0, e], self.made.write[0, e] = read, write
        for name, value in (_PLAIN | numbers).items():
            self.made.numbers[0, e, _AT[name]] = value
        for layer in layers:
            if (s := self.used[place, layer]) >= TOGETHER:
                raise UserError(f"At most {TOGETHER} vectors and latents may act at one site, {PLACES[place]}.")
            self.made.index[0, place, layer, s] = e
            self.used[place, layer] += 1
        self.entries += 1

    def _selector(self, selector: Selector) -> int:
        g = self.selectors
        if g >= SELECTORS:
            raise UserError(f"One request may hold at most {SELECTORS} edits.")
        sizes = dict(edges=RANGES, from_prompt=RANGES, roles=RANGES, tokens=TOKENS, turns=TURNS)
        for name in ("edges", "from_prompt", "roles", "include_first", "tokens", "turns", "special"):
            own, array = np.asarray(getattr(selector, name))[0], getattr(self.made, name)
            if name not in sizes:
                array[0, g] = own
                continue
            if len(own) > sizes[name]:
                raise UserError(f"One edit may list at most {RANGES} positions, {TOKENS} token ids and {TURNS} turns.")
            array[0, g, : len(own)] = own
        self.selectors += 1
        return g


def _place(kind: str) -> int:
    if kind not in PLACES:
        raise UserError(f"{kind} cannot be steered in a server; these kinds of site can: {', '.join(PLACES)}.")
    return PLACES.index(kind)


assert set(_PLAIN) == set(NUMBERS)
