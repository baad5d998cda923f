"""What a probe is fitted on: rows of tokens, where they are read, labels, groups, folds, and labels that mean nothing.

Letters: n texts, P positions, T tokens, C label sets: the true one, control tasks, shuffled ones.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import StratifiedGroupKFold

from jaxsteer.errors import UserError
from jaxsteer.lens.records import TextRecord
from jaxsteer.lens.texts import rows_of_texts
from jaxsteer.models.model import Model
from jaxsteer.models.roles import Rendered

POSITIONS = ("last", "mean", "prompt", "response")
"""Names of positions; numbers count tokens, from the end where they are negative."""
_TRIES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Texts with two labels."""

    rows: tuple[Rendered, ...]
    labels: Bool[np.ndarray, " n"]
    """True for the positive one."""
    names: tuple[str, str]
    """Of the positive label and of the other ("not X" where there are several)."""
    groups: tuple[str, ...]
    """By default every text is its own."""
    types: tuple[str, ...]
    """What a control task labels; "" where nobody said."""

    @property
    def ids(self) -> list[np.ndarray]:
        """Token ids of the rows."""
        return [row.ids for row in self.rows]


def probe_data(model: Model, records: Sequence[TextRecord], positive: str | None = None) -> ProbeData:
    """Labelled texts as rows; ``positive`` is the label that is True, by default the last in alphabetical order.

    Of more than two labels it is told from all others. Raises ``UserError`` for texts without labels, for one label
    only, for more than two where nobody says which is positive, and for one that no text has.
    """
    if unlabelled := [i for i, record in enumerate(records, 1) if not record.label]:
        raise UserError(
            f"text {unlabelled[0]} has no label (and {len(unlabelled)} of {len(records)}): give one to each"
        )
    names = sorted({record.label for record in records})
    if len(names) < 2:
        raise UserError(
            f"all {len(records)} texts have the label {', '.join(map(repr, names))}: a probe tells two apart"
        )
    if positive is None and len(names) > 2:
        raise UserError(
            f"there are {len(names)} labels ({', '.join(names[:6])}): say with --positive which is told from the rest"
        )
    positive = names[-1] if positive is None else positive
    if positive not in names:
        raise UserError(f"no text has the label {positive!r}; there are {', '.join(names[:6])}")
    other = next(name for name in names if name != positive) if len(names) == 2 else f"not {positive}"
    return ProbeData(
        rows=tuple(rows_of_texts(model, [record.said for record in records])),
        labels=np.asarray([record.label == positive for record in records]),
        names=(positive, other),
        groups=tuple(record.group or f"text {i}" for i, record in enumerate(records)),
        types=tuple(record.type for record in records),
    )


def split_folds(data: ProbeData, folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """The fold of every text: groups stay together, and each fold has about its share of both labels.

    Raises ``UserError`` for fewer than 3 folds, fewer groups than folds, and a label that is missing outside of a fold
    and the next one, on which the penalty is chosen.
    """
    groups = len(set(data.groups))
    if folds < 3:
        raise UserError(f"a probe needs 3 folds or more, to fit, to choose its penalty and to test; got {folds}")
    if groups < folds:
        raise UserError(
            f"{len(data.labels)} texts of {groups} groups cannot be divided into {folds} folds without tearing a group "
            f"apart: give more groups, or --folds {groups}" + (" (at least 3)" if groups < 3 else "")
        )
    if (least := min(Counter(data.labels.tolist()).values())) < folds:
        raise UserError(f"one label has {least} texts, fewer than the {folds} folds: give more texts, or fewer folds")
    found = np.zeros(len(data.labels), np.int32)
    divide = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % (1 << 32))
    for fold, (_, inside) in enumerate(divide.split(np.zeros(len(found)), data.labels, data.groups)):
        found[inside] = fold
    for fold in range(folds):
        fitted, chosen = ~np.isin(found, [fold, (fold + 1) % folds]), found == (fold + 1) % folds
        if not chosen.any() or len(np.unique(data.labels[fitted])) < 2:
            raise UserError(
                f"the groups are too few or too uneven for {folds} folds: what is left to fit on has one label only. "
                f"Give more groups, or other --folds"
            )
    return found


