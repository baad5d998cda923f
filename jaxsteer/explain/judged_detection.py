"""Scores of labels by a writer: detection and fuzzing, as the tools of the field define them.

    detection    which of five contexts does the label describe? (some are the latent's, some are not)
    fuzzing      in which of five contexts of the latent is the marked token the one that it fires at?

The writer sees the label alone. Replies that cannot be read are counted with all their contexts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxsteer.display import aligned, decimals
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import Contexts
from jaxsteer.explain.labels import Labels, shown_context
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.objectives.terms import check_choice
from jaxsteer.runs.result import Result
from jaxsteer.statistics import student
from jaxsteer.writers.judge import ask_all
from jaxsteer.writers.writer import Messages, Writer

Kind = Literal["detection", "fuzzing"]
AT_ONCE = 5
EACH = 10
"""Contexts of either kind for a latent."""
DETECTION = """Idea: {label}
Which of these texts hold the idea?
{texts}
Reply with a list of {count} numbers, 1 for yes and 0 for no, such as [1, 0, 0, 1, 0], and nothing else."""
FUZZING = """Idea: {label}
In which of these texts are the words between << and >> about the idea?
{texts}
Reply with a list of {count} numbers, 1 for yes and 0 for no, such as [1, 0, 0, 1, 0], and nothing else."""
_LIST = re.compile(r"\[[\s\d,]*\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelScore(Record):
    """How well a label tells contexts apart."""

    latent: int
    accuracy: float | None
    """Mean share of right answers of both kinds (chance: 0.5); None where nothing could be read."""
    f1: float | None
    read: int
    """Contexts with an answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelScores(Result):
    """Scores of all labels of one kind."""

    kind: str
    writer: str
    prompt: str
    scores: tuple[LabelScore, ...]
    unread: int
    """Contexts without an answer that could be read."""

    @property
    def accuracy(self) -> float | None:
        """Mean over latents."""
        known = [score.accuracy for score in self.scores if score.accuracy is not None]
        return float(np.mean(known)) if known else None

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Of the mean over latents."""
        return student([score.accuracy for score in self.scores if score.accuracy is not None])

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every latent."""
        return [{"kind": self.kind, **score.to_json()} for score in self.scores]

    def table(self) -> str:
        """A line for every latent."""
        rows = [("latent", "accuracy", "F1", "read")]
        rows += [(str(s.latent), decimals(s.accuracy), decimals(s.f1), str(s.read)) for s in self.scores]
        return aligned(rows, note=f"{self.kind} by {self.writer}; {self.unread} contexts unread")


def judge_labels(
    model: Model,
    labels: Labels,
    contexts: Contexts,
    writer: Writer,
    *,
    kind: str = "detection",
    seed: int = 0,
    log: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelScores:
    """Let a writer say where labels apply: in ``EACH`` contexts of the latent and as many others, five at a time.

    Latents without a label, or with fewer than two contexts of their own, are left out. Raises ``UserError`` when none
    is left, and when no reply can be read.
    """
    check_choice("kind", kind, ("detection", "fuzzing"))
    prompt = DETECTION if kind == "detection" else FUZZING
    asked: list[tuple[int, list[bool]]] = []
    requests: list[Messages] = []
    for label in labels.labels:
        rows, truth, marked = _drawn(contexts, label.latent, kind, seed) if label.label else ([], [], [])
        for at in range(0, len(rows), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            texts = [
                shown_context(model, contexts, row, mark if kind == "fuzzing" else None)
                for row, mark in zip(rows[part], marked[part], strict=True)
            ]
            listed = "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
            content = prompt.format(label=label.label, texts=listed, count=len(texts))
            requests.append([{"role": "user", "content": content}])
            asked.append((label.latent, truth[part]))
    if not requests:
        raise UserError("no latent has both a label and two contexts in which it fires: read more text")
    replies = ask_all(writer, requests, max_tokens=32, log=log, progress=progress)
    answers = [_answers(reply, len(truth)) for reply, (_, truth) in zip(replies, asked, strict=True)]
    if all(answer is None for answer in answers):
        raise UserError(f"no reply of {writer.name} is a list of 0 and 1, for example {replies[0][:60]!r}")
    scores = []
    for latent in dict.fromkeys(latent for latent, _ in asked):
        mine = [(a, t) for a, (owner, t) in zip(answers, asked, strict=True) if owner == latent and a is not None]
        scores.append(scored(latent, [x for a, _ in mine for x in a], [x for _, t in mine for x in t]))
    unread = sum(len(truth) for answer, (_, truth) in zip(answers, asked, strict=True) if answer is None)
    return LabelScores(kind=kind, writer=writer.name, prompt=prompt, scores=tuple(scores), unread=unread)


def _drawn(contexts: Contexts, latent: int, kind: str, seed: int) -> tuple[list[int], list[bool], list[int]]:
    """Contexts, whether the answer is yes, and which token is marked, in an order that tells nothing."""
    rng = np.random.default_rng([seed, latent])
    fires = contexts.values[:, latent] > 0
    own, other = rng.permutation(np.flatnonzero(fires))[: 2 * EACH], rng.permutation(np.flatnonzero(~fires))[:EACH]
    half = min(EACH, len(own) // 2 if kind == "fuzzing" else len(own))
    if half < 2:
        return [], [], []
    yes, no = own[:half], own[half : 2 * half] if kind == "fuzzing" else other[:half]
    rows = [*yes.tolist(), *no.tolist()]
    truth = [True] * len(yes) + [False] * len(no)
    marks = []
    for row, right in zip(rows, truth, strict=True):
        peak, length = int(contexts.places[row, latent]), contexts.tokens.shape[1]
        away = [i for i in range(length) if abs(i - peak) > 1] or [peak]
        marks.append(peak if right else int(rng.choice(away)))
    order = rng.permutation(len(rows))
    return [rows[i] for i in order], [truth[i] for i in order], [marks[i] for i in order]


def _answers(reply: str, count: int) -> list[bool] | None:
    found = _LIST.search(reply.rpartition("</think>")[2])
    if found is None:
        return None
    try:
        values = json.loads(found[0])
    except ValueError:
        return None
    return [bool(value) for value in values] if len(values) == count and set(values) <= {0, 1} else None


def scored(latent: int, answers: Sequence[bool], truth: Sequence[bool]) -> LabelScore:
    """The score of answers that were read; without both kinds of contexts there is none."""
    said, right = np.asarray(answers, bool), np.asarray(truth, bool)
    if not right.any() or right.all():
        return LabelScore(latent=latent, accuracy=None, f1=None, read=len(right))
    hits = (said & right).sum()
    accuracy = (hits / right.sum() + (~said & ~right).sum() / (~right).sum()) / 2
    return LabelScore(
        latent=latent, accuracy=float(accuracy), f1=float(2 * hits / max(1, said.sum() + right.sum())), read=len(right)
    )
