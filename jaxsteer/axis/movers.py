"""Which user messages move a conversation along an axis: what the model itself makes of them predicts what follows.

A message stands for itself: it is read alone, as a conversation of one turn, so that nothing of what was said before it
reaches the prediction. Ridge regression, cross-validated over conversations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.display import aligned, decimals, short
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.personas.passages import Passage
from jaxsteer.prompts import encode_turns
from jaxsteer.ranges import CountFrom0, Interval

FOLDS, LEAST, LEAST_MESSAGES = 5, 5, 20
"""Parts of the conversations; conversations and messages without which nothing is predicted."""
ALPHAS = tuple(10.0**k for k in range(-1, 6))
"""Penalties, of which leave-one-out within the training conversations chooses."""
SHUFFLES = 20
SHOWN = 5
"""Messages that are shown of either end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved(Record):
    """A user message and what became of the conversation."""

    id: str
    text: str
    change: float
    """Of the assistant's projection, from the turn before to the turn behind it; in units of the stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted(Record):
    """How well user messages predict something of the reply to them."""

    what: str
    n: CountFrom0
    """Messages."""
    r2: float
    """Of predictions for conversations that were not trained on; below 0 where they are worse than the mean."""
    shuffled: float
    """Mean of the same where the labels are exchanged at random."""
    shuffled_range: Interval
    """Their range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Movers(Record):
    """Which user messages move conversations along an axis."""

    site: str
    """Where messages were read: the mean of the stream over their tokens."""
    conversations: CountFrom0
    projection: Predicted
    change: Predicted
    away: tuple[Moved, ...]
    """Messages behind which the projection fell most, most first."""
    towards: tuple[Moved, ...]
    """And rose most."""

    def table(self) -> str:
        """How well they predict, and the messages of both ends."""
        rows = [("user messages predict", "n", "R2", "labels shuffled")]
        for one in (self.projection, self.change):
            low, high = one.shuffled_range
            control = f"{decimals(one.shuffled)} ({decimals(low)} to {decimals(high)})"
            rows.append((one.what, str(one.n), decimals(one.r2), control))
        note = (
            f"R2 of ridge regression from the mean of {self.site} over the message, cross-validated over "
            f"{self.conversations} conversations; labels shuffled: mean and range of {SHUFFLES}."
        )
        moved = [("change", "user message")]
        moved += [(f"{one.change:+.3g}", short(one.text, 90)) for one in (*self.away, *self.towards[::-1])]
        return f"{aligned(rows, note=note)}\n\n{aligned(moved, left=(1,))}"


def find_movers(
    model: Model, passages: Sequence[Passage], along: Sequence[Mapping[int, float]], site: str
) -> Movers | None:
    """How well the user messages predict the projection of the reply to them, and its change since the reply before.

    ``along`` are the projections of each passage's assistant turns by the number of the message. None for fewer than
    ``LEAST`` conversations with two replies, or ``LEAST_MESSAGES`` messages: nothing could be told from so few.
    """
    rows = [
        (number, turn, values[turn], values.get(turn - 2))
        for number, (passage, values) in enumerate(zip(passages, along, strict=True))
        for turn in values
        if turn and passage.messages and passage.messages[turn - 1]["role"] == "user"
    ]
    later = [row for row in rows if row[3] is not None]
    if len({row[0] for row in later}) < LEAST or len(later) < LEAST_MESSAGES:
        return None
    texts = [passages[number].messages[turn - 1]["content"] for number, turn, *_ in rows]
    states = embedded(model, texts, site)
    groups, targets = np.asarray([row[0] for row in rows]), np.asarray([row[2] for row in rows])
    which = np.asarray([row[3] is not None for row in rows])
    change = np.asarray([row[2] - row[3] for row in later if row[3] is not None])
    moved = [
        Moved(id=passages[row[0]].id, text=passages[row[0]].messages[row[1] - 1]["content"], change=float(by))
        for row, by in zip(later, change, strict=True)
    ]
    moved.sort(key=lambda one: one.change)
    return Movers(
        site=site,
        conversations=len(set(groups)),
        projection=predicted("the projection of the reply", states, targets, groups),
        change=predicted("its change since the reply before", states[which], change, groups[which]),
        away=tuple(one for one in moved[:SHOWN] if one.change < 0),
        towards=tuple(one for one in moved[: -SHOWN - 1 : -1] if one.change > 0),
    )


def embedded(model: Model, texts: Sequence[str], site: str) -> Float[np.ndarray, "n D"]:
    """Mean of the stream at a site over the tokens of each message, read alone."""
    distinct = list(dict.fromkeys(texts))
    rows = [encode_turns(model.tokenizer, [{"role": "user", "content": text}]) for text in distinct]
    masks = [row.mask("user") | (~row.mask("user").any() & row.mask()) for row in rows]
    found = np.zeros((len(rows), model.config.d_model), np.float32)
    for numbers, states in read_rows(model, [row.ids for row in rows], masks, direction_sites(model, site)):
        found[numbers] = states[0]
    return found[[distinct.index(text) for text in texts]]


def predicted(what: str, states: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> Predicted:
    """R2 of out-of-fold predictions of ``targets`` (n,) from ``states`` (n, D), folds made of whole groups."""
    rng = np.random.default_rng(0)
    controls = [_r2(states, rng.permutation(targets), groups) for _ in range(SHUFFLES)]
    return Predicted(
        what=what, n=len(targets), r2=_r2(states, targets, groups), shuffled=float(np.mean(controls)),
        shuffled_range=(min(controls), max(controls)),
    )  # fmt: skip


def _r2(states: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> float:
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found, states = np.zeros(len(targets)), states.astype(np.float64)
    for train, test in GroupKFold(min(FOLDS, len(set(groups)))).split(states, targets, groups):
        ridge = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
        found[test] = ridge.fit(states[train], targets[train]).predict(states[test])
    return float(r2_score(targets, found))
