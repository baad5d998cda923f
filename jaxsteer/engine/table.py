"""Tables of edits: what happens to every row of a batch at every place of the model, as data.

One program serves all edits. An entry reads the stream along one vector and writes along another:

    g = <h, read>;  z = max(g * gain + bias, least) where g > open, else 0
    h' = factor * h + clip(constant + slope * z, low, high) * write        (keep: times |h| / |h'|)

which is ``add``, ``ablate``, ``floor``, ``ceiling``, ``clamp``, ``scale`` and one latent of an SAE by other numbers
(``settings``). A row has up to E entries and G selectors; at one site in one layer up to S of its entries act, one
after the other. Where no row has any, nothing is computed; a row without entries keeps its bits beside rows that do.

Letters: B rows, T time, D width, E entries of a row, S entries at one place, G selectors of a row, P kinds of site,
L layers, N numbers of an entry.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.taps import Tap, Where
from jaxsteer.steer.selectors import ANYBODY, NO_TURN, Selector

PLACES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Kinds of site at which rows can be edited: those of the stream's width, in every block."""
NUMBERS = ("gain", "bias", "least", "open", "constant", "slope", "low", "high", "factor", "keep", "fresh")
"""The numbers of an entry. ``fresh``: it reads what the entry before it wrote; 0: what that one read."""
ENTRIES, TOGETHER, SELECTORS = 96, 32, 16
"""E, S and G."""
RANGES, TURNS, TOKENS = 16, 8, 32
"""Ranges of positions, turns and token ids of a selector."""
_AT = {name: i for i, name in enumerate(NUMBERS)}


@struct.dataclass
class Table:
    """The edits of B rows."""

    index: Int[Array | np.ndarray, "B P L S"]
    """The entries that act at a place, in order; -1 for none."""
    read: Float[Array | np.ndarray, "B E D"]
    write: Float[Array | np.ndarray, "B E D"]
    numbers: Float[Array | np.ndarray, "B E N"]
    selector: Int[Array | np.ndarray, "B E"]
    """The selector of each entry."""
    edges: Int[Array | np.ndarray, "B G n 2"]
    """This and what follows: the fields of ``Selector``, for every selector of every row."""
    from_prompt: Bool[Array | np.ndarray, "B G n 2"]
    roles: Int[Array | np.ndarray, "B G n"]
    include_first: Bool[Array | np.ndarray, "B G"]
    tokens: Int[Array | np.ndarray, "B G m"]
    turns: Int[Array | np.ndarray, "B G k"]
    special: Bool[Array | np.ndarray, "B G"]


_SELECTOR = ("edges", "from_prompt", "roles", "include_first", "tokens", "turns", "special")


def empty(config: ModelConfig, rows: int) -> Table:
    """A table of rows without edits, on the host."""
    full = lambda shape, fill, dtype: np.full((rows, *shape), fill, dtype)  # noqa: E731
    return Table(
        index=full((len(PLACES), config.n_layers, TOGETHER), -1, np.int32),
        read=full((ENTRIES, config.d_model), 0, np.float32),
        write=full((ENTRIES, config.d_model), 0, np.float32),
        numbers=full((ENTRIES, len(NUMBERS)), 0, np.float32),
        selector=full((ENTRIES,), 0, np.int32),
        edges=full((SELECTORS, RANGES, 2), 0, np.int32),
        from_prompt=full((SELECTORS, RANGES, 2), False, bool),
        roles=full((SELECTORS, RANGES), ANYBODY, np.int32),
        include_first=full((SELECTORS,), False, bool),
        tokens=full((SELECTORS, TOKENS), -1, np.int32),
        turns=full((SELECTORS, TURNS), NO_TURN, np.int32),
        special=full((SELECTORS,), False, bool),
    )


def touched(table: Table, where: Where) -> Bool[Array, "B G T"]:
    """The tokens that each selector of each row selects."""
    flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
    selector = Selector(**{name: flat(jnp.asarray(getattr(table, name))) for name in _SELECTOR})
    rows, count = table.special.shape
    each: Where = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), where)
    return selector.touched(each).reshape(rows, count, -1)


def tap_of_table(table: Table, mask: Bool[Array, "B G T"]) -> Tap:
    """The tap of these rows, for tokens of which ``mask`` says what their selectors select."""
    # [P, L]: how many entries the row with most has there.
    most = (table.index >= 0).sum(-1).max(0)
    by_place = jnp.moveaxis(table.index, 0, -1)  # [P, L, S, B]

    def change(kind: str, layer: Any, value: Float[Array, "B T D"]) -> Array:
        place = PLACES.index(kind)
        here = lax.dynamic_index_in_dim(by_place[place], jnp.asarray(layer), 0, keepdims=False)

        def one(s: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return _entry(table, mask, here[s], *carry)

        return lax.fori_loop(0, most[place, layer], one, (value, value))[0]

    return Tap(frozenset(PLACES), change)


def _entry(
    table: Table, mask: Bool[Array, "B G T"], entry: Int[Array, " B"], h: Float[Array, "B T D"], base: Array
) -> tuple[Array, Array]:
    """The stream after one entry of every row that has one, and what the entry read."""
    rows, at = jnp.arange(len(entry)), jnp.maximum(entry, 0)
    read, write = table.read[rows, at][:, None], table.write[rows, at][:, None]
    chosen = table.numbers[rows, at]
    n = lambda name: chosen[:, _AT[name], None, None]  # noqa: E731
    on = (mask[rows, table.selector[rows, at]] & (entry >= 0)[:, None])[:, :, None]
    base = jnp.where(n("fresh") > 0, h, base)
    g = (base.astype(jnp.float32) * read).sum(-1, keepdims=True)
    z = jnp.where(g > n("open"), jnp.maximum(g * n("gain") + n("bias"), n("least")), 0.0)
    amount = jnp.clip(n("constant") + n("slope") * z, n("low"), n("high"))
    wide = h.astype(jnp.float32)
    new = n("factor") * wide + amount * write
    kept = new * (_norm(wide) / _norm(new))
    new = jnp.where(n("keep") > 0, kept, new).astype(h.dtype)
    return jnp.where(on, new, h), base


def _norm(h: Array) -> Array:
    return jnp.sqrt(jnp.maximum((h * h).sum(-1, keepdims=True), 1e-30))