def read_weights(row: Rendered, positions: Sequence[str]) -> Float[np.ndarray, "P T"]:
    """Weights of a row's tokens for every position: one token, or the mean over some.

    "last" is the last token, "mean" all but the first (an attention sink), "prompt" the last before the assistant's
    last reply, "response" the mean over that. Raises ``UserError`` for a row that has no such tokens.
    """
    length = len(row.ids)
    reply = row.mask("assistant", turns=[-1]) if row.turns else np.zeros(length, bool)
    found = np.zeros((len(positions), length), np.float32)
    for at, name in enumerate(positions):
        if name == "mean":
            chosen = np.arange(length) >= min(1, length - 1)
        elif name == "response":
            chosen = reply
        elif name == "prompt":
            chosen = np.arange(length) == (int(reply.argmax()) if reply.any() else length) - 1
        else:
            number = length - 1 if name == "last" else int(name)
            chosen = np.arange(length) == (number + length if number < 0 else number)
        if not chosen.any():
            raise UserError(f"a text of {length} tokens has none at position {name!r}")
        found[at] = chosen / chosen.sum()
    return found


def check_positions(positions: Sequence[str]) -> None:
    """Raise ``UserError`` for a name that is neither one of ``POSITIONS`` nor a number, for none, and for one twice."""
    for name in positions:
        if name not in POSITIONS and not name.removeprefix("-").isdecimal():
            raise UserError(f"unknown position {name!r}: expected {', '.join(POSITIONS)} or the number of a token")
    if not positions or len(set(positions)) < len(positions):
        raise UserError("positions must be one or more, and each of them once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSets:
    """Labels to fit, for every position."""

    columns: Float[np.ndarray, "P n C"]
    """The true ones, then those of control tasks, then shuffled ones."""
    controls: int
    types: tuple[int, ...]
    """How many types the control task has, for every position."""
    repeated: tuple[float, ...]
    """Share of texts whose type also stands outside of their fold: only there can a probe know a type by heart."""


def label_sets(
    data: ProbeData, weights: Sequence[np.ndarray], fold: np.ndarray, *, controls: int, shuffles: int, seed: int
) -> LabelSets:
    """The true labels beside those that say what a probe can learn by heart (Hewitt and Liang 2019).

    A control task gives every type a random label, as often positive as the true one is. The type is that of the
    record, else the token that is read; where a mean is read, or all texts share a token, the text itself. Shuffled
    labels are the true ones in another order.
    """
    rng, share = np.random.default_rng([seed, 2]), float(data.labels.mean())
    columns, counts, repeated = [], [], []
    for at in range(len(weights[0])):
        types = _types(data, [row[at] for row in weights])
        drawn = [_random_labels(types, share, rng) for _ in range(controls)]
        if any(labels is None for labels in drawn):
            types = np.arange(len(data.rows))
            drawn = [_random_labels(types, share, rng) for _ in range(controls)]
        mixed = [rng.permutation(data.labels) for _ in range(shuffles)]
        columns.append(np.stack([data.labels, *[d for d in drawn if d is not None], *mixed], -1).astype(np.float32))
        outside = [np.isin(types[i], types[fold != fold[i]]) for i in range(len(types))]
        counts.append(len(np.unique(types)))
        repeated.append(float(np.mean(outside)))
    return LabelSets(columns=np.stack(columns), controls=controls, types=tuple(counts), repeated=tuple(repeated))


def _types(data: ProbeData, weights: Sequence[np.ndarray]) -> Int[np.ndarray, " n"]:
    """The number of every text's type."""
    own: list[str] = []
    for number, (row, weight) in enumerate(zip(data.rows, weights, strict=True)):
        read = np.flatnonzero(weight)
        token = f"token {row.ids[read[0]]}" if len(read) == 1 else f"text {number}"
        own.append(data.types[number] or token)
    found: np.ndarray = np.unique(own, return_inverse=True)[1]
    return found


def _random_labels(types: np.ndarray, share: float, rng: np.random.Generator) -> Bool[np.ndarray, " n"] | None:
    """A random label for every type, so that both occur in at least half of their ``share``; None if that cannot be."""
    least = min(share, 1 - share) / 2
    for _ in range(_TRIES):
        labels: np.ndarray = (rng.uniform(size=types.max() + 1) < share)[types]
        if least <= labels.mean() <= 1 - least:
            return labels
    return None
