"""What two runs have apart, as an object: KL and gained tokens of every place, beside random pushes of equal size.

Letters: S places, n tokens of all texts of the run, k top tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.display import Plot, aligned, decimals, short
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.lens.result import Arrays, LensReading, over_texts, spread, text_means, token_map
from jaxsteer.ranges import Interval
from jaxsteer.runs.result import Result

NAMED = 4
"""Words of a place that the table tells."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shift(Arrays):
    """Differences of places and tokens, as arrays; NaN and -1 where the base has no such token."""

    text: Int[np.ndarray, " n"]
    at: Int[np.ndarray, " n"]
    """The base's token, counted in its text; -1 for none."""
    kl: Float[np.ndarray, "S n"]
    """KL(run || base), nats."""
    gained_ids: Int[np.ndarray, "S n k"]
    """Tokens whose probability rises most, the strongest first."""
    gained: Float[np.ndarray, "S n k"]
    """By how much."""
    lost_ids: Int[np.ndarray, "S n k"]
    lost: Float[np.ndarray, "S n k"]
    """Below 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceChange(Record):
    """What two runs have apart at one place, in the mean over texts."""

    place: str
    kl: float
    """KL(run || base), nats."""
    kl_ci95: Interval | None = None
    controls: tuple[float, ...] = ()
    """The same of each control."""
    gained: tuple[str, ...]
    """Tokens that gain most probability, in the mean over tokens, with how much."""
    lost: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensComparison(Result):
    """Two runs read at the same places. Made by ``lens.compare``."""

    run: LensReading
    base: LensReading
    run_name: str
    base_name: str
    control_names: tuple[str, ...] = ()
    summary: tuple[PlaceChange, ...]
    words: Mapping[str, str]
    """The texts of ids that gain or lose, by the id in decimals."""
    shift: Shift

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every place."""
        return [
            {
                "place": one.place, "kl": one.kl, "kl_low": one.kl_ci95[0] if one.kl_ci95 else None,
                "kl_high": one.kl_ci95[1] if one.kl_ci95 else None, "gained": " ".join(one.gained),
                "lost": " ".join(one.lost), **dict(zip(self.control_names, one.controls, strict=True)),
            }
            for one in self.summary
        ]  # fmt: skip

    def table(self) -> str:
        """What the runs have apart at every place, then the run as it was read."""
        several = len(self.run.texts) > 1
        head = ["place", "KL", *["95 %"] * several, *self.control_names, "gained", "lost"]
        rows = [
            [
                one.place, decimals(one.kl, 3), *[spread(one.kl_ci95)] * several,
                *(decimals(value, 3) for value in one.controls), " ".join(one.gained), " ".join(one.lost),
            ]
            for one in self.summary
        ]  # fmt: skip
        last = len(head) - 1
        note = (
            f"KL({self.run_name} || {self.base_name}), nats, and change of probability in percent, in the mean over "
            f"tokens of both, of {len(self.run.texts)} text{'s' * several}; {self.run.lens} of {self.run.model}. "
            f"The last row is the effect on what the model says; KL of a random push of equal size stands beside."
        )
        return f"{aligned([head, *rows], left=(0, last - 1, last), note=note)}\n\n{self.run_name}:\n{self.run.table()}"

    def plot(self, text: int = 0) -> Plot:
        """A map of KL(run || base) over the places and the run's tokens."""
        if not 0 <= text < len(self.run.texts):
            raise UserError(f"there are texts 0 to {len(self.run.texts) - 1}, got {text}")
        here = self.shift.text == text
        ids = self.shift.gained_ids[:, here, 0]
        words = [[self.words.get(str(int(i)), "") for i in row] for row in ids]
        return token_map(
            f"lens-{text}-difference", f"KL({short(self.run_name, 30)} || {short(self.base_name, 30)}), nats",
            self.shift.kl[:, here], self.run.places, self.run.texts[text].tokens, words,
        )  # fmt: skip


def change_summary(
    places: Sequence[str], shift: Shift, controls: Sequence[Shift], words: Mapping[str, str]
) -> tuple[PlaceChange, ...]:
    """The summary of every place. Texts without a common token are left out."""
    kl, others = _means(shift), [_means(one) for one in controls]
    found = []
    for s, place in enumerate(places):
        value, ends = over_texts(kl[s])
        found.append(
            PlaceChange(
                place=place,
                kl=value,
                kl_ci95=ends,
                controls=tuple(over_texts(other[s])[0] for other in others),
                gained=_named(shift.gained_ids[s], shift.gained[s], words),
                lost=_named(shift.lost_ids[s], shift.lost[s], words),
            )  # fmt: skip
        )
    return tuple(found)


def _means(shift: Shift) -> Float[np.ndarray, "S texts"]:
    there = shift.at >= 0
    return text_means(shift.kl[:, there], shift.text[there]) if there.any() else np.full((len(shift.kl), 1), np.nan)


def _named(ids: np.ndarray, values: np.ndarray, words: Mapping[str, str]) -> tuple[str, ...]:
    """The tokens of the largest mean changes, with these in percent."""
    there = ids >= 0
    if not there.any():
        return ()
    sums = np.bincount(ids[there], weights=values[there]) / len(np.flatnonzero(there[:, 0]))
    order = np.argsort(-np.abs(sums))[:NAMED]
    return tuple(f"{words.get(str(int(i)), '').strip() or repr(words.get(str(int(i)), ''))} {100 * sums[i]:+.2g}"
                 for i in order if sums[i])  # fmt: skip
