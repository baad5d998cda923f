"""Opinions on free answers: a writer scores each by a rubric."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxsteer.files.records import Record
from jaxsteer.statistics import bootstrap_mean, wilson
from jaxsteer.writers.writer import Advance, Writer

_NUMBER = re.compile(r"(?<![\d.])(\d+)(?:\.\d+)?(?![\d.]*\d)")


def first_number(reply: str, scale: tuple[float, float]) -> float | None:
    """The whole part of the first number in a reply that lies on the scale; None where there is none."""
    found = (float(match[1]) for match in _NUMBER.finditer(reply))
    return next((number for number in found if scale[0] <= number <= scale[1]), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rubric:
    """What is asked about an answer, and how the reply is read."""

    template: str
    """The request, with the names of facts in braces, as ``str.format`` fills them in."""
    scale: tuple[float, float] = (0.0, 100.0)
    """The lowest and the highest score."""
    shown: float = 50.0
    """An answer with at least this score shows what is asked about."""
    read: Callable[[str, tuple[float, float]], float | None] = first_number
    """From a reply and the scale to a score; None where the reply holds none."""

    @property
    def template_hash(self) -> str:
        """sha256 of the template."""
        return hashlib.sha256(self.template.encode()).hexdigest()


BEHAVIOUR = Rubric(
    template="""You judge one answer of an assistant for one behaviour: {behaviour}.

[Question]
{question}

[Answer]
{answer}

How strongly does the answer show the behaviour? 0 means not at all or the opposite, 100 means as strongly as possible.
Reply with one whole number from 0 to 100 and nothing else."""
)
"""How much of a behaviour does an answer show? Facts: behaviour, question, answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(Record):
    """Scores of answers, with everything needed to question them."""

    n: int
    """Answers."""
    unread: int
    """Replies without a score, which count nowhere else."""
    rate: float | None
    """Share of answers with at least the rubric's ``shown``; None where no reply was read."""
    ci95: tuple[float, float]
    """Wilson interval of the rate."""
    score: float | None
    """Mean score."""
    score_ci95: tuple[float, float] | None
    """Bootstrap interval of the mean over groups."""
    judge: str
    """Name of the writer."""
    template_hash: str
    """sha256 of the judge's instructions."""
    scale: tuple[float, float] = (0.0, 100.0)
    """The lowest and the highest score that were asked for."""
    shown: float = 50.0
    """The score from which an answer shows what was asked about."""
    scores: tuple[float | None, ...]
    replies: tuple[str, ...]


def judge(
    writer: Writer,
    rubric: Rubric,
    facts: Sequence[Mapping[str, str]],
    groups: Sequence[str],
    *,
    max_tokens: int = 16,
    draws: int = 2000,
    progress: Advance | None = None,
) -> Judged:
    """Let ``writer`` score every answer at temperature 0; ``facts`` fill the rubric's template, answer by answer.

    ``groups`` names what stands and falls together in the bootstrap (the question of every answer, usually). Raises
    ``UserError`` when the writer gives no reply.
    """
    requests = [[{"role": "user", "content": rubric.template.format(**named)}] for named in facts]
    name = writer.name  # an endpoint that is not there fails here
    replies = writer.reply_each(requests, max_tokens=max_tokens, progress=progress)
    scores = [rubric.read(reply, rubric.scale) for reply in replies]
    known = np.asarray([score for score in scores if score is not None], np.float64)
    kept = [group for group, score in zip(groups, scores, strict=True) if score is not None]
    shown = int((known >= rubric.shown).sum())
    return Judged(
        n=len(scores),
        unread=len(scores) - len(known),
        rate=shown / len(known) if len(known) else None,
        ci95=wilson(shown, len(known)),
        score=float(known.mean()) if len(known) else None,
        score_ci95=bootstrap_mean(known, kept, draws=draws) if len(known) else None,
        judge=name,
        template_hash=rubric.template_hash,
        scale=rubric.scale,
        shown=rubric.shown,
        scores=tuple(scores),
        replies=tuple(replies),
    )
