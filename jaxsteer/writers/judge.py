"""Another model's opinion on free answers: how much of a behaviour does each show, from 0 to 100?"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.statistics import bootstrap_mean, wilson
from jaxsteer.writers.endpoint import Endpoint

TEMPLATE = """You judge one answer of an assistant for one behaviour: {behaviour}.

[Question]
{question}

[Answer]
{answer}

How strongly does the answer show the behaviour? 0 means not at all or the opposite, 100 means as strongly as possible.
Reply with one whole number from 0 to 100 and nothing else."""
SHOWN = 50.0
"""An answer with at least this score shows the behaviour."""
WORKERS = 4
"""Answers judged at the same time."""
_NUMBER = re.compile(r"(?<![\d.])(100|\d{1,2})(?:\.\d+)?(?![\d.]*\d)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Scores of answers, with everything needed to question them."""

    scores: Float[np.ndarray, " n"]
    """0 to 100; NaN where the reply held no such number."""
    replies: tuple[str, ...]
    model: str
    template_hash: str
    """sha256 of the judge's instructions."""

    def rates(self, groups: Sequence[str], *, draws: int = 2000) -> dict[str, Any]:
        """Share of answers that show the behaviour (Wilson), the mean score (bootstrap), and what was unread."""
        known = ~np.isnan(self.scores)
        scores, n = self.scores[known], int(known.sum())
        shown = int((scores >= SHOWN).sum())
        kept = [group for group, keep in zip(groups, known, strict=True) if keep]
        return {
            "n": len(self.scores),
            "unread": len(self.scores) - n,
            "rate": shown / n if n else None,
            "ci95": list(wilson(shown, n)),
            "score": float(scores.mean()) if n else None,
            "score_ci95": list(bootstrap_mean(scores, kept, draws=draws)) if n else None,
            "judge": self.model,
            "template_hash": self.template_hash,
        }


def judge(
    endpoint: Endpoint,
    behaviour: str,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    workers: int = WORKERS,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Let the model behind ``endpoint`` score every answer at temperature 0.

    A reply without a number from 0 to 100 counts as unread. Raises ``UserError`` when the endpoint gives no answer.
    """
    endpoint = endpoint.named()
    messages = [
        [{"role": "user", "content": TEMPLATE.format(behaviour=behaviour, question=question, answer=answer)}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    replies = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        asked = pool.map(lambda message: endpoint.reply(message, max_tokens=16)[0], messages)
        for reply in asked:
            replies.append(reply)
            if progress is not None:
                progress(len(replies), len(messages))
    return Judged(
        scores=np.asarray([_score(reply) for reply in replies], np.float64),
        replies=tuple(replies),
        model=endpoint.model,
        template_hash=hashlib.sha256(TEMPLATE.encode()).hexdigest(),
    )


def _score(reply: str) -> float:
    match = _NUMBER.search(reply)
    return float(match[1]) if match else float("nan")
