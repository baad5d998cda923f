"""Rows of token ids as arrays of few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


def bucket(n: int, least: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128 ... (from ``least``, a power of two) that is at least ``n``.

    Few sizes to compile programs for, of which at most a third is padding.
    """
    size = least
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def pad_rows(
    rows: Sequence[np.ndarray], width: int | None = None, *, left: bool = False
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """int32 ids padded with 0 to ``width`` (default: the longest row) at their ends or starts, and a mask.

    The mask is False on padding. Rows may be empty.
    """
    lengths = np.asarray([len(row) for row in rows], int)[:, None]
    steps = np.arange(lengths.max(initial=0) if width is None else width)
    mask = steps >= len(steps) - lengths if left else steps < lengths
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate([np.zeros(0, np.int32), *rows])
    return ids, mask
