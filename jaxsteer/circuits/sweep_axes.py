"""The axes of a sweep of patches, and what a patch takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.circuits.memory import row_bytes
from jaxsteer.circuits.rows import Rows
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sites import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a sweep: ``None`` for what is patched all together."""

    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the axes that there are."""
        there = (True, self.positions is not None, self.heads is not None)
        return tuple(name for name, is_there in zip(("layer", "position", "head"), there) if is_there)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row's effects."""
        return tuple(len(axis) for axis in (self.layers, self.positions, self.heads) if axis is not None)

    @property
    def count(self) -> int:
        """Patches of one layer."""
        return len(self.positions or (0,)) * len(self.heads or (0,))

    def patches(self, length: int) -> tuple[Bool[np.ndarray, "n T"], Int[np.ndarray, " n"]]:
        """Positions and head of the patches of one layer, positions first."""
        steps = np.arange(length)
        at = np.ones((1, length), bool) if self.positions is None else np.asarray(self.positions)[:, None] == steps
        head = np.asarray([-1] if self.heads is None else self.heads, np.int32)
        return at.repeat(len(head), axis=0), np.tile(head, len(at))


def make_axes(
    config: ModelConfig, kind: str, rows: Rows, layers: Sequence[int] | None, positions: Any, heads: Any
) -> Axes:
    """The checked axes of a sweep at a kind of site. Raises ``UserError`` for those that model or rows lack."""
    refuse_unknown([kind], KINDS, "kind of site", "patching: ")
    KINDS[kind].shape(config)  # which refuses those that the model does not have
    depth = config.n_layers if KINDS[kind].in_block else 1
    there = [size for size, axis in zip(KINDS[kind].shape(config), KINDS[kind].axes.split()) if axis in "NK"]
    if isinstance(heads, str) and heads == "each" and not there or not isinstance(heads, str) and not there:
        raise UserError(f"there are no heads at {kind}: patch it with heads='together'")
    chosen = [
        _numbers("layers", "each" if layers is None else layers, depth),
        _numbers("positions", positions, int(rows.lengths.max())),
        _numbers("heads", heads, int(there[0]) if there else 0),
    ]
    return Axes(layers=chosen[0] or (), positions=chosen[1], heads=chosen[2])


def _numbers(name: str, given: Any, size: int) -> tuple[int, ...] | None:
    if isinstance(given, str):
        if given not in ("each", "together"):
            raise UserError(f"{name} is {given!r}, but may be 'each', 'together' or a list of numbers")
        return tuple(range(size)) if given == "each" else None
    numbers = np.asarray(given)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not numbers.size:
        raise UserError(f"{name} must be a list of whole numbers, got {given!r:.80}")
    if numbers.min() < -size or numbers.max() >= size or len({*(numbers % size).tolist()}) < len(numbers):
        raise UserError(f"{name} {numbers.tolist()} must be different ones from 0 to {size - 1}")
    return tuple((numbers % size).tolist())


def patch_bytes(config: ModelConfig, kind: str, rows: Rows) -> int:
    """About what one patched row takes: ``row_bytes``, and the values at a kind of site."""
    length = rows.tokens.shape[1]
    wide = {"D": config.d_model, "N": config.n_heads, "K": config.n_kv_heads, "H": config.d_head, "I": config.d_mlp}
    axes = KINDS[kind].axes.split()
    value = int(np.prod([wide.get(axis, length if axis in "TU" else 1) for axis in axes if axis != "B"]))
    return row_bytes(config, length, rows.read.shape[1]) + 16 * value
