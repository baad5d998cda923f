"""The bench: one model, the questions of a measurement, and the rows that are measured side by side on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxsteer.checkpoints.loading import ORGANISM
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, choice_eval, compared, rate
from jaxsteer.evals.fluency import prompt_perplexity
from jaxsteer.evals.free_answers import MAX_NEW_TOKENS, WrittenResult, agreeing, ask, written_eval, written_rates
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.organism_lookups import Lookups, lookup_accuracy
from jaxsteer.evals.persona_gates import is_persona_organism
from jaxsteer.evals.scoring import same_form
from jaxsteer.evals.side_effects import reply_effects
from jaxsteer.evals.truthful import truthful_eval, truthful_rates
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Item, OpenQuestion, orders, with_replies
from jaxsteer.personas.replies import REPLY_TOKENS
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.result import Unfinished
from jaxsteer.study.free_replies import FreeReplies, free_replies, judge_answers
from jaxsteer.study.measurement import Measured, Measurement, PromptEffects
from jaxsteer.study.questions import MeasureOptions, Questions, questions_of
from jaxsteer.writers.judge import Judged

OPEN_TOKENS = 128
"""Longest free answer to a question without choices."""
FLUENCY_QUESTIONS = 8
"""Questions after which a prompt's perplexity is measured."""

Result = TypeVar("Result")


def measured(bench: Bench, keep: Callable[[Measurement], None], log: Path | None) -> Measurement:
    """Everything that was asked for, on one model; ``keep`` gets what is there after every stage, the judge's last.

    Raises ``Unfinished`` when the judge gives no answer."""
    if bench.asked.bare is not None:
        with progress_bar("replies", unit="reply") as advance:
            answered = with_replies(bench.model, bench.asked.bare, progress=advance)
        bench = dataclasses.replace(bench, asked=questions_of(answered, bench.options))
    model, asked, options = bench.model, bench.asked, bench.options
    rows = [row for row, _ in bench.rows]

    def found(rows: Sequence[Measured]) -> Measurement:
        return Measurement(
            model=model.name,
            persona=asked.name,
            split=asked.split,
            style=options.placement.style,
            slot=options.placement.slot,
            questions=asked.count,
            goal=None if asked.goal == "reduce" else asked.goal,
            baseline=rows[0],
            prompts=tuple(row for row in rows[1:] if not row.control),
            controls=tuple(row for row in rows[1:] if row.control),
        )

    scored = bench.choices() if asked.items else []
    if scored:
        rows = [
            dataclasses.replace(row, rate=rate(result, _against(scored, result))) for row, result in zip(rows, scored)
        ]
        keep(found(rows))
    if asked.many:
        truths = bench.truths()
        rates = [truthful_rates(result, _against(truths, result)) for result in truths]
        rows = [dataclasses.replace(row, truthful=found) for row, found in zip(rows, rates, strict=True)]
        keep(found(rows))
    if options.side_effects:
        effects = bench.side_effects()
        rows = [dataclasses.replace(row, side_effects=e) for row, e in zip(rows, effects, strict=True)]
        keep(found(rows))
    if options.generate or options.judge is not None or bench.replies is not None:
        rows, written = bench.with_answers(rows, scored)
        keep(found(rows))
    for i, row in enumerate(rows if options.judge is not None else ()):
        try:
            with progress_bar(f"judge, {i + 1} of {len(rows)}"):
                judged = bench.judged(row.answers, log)
        except UserError as error:
            raise Unfinished(str(error), found(rows)) from error
        rows[i] = dataclasses.replace(row, judged=agreeing(judged, written[i]) if written else judged)
        keep(found(rows))
    return found(rows)


