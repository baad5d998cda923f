"""Sources of patches that are made from texts: rows drawn from one another, and texts of other lengths laid alongside.

Letters: B rows, T tokens of a row, U tokens of its source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import struct
from jaxtyping import Array, Int

from jaxsteer.circuits.rows import Rows
from jaxsteer.errors import UserError
from jaxsteer.lens.differences import by_ends
from jaxsteer.models.sites import KINDS


def resampled(rows: Rows, source: Rows | None = None, *, draws: int = 4, seed: int = 0) -> tuple[Rows, Rows]:
    """``draws`` copies of the rows, and for each a source from among the rows of ``source`` that have as many tokens.

    For resample ablation: give both to ``patch``, ``patch_edges``, ``attribute_edges`` or ``run_circuits``, whose means
    are then also over the draws. Copy i of row b is row ``i * B + b``: intervals must resample b.

    A draw permutes the source's rows among those of equal length. Without ``source`` rows are drawn from one another,
    and none from itself. Raises ``UserError`` where rows and source have not as many rows of each length, and for a row
    that has no other of its length.
    """
    if draws < 1:
        raise UserError(f"draws must be at least 1, got {draws}")
    rng, own = np.random.default_rng(seed), rows.lengths
    theirs = own if source is None else source.lengths
    chosen = np.zeros((draws, len(own)), int)
    for length in np.unique(np.concatenate([own, theirs])):
        here, there = np.flatnonzero(own == length), np.flatnonzero(theirs == length)
        if len(here) != len(there):
            raise UserError(
                f"{len(here)} rows have {length} tokens, and {len(there)} of the source: values go from token to token"
            )
        if source is None and len(here) == 1:
            raise UserError(
                f"row {here[0]} is the only one of {length} tokens, so that it could only be drawn from itself: give "
                f"texts of equally many tokens"
            )
        for draw in range(draws):
            order = rng.permutation(there)
            # Along a random circle no row meets itself.
            chosen[draw, order if source is None else here] = np.roll(order, 1) if source is None else order
    return rows.take(np.tile(np.arange(len(own)), draws)), (source or rows).take(chosen.ravel())


@struct.dataclass
class Aligned:
    """A source of texts of other lengths, and which of its tokens each token is patched from. Made by ``align``."""

    rows: Rows
    """The source's texts."""
    at: Int[Array | np.ndarray, "B T"]
    """For every token of the patched rows the token of the source, or -1 where there is none: nothing is patched."""


def align(rows: Rows, source: Rows, how: str | Sequence[Sequence[int]] = "ends") -> Aligned:
    """The texts of ``source`` laid alongside ``rows``, for ``patch``.

    Args:
        how: "ends": the longest common beginning and the longest common end of each pair of texts, and what lies
            between if it is equally long; "last": counted from the last token. Or for each row a list with the token of
            the source for each of its tokens, -1 for none.

    Raises:
        UserError: for another number of rows, lists of another length, and tokens that the source does not have.
    """
    count = len(rows.tokens)
    if len(source.tokens) != count:
        raise UserError(f"{count} rows cannot be patched from {len(source.tokens)}: give one for each")
    if isinstance(how, str) and how not in ("ends", "last"):
        raise UserError(f"texts are aligned by 'ends', by 'last', or by a list for each row, got {how!r:.60}")
    if not isinstance(how, str) and len(how) != count:
        raise UserError(f"give a list of tokens for each of {count} rows, got {len(how)}")
    at = np.full(np.shape(rows.tokens), -1, np.int32)
    for row, (own, theirs) in enumerate(zip(rows.lengths, source.lengths, strict=True)):
        if how == "ends":
            found = by_ends(np.asarray(rows.tokens)[row, :own], np.asarray(source.tokens)[row, :theirs])
        elif how == "last":
            found = np.maximum(np.arange(own) + theirs - own, -1)
        else:
            found = np.asarray(how[row])
            if found.shape != (own,) or found.dtype.kind not in "iu" or found.min() < -1 or found.max() >= theirs:
                raise UserError(
                    f"row {row} has {own} tokens and its source has {theirs}: give {own} whole numbers from -1 (none) "
                    f"to {theirs - 1}, got {how[row]!r:.80}"
                )
        at[row, :own] = found
    return Aligned(rows=source, at=at)


def check_alignment(rows: Rows, source: Aligned, kind: str) -> None:
    """Refuse an alignment of other rows, and sites whose values belong to two tokens (``UserError``)."""
    if np.shape(source.at) != np.shape(rows.tokens):
        raise UserError(f"the texts were aligned with other rows: {np.shape(source.at)} and {np.shape(rows.tokens)}")
    if KINDS[kind].over_keys:
        raise UserError(
            f"{kind} has a value for every two tokens, which cannot be aligned: choose a site with one each"
        )
