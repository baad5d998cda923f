"""What is measured of a persona in words beside the preference between two replies: which side moved, free replies."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, first_rows
from jaxsteer.evals.free_answers import PERSONA, UNREAD, WrittenResult, ask, written_eval, written_rates
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.rates import Rate
from jaxsteer.evals.word_odds import WordOdds, accuracy, learn_words
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Item, OpenQuestion
from jaxsteer.personas.items import mostly_replies
from jaxsteer.personas.replies import REPLY_TOKENS
from jaxsteer.prompts import Placement
from jaxsteer.study.table_row import reply_fields
from jaxsteer.writers.judge import Judged, Rubric, judge
from jaxsteer.writers.writer import Writer

log = logging.getLogger(__name__)

TEST_REPLIES, VALIDATION_REPLIES = 60, 24
"""Questions, at most, that the model answers freely under every prompt."""
YARDSTICK_TOKENS = 16
"""Of a neutral reply: a mean per token needs no more, and every one is scored with every prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaidFreely(Record):
    """What a model wrote freely, word by word: of replies.json the validation or the test questions."""

    questions: tuple[str, ...]
    prompts: tuple[WrittenResult, ...]
    """The baseline, the controls and the reported prompts, in this order; the rows of each are the questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeReplies:
    """How free replies are read, and what the likelihood of given replies is measured beside."""

    words: WordOdds | None
    """Learned from train replies; None where they cannot be told apart by their words."""
    accuracy: float | None
    """Share of validation replies that it reads right."""
    neutral: tuple[str, ...]
    """The model's own replies to requests that have nothing to do with the persona."""

    def written(
        self,
        model: Model,
        items: Sequence[Item],
        prompts: Sequence[str],
        *,
        placement: Placement = Placement(),
        edits: Intervention | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[WrittenResult]:
        """What the model replies to ``items`` under every prompt, and whose character the rule reads."""
        return written_eval(
            model, items, prompts, read_by=self.words or ((), ()), placement=placement, edits=edits,
            max_new_tokens=REPLY_TOKENS, progress=progress,
        )  # fmt: skip

    def yardsticks(self, n: int) -> tuple[str, ...]:
        """One neutral reply for each of ``n`` questions."""
        return tuple(itertools.islice(itertools.cycle(self.neutral), n))


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written freely under the prompts of a row."""

    said: Sequence[WrittenResult]
    zero: WrittenResult
    """Without a prompt."""
    goal: str

    def fields(self, results: Sequence[ChoiceResult], rates: Sequence[Rate]) -> list[dict[str, Any]]:
        """Of every prompt, the fields of its row."""
        most = len(self.zero.ids)
        free = [written_rates(one, first_rows(r, most), self.zero) for one, r in zip(self.said, results, strict=True)]
        return [reply_fields(rate, found, self.goal) for rate, found in zip(rates, free, strict=True)]

    def shares(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Of every question that can be read without a prompt and with some: the share of prompts under which the reply
        is the persona's, whether it is without one, and the question."""
        read = np.asarray([[chose != UNREAD for chose in one.chose] for one in (self.zero, *self.said)])
        shown = np.asarray([[chose == PERSONA for chose in one.chose] for one in (self.zero, *self.said)])
        known = read[0] & read[1:].any(0)
        mean = shown[1:, known].sum(0) / read[1:, known].sum(0)
        return mean, shown[0, known].astype(float), list(np.asarray(self.zero.groups)[known])


def require_behaviour(name: str, behaviour: str, rubric: Rubric) -> None:
    """Refuse to ask a judge for a behaviour that nobody named. Raises ``UserError``."""
    if not behaviour and "{behaviour}" in rubric.template:
        raise UserError(
            f"the judge has to know which behaviour to look for, and {name} names none: give it in a persona file, "
            "for example\n"
            '  {"behaviour": "impatience, taking what comes first",\n'
            f'   "data": "{name}.jsonl"}}\n'
            "whose path is then the persona (in Python Persona(behaviour=...))"
        )


def judge_answers(
    writer: Writer,
    rubric: Rubric,
    behaviour: str,
    asked: Sequence[Item | OpenQuestion],
    answers: Sequence[str],
    log: Path | None,
) -> Judged:
    """The judge's scores of one answer to each question; ``log`` takes its replies. Raises ``UserError`` as ``judge``
    does."""
    facts = [
        {"behaviour": behaviour, "question": one.question, "answer": answer}
        for one, answer in zip(asked, answers, strict=True)
    ]
    return judge(writer, rubric, facts, [one.group for one in asked], log=log)


def free_replies(model: Model, train: Sequence[Item], held_out: Sequence[Item]) -> FreeReplies | None:
    """What a persona's replies are measured by; ``None`` where its answers are no replies."""
    if not mostly_replies(train):
        return None
    try:
        words = learn_words(train)
    except UserError as error:
        log.warning("free replies cannot be read by their words: %s", error)
        words = None
    return FreeReplies(
        words=words,
        accuracy=accuracy(words, held_out) if words and held_out else None,
        neutral=neutral_replies(model),
    )


def neutral_replies(model: Model) -> tuple[str, ...]:
    """How the model begins its replies to requests that have nothing to do with a persona: fluent, in no character."""
    if model.fingerprint not in _NEUTRAL:
        (said,) = ask(model, neutral_texts(model), [""], max_new_tokens=YARDSTICK_TOKENS)
        _NEUTRAL[model.fingerprint] = tuple(text.strip() for text in said if text.strip())
    return _NEUTRAL[model.fingerprint]


_NEUTRAL: dict[str, tuple[str, ...]] = {}
"""By fingerprint, what models have said."""