def _against(results: Sequence[Result], result: Result) -> Result | None:
    """The baseline that a result is paired with: the first one, which has none."""
    return None if result is results[0] else results[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One model with what is measured on it. Results are lists in the order of the rows."""

    model: Model
    asked: Questions
    rows: tuple[tuple[Measured, Intervention | None], ...]
    """Texts that are still to be measured, each with its edit, if it has one. The first is the baseline, which has
    neither."""
    options: MeasureOptions

    @property
    def texts(self) -> list[str]:
        """One per row."""
        return [row.prompt for row, _ in self.rows]

    @functools.cached_property
    def parts(self) -> list[tuple[list[str], list[Intervention], list[int]]]:
        """(texts, edits, numbers of rows) of what is measured together, all texts of the first edit first: the
        baseline, the texts without an edit, and edits that run in one program because they have one form and the same
        texts."""
        edits: dict[int, Intervention] = {}
        rows: dict[int, list[int]] = {}
        for i, (_, edit) in enumerate(self.rows[1:], 1):
            key = 0 if edit is None else id(edit)
            rows.setdefault(key, []).append(i)
            if edit is not None:
                edits[key] = edit
        parts = [([""], list[Intervention](), [0])]
        if plain := rows.pop(0, []):
            parts.append(([self.texts[i] for i in plain], [], plain))
        alike: dict[tuple[str, ...], list[int]] = {}
        for key, numbers in rows.items():
            alike.setdefault(tuple(self.texts[i] for i in numbers), []).append(key)
        for texts, keys in alike.items():
            for some in same_form([edits[key] for key in keys]):
                chosen = [keys[i] for i in some]
                parts.append((list(texts), [edits[key] for key in chosen], [i for key in chosen for i in rows[key]]))
        return parts

    def beside(self, what: str, evaluate: Callable[..., list[Result]]) -> list[Result]:
        """``evaluate(texts, edits, progress)`` of every part; none of the edits is none."""
        found: dict[int, Result] = {}
        with progress_bar(what, unit="row") as advance:
            for texts, edits, numbers in self.parts:
                found |= zip(numbers, evaluate(texts, edits, advance), strict=True)
        return [found[i] for i in range(len(self.rows))]

    def each(self, what: str, evaluate: Callable[..., list[Result]]) -> list[Result]:
        """``evaluate(texts, edit, progress)`` of every part, edit by edit; ``edit`` may be None."""
        return self.beside(
            what, lambda texts, edits, progress: [r for e in edits or [None] for r in evaluate(texts, e, progress)]
        )

    @functools.cached_property
    def replies(self) -> FreeReplies | None:
        """How replies are measured, where answers are replies."""
        with progress_bar("neutral replies"):
            return free_replies(self.model, self.asked.train, self.asked.held_out)

    def choices(self) -> list[ChoiceResult]:
        """Log-probabilities of two answers."""
        found = self.beside(
            "answers",
            lambda texts, edits, progress: choice_eval(
                self.model,
                self.asked.items,
                texts,
                variants=edits,
                placement=self.options.placement,
                progress=progress,
                yardsticks=() if self.replies is None else self.replies.yardsticks(len(self.asked.items)),
            ),
        )
        return [compared(result, per_token=self.options.per_token) for result in found]

    def truths(self) -> list[Any]:
        """Log-probabilities of many answers."""
        return self.beside(
            "many answers",
            lambda texts, edits, progress: truthful_eval(
                self.model,
                self.asked.many,
                texts,
                variants=edits,
                placement=self.options.placement,
                progress=progress,
            ),
        )

    def with_answers(
        self, rows: Sequence[Measured], scored: Sequence[ChoiceResult]
    ) -> tuple[list[Measured], list[WrittenResult]]:
        """The rows with what the model writes; and how rules read it, where there are answers to compare it with."""
        written: list[WrittenResult] = []
        model, placement, asked = self.model, self.options.placement, self.asked
        if asked.items:
            words = self.replies and self.replies.words
            most = REPLY_TOKENS if words else MAX_NEW_TOKENS
            written = self.each(
                "free answers",
                lambda texts, edits, progress: written_eval(
                    model, asked.items, texts, read_by=words or asked.reasons, edits=edits, placement=placement,
                    max_new_tokens=most, progress=progress,
                ),
            )  # fmt: skip
            rates = [written_rates(w, s, _against(written, w)) for w, s in zip(written, scored, strict=True)]
            rows = [
                dataclasses.replace(row, written=found, answers=result.texts)
                for row, found, result in zip(rows, rates, written, strict=True)
            ]
        else:
            answers = self.each(
                "free answers",
                lambda texts, edits, progress: ask(
                    model,
                    asked.texts,
                    texts,
                    max_new_tokens=OPEN_TOKENS,
                    edits=edits,
                    placement=placement,
                    progress=progress,
                ),
            )
            rows = [dataclasses.replace(row, answers=given) for row, given in zip(rows, answers, strict=True)]
        return list(rows), written

    def judged(self, answers: Sequence[str], log: Path | None) -> Judged:
        """The judge's scores of one row's answers; ``log`` takes its replies."""
        writer = self.options.judge
        assert writer is not None
        copies: Sequence[Item | OpenQuestion] = [copy for item in self.asked.items for copy in orders(item)]
        copies = copies or self.asked.open
        return judge_answers(writer, self.options.rubric, self.asked.behaviour, copies, answers, log)

    def side_effects(self) -> list[PromptEffects]:
        """Replies to neutral requests, look-ups of the organisms, and how likely the prompts are as text."""
        model, placement = self.model, self.options.placement
        neutral = neutral_texts(model)

        def replied(texts: list[str], edit: Intervention | None, _: Any) -> list[tuple[float, float, int]]:
            found = reply_effects(model, neutral, texts, edits=edit, placement=placement)
            return [(float(k), float(p), found.tokens) for k, p in zip(found.kl, found.perplexity, strict=True)]

        effects = self.each("side effects", replied)
        lookups: list[Lookups | None] = [None] * len(self.rows)
        if model.name.startswith(ORGANISM) and not is_persona_organism(model):
            lookups = [
                *self.each("look-ups", lambda texts, e, _: lookup_accuracy(model, texts, edits=e, placement=placement))
            ]
        questions = self.asked.texts[:FLUENCY_QUESTIONS]
        perplexity = prompt_perplexity(model, self.texts, questions, placement=placement)
        return [
            PromptEffects(
                kl=kl, reply_perplexity=replies, reply_tokens=tokens, lookups=asked, prompt_perplexity=perplexity[i]
            )
            for i, ((kl, replies, tokens), asked) in enumerate(zip(effects, lookups, strict=True))
        ]
