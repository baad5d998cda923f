"""Questions with two answers, before and after: which flipped, which kept the persona, which moved the wrong way."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.display import ACCENT, MUTED, OTHER, Plot, decimals, in_style, panels, short
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.runs.files import CHOICES

SHOWN = 4
"""Questions of each kind that are shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedItem(Record):
    """A question of choices.json in words."""

    question: str
    persona: str
    """The answer that shows the persona."""
    other: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question, and the probability of the persona's answer (of the two, mean over both orders of the choices)."""

    item: AskedItem
    before: float
    after: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def title(self) -> str:
        """The question's first line, cut."""
        return short(self.item.question.strip().split("\n")[0], 90)


@dataclasses.dataclass(frozen=True)
class Answers:
    """All questions of a split under the selected prompt."""

    split: str
    every: tuple[Answer, ...]
    elicit: bool
    """Whether the persona was sought, and not driven out."""

    @property
    def kinds(self) -> list[tuple[str, int, list[Answer]]]:
        """(what happened, how many questions, the first few): flipped, kept, and moved the wrong way."""
        sign = -1 if self.elicit else 1
        away = [one for one in self.every if sign * (one.before - 0.5) > 0]
        flipped = sorted((one for one in away if sign * (one.after - 0.5) <= 0), key=lambda one: sign * one.change)
        kept = sorted((one for one in away if sign * (one.after - 0.5) > 0), key=lambda one: -sign * one.after)
        worse = sorted((one for one in self.every if sign * one.change > 0), key=lambda one: -sign * one.change)
        named = (("Flipped", flipped), ("Kept as they were", kept), ("Moved the wrong way", worse))
        return [(name, len(some), some[:SHOWN]) for name, some in named]

    @property
    def csv(self) -> str:
        """A data: address of all of them as CSV."""
        text = self.plot().csv()
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()

    @in_style
    def plot(self) -> Plot:
        """After against before, a point for each question."""
        figure, (axis,) = panels(width=4.2, height=4.0)
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1)
        axis.axvline(0.5, color=MUTED, linewidth=0.6, linestyle=":")
        axis.axhline(0.5, color=MUTED, linewidth=0.6, linestyle=":")
        tips = {}
        for at, one in enumerate(self.every):
            wrong = (one.change < 0) if self.elicit else (one.change > 0)
            gid = f"answer-{at}"
            axis.plot(one.before, one.after, "o", markersize=4, alpha=0.6, color=OTHER if wrong else ACCENT, gid=gid)
            tips[gid] = f"{short(one.item.question, 120)}: {decimals(one.before)} to {decimals(one.after)}"
        axis.set_xlim(-0.03, 1.03)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("P(persona's answer) without a prompt")
        axis.set_ylabel("with the selected prompt")
        rows = tuple({**one.item.to_json(), "before": one.before, "after": one.after} for one in self.every)
        return Plot(
            name="answers", title="Probability of the persona's answer, question by question, before and after",
            figure=figure, rows=rows, tips=tips,
        )  # fmt: skip


def read_answers(directory: Path, prompt: str | None, *, elicit: bool) -> Answers | None:
    """What the selected ``prompt`` did to every question; None where choices.json is not there, has no words (runs of
    older versions) or knows nothing of this prompt.

    Raises ``UserError`` for a file whose questions and numbers do not go together."""
    path = directory / CHOICES
    whole = read_json(path, nan=True) if prompt is not None and path.exists() else {}
    split = next((name for name in ("test", "validation") if name in whole), None)
    if split is None or "asked" not in whole[split]:
        return None
    found = whole[split]
    rows = {row["prompt"]: row["log_probs"] for row in found["prompts"]}
    if prompt not in rows or "" not in rows:
        return None
    asked = [AskedItem.from_json(one, f"{path}.{split}.asked[{i}]") for i, one in enumerate(found["asked"])]
    before, after = (_by_item(found, rows[text], path) for text in ("", prompt))
    if len(before) != len(asked):
        raise UserError(f"{path} has {len(asked)} questions in words and {len(before)} with numbers: it is damaged")
    every = tuple(Answer(item, float(b), float(a)) for item, b, a in zip(asked, before, after, strict=True))
    return Answers(split=split, every=every, elicit=elicit)


def _by_item(found: dict[str, Any], log_probs: Sequence[Sequence[float]], path: Path) -> np.ndarray:
    """Probability of the persona's answer to each question, both orders together."""
    n = len(found["ids"])
    if len(log_probs) != n or len(found["persona_first"]) != n:
        raise UserError(f"{path} has {n} questions and {len(log_probs)} pairs of numbers: it is damaged")
    shared = {name: value for name, value in found.items() if name not in ("prompts", "asked")}
    result = ChoiceResult.from_json({**shared, "prompt": "", "log_probs": log_probs, "joined": [0] * n})
    names = [one.removesuffix("~swapped") for one in result.ids]
    kinds, at = np.unique(names, return_inverse=True)
    order = list(dict.fromkeys(names))
    means = np.bincount(at, result.probability) / np.bincount(at)
    return means[np.searchsorted(kinds, order)]
