"""Keys and values of the beginnings of prompts, kept for prompts that begin alike.

What is kept are whole pieces of prompts, cut at fixed places, as the program for whole pieces computed them. So a row
gets the same bits whether its prompt was known or not. Pieces are told apart by all that made them: the tokens, the
edits and which of the tokens these touched, and the room of the row.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jax import Array

Piece = tuple[Array, Array]
"""Keys and values, [L, 1, K, H, T] each."""


class Prefixes:
    """The pieces that were used last, up to a number of bytes."""

    def __init__(self, budget: int) -> None:
        """``budget`` in bytes; 0 keeps nothing."""
        self.budget, self.bytes = budget, 0
        self._held: OrderedDict[bytes, Piece] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def find(self, keys: Sequence[bytes]) -> list[Piece]:
        """The pieces of a prompt that are here, from its beginning."""
        found = []
        for key in keys:
            if key not in self._held:
                break
            self._held.move_to_end(key)
            found.append(self._held[key])
        return found

    def keep(self, key: bytes, piece: Piece) -> None:
        """Keep a piece; those that were not used for longest go."""
        size = sum(a.nbytes for a in piece)
        if key in self._held or size > self.budget:
            return
        self._held[key] = piece
        self.bytes += size
        while self.bytes > self.budget:
            _, old = self._held.popitem(last=False)
            self.bytes -= sum(a.nbytes for a in old)

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self.bytes = 0


def piece_keys(start: bytes, tokens: np.ndarray, mask: np.ndarray | None, size: int) -> list[bytes]:
    """A key for every whole piece of ``size`` of these tokens [T]; ``mask`` [G, T] is what edits touch.

    ``start`` is of all else that matters.
    """
    keys, key = [], start
    for begin in range(0, len(tokens) - size + 1, size):
        digest = hashlib.sha256(key)
        digest.update(np.ascontiguousarray(tokens[begin : begin + size], np.int32).tobytes())
        if mask is not None:
            digest.update(np.packbits(mask[:, begin : begin + size]).tobytes())
        key = digest.digest()
        keys.append(key)
    return keys
