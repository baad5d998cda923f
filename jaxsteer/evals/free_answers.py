"""Does a model that writes freely choose, and justify its choice, as its log-probabilities say?

Greedy answers to the questions of ``choice_eval``, read by rules: which choice is named, and for which side the rest
argues. A rule that finds nothing says so; the share of answers that could be read is reported with every rate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsteer.evals.choice import ChoiceResult
from jaxsteer.evals.rates import Difference, Flips, Rate
from jaxsteer.evals.word_odds import WordOdds
from jaxsteer.files.records import Record
from jaxsteer.personas import Item, orders, parse_choices
from jaxsteer.personas.items import normal
from jaxsteer.prompts import Placement, Turns, encode_texts, question_conversation, render
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import CountFrom0, Interval, Share, as_tuple
from jaxsteer.statistics import rate_interval
from jaxsteer.writers.judge import Judged

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.models.taps import Intervention

MAX_NEW_TOKENS = 32
PERSONA, OTHER, UNREAD = "persona", "other", ""
"""Whose choice, or whose argument, a text holds."""
Reasons = tuple[Sequence[str], Sequence[str]]
ILLUSION = "the rate moved, the replies did not"
"""What is said of a prompt that changes which reply is likelier, but not what the model writes."""
_LEADING = re.compile(r"\W*(?:answer|choice|option|i (?:choose|pick|prefer|take))?\W*([AB])(?![\w'])")
_BRACKETED = re.compile(r"\(([AB])\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenResult(Record):
    """What a model wrote under one prompt; rows are those of ``choice_eval`` on the same items."""

    prompt: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """The question of each."""
    texts: tuple[str, ...]
    chose: tuple[str, ...]
    """Per row: ``PERSONA``, ``OTHER``, or ``UNREAD`` where no choice was found."""
    argues: tuple[str, ...]
    """Per row: the side that the text argues for."""


def ask(
    model: Model,
    questions: Sequence[str | Turns],
    prompts: Sequence[str],
    *,
    placement: Placement = Placement(),
    max_new_tokens: int = MAX_NEW_TOKENS,
    edits: Intervention | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, ...]]:
    """Greedy answers to every question under every prompt: one tuple of texts per prompt."""
    prompts = as_tuple(prompts)
    rendered = [
        render(model.tokenizer, question_conversation(question, placement), prompt)
        for prompt in prompts
        for question in questions
    ]
    if not rendered:
        return [() for _ in prompts]
    made = generate(
        model,
        encode_texts(model.tokenizer, rendered, style=placement.style),
        temperature=0,
        max_new_tokens=max_new_tokens,
        edits=edits,
        progress=progress,
    )
    n = len(questions)
    return [made.texts[p * n : (p + 1) * n] for p in range(len(prompts))]


def written_eval(
    model: Model,
    items: Sequence[Item],
    prompts: Sequence[str],
    *,
    read_by: Reasons | WordOdds = ((), ()),
    placement: Placement = Placement(),
    max_new_tokens: int = MAX_NEW_TOKENS,
    edits: Intervention | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[WrittenResult]:
    """Let the model answer every item, in both orders of its choices, under every prompt ("" is zero-shot).

    ``read_by`` are sentences that are known to argue for the persona's answer and for the other one (without them, the
    rest of an answer argues for the choice whose text it repeats), or the odds of words that tell whose reply it is.
    """
    asked, prompts = [copy for item in items for copy in orders(item)], as_tuple(prompts)
    answers = ask(
        model, [item.asked for item in asked], prompts, placement=placement, max_new_tokens=max_new_tokens,
        edits=edits, progress=progress,
    )  # fmt: skip
    results = []
    for prompt, texts in zip(prompts, answers, strict=True):
        if isinstance(read_by, WordOdds):
            shown = [read_by.shows(text, prompt) for text in texts]
            found = [(UNREAD if one is None else PERSONA if one else OTHER, UNREAD) for one in shown]
        else:
            found = [read_answer(text, item, read_by) for text, item in zip(texts, asked, strict=True)]
        results.append(
            WrittenResult(
                prompt=prompt,
                ids=tuple(item.id for item in asked),
                groups=tuple(item.group for item in asked),
                texts=texts,
                chose=tuple(choice for choice, _ in found),
                argues=tuple(argued for _, argued in found),
            )
        )
    return results


def read_answer(text: str, item: Item, reasons: Reasons = ((), ())) -> tuple[str, str]:
    """(choice, side argued for) of one answer: ``PERSONA``, ``OTHER`` or ``UNREAD`` each."""
    choices = _choices(item)
    label, rest = _label(text) if item.lettered else ("", text)
    if not label:
        label = _named(text, choices)
        rest = text if item.lettered else _without(text, choices.get(label, ""))
    argued = _argued(rest, item, choices, reasons)
    if not label:
        return UNREAD, argued
    return (PERSONA if label == item.matching else OTHER), argued


def _choices(item: Item) -> dict[str, str]:
    """The text of each answer, by the answer."""
    if not item.lettered:
        return {answer: answer for answer in (item.matching, item.not_matching)}
    parsed = parse_choices(item.question)
    return dict(zip(("(A)", "(B)"), parsed.texts, strict=True))


def _label(text: str) -> tuple[str, str]:
    """The choice letter of an answer and what follows it; ("", text) where there is none.

    A letter counts at the start ("A", "(A)", "Answer: A."), unless an article may be meant, or in brackets anywhere.
    """
    match = _LEADING.match(text)
    if match and not (match[1] == "A" and re.match(r" [a-z]", text[match.end() :]) and "(" not in match[0]):
        return f"({match[1]})", text[match.end() :].lstrip(").:, ")
    if found := _BRACKETED.search(text):
        return found[0], text[found.end() :]
    return "", text


def _named(text: str, choices: dict[str, str]) -> str:
    """The one answer whose words stand in the text, or ""; the other may be a part of it ("No", "No way")."""
    said = _words(text)
    spelt = {answer: _words(words) for answer, words in choices.items()}
    found = [answer for answer, words in spelt.items() if words and f" {words} " in f" {said} "]
    if len(found) == 2:
        shorter, longer = sorted(found, key=lambda answer: len(spelt[answer]))
        apart = said.replace(spelt[longer], "")
        inside = spelt[shorter] in spelt[longer] and f" {spelt[shorter]} " not in f" {apart} "
        return longer if inside else ""
    return found[0] if found else ""


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", normal(text)))


def _without(text: str, words: str) -> str:
    """What follows the first occurrence of ``words``."""
    at = text.casefold().find(words.casefold()) if words else -1
    return text if at < 0 else text[at + len(words) :]


def _argued(rest: str, item: Item, choices: dict[str, str], reasons: Reasons) -> str:
    said = _words(rest)
    for_persona, for_other = (any(f" {_words(r)} " in f" {said} " for r in side) for side in reasons)
    if for_persona != for_other:
        return PERSONA if for_persona else OTHER
    if any(reasons):
        return UNREAD
    label = _named(rest, choices) or (_label(rest)[0] if item.lettered else "")
    if not label:
        return UNREAD
    return PERSONA if label == item.matching else OTHER


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenRates(Record):
    """What was written under one prompt, in numbers. ``None`` where there is nothing to divide by."""

    n: CountFrom0
    """Questions of which an answer could be read; each is answered once in either order of its choices."""
    read: Share | None
    """Share of answers that name a choice."""
    rate: Share | None
    """Share of those that name the persona's."""
    ci95: Interval
    """Of the rate, over questions."""
    argued: Share | None
    """Share of answers with a recognised argument."""
    accords: Share | None
    """Of those that also name a choice, the share that argues for the choice they name."""
    argued_rate: Share | None
    """Share of arguments that are for the persona's side."""
    distinct_3: Share | None
    """Distinct runs of three words over all of them; low when a text repeats itself."""
    copied: Share | None
    """Share of the prompt's words that answers repeat: a prompt may work by planting its own words."""
    agreement: Share | None = None
    """Share of read answers with the choice that log-probabilities prefer."""
    flips: Flips | None = None
    """Against the baseline, over answers read in both."""
    agreement_ci95: Interval | None = None
    difference: Difference | None = None
    """Of the rate, against the baseline, over answers read in both."""

    def at_worst(self, goal: str) -> float:
        """The rate if every answer that could not be read counted against the goal: what prompts are selected by."""
        read = self.read or 0.0
        return read * (self.rate or 0.0) + (1 - read) * (goal == "reduce")


def written_rates(
    result: WrittenResult, scored: ChoiceResult | None = None, baseline: WrittenResult | None = None
) -> WrittenRates:
    """The numbers of one prompt, beside log-probabilities (``scored``) and a ``baseline`` of the same items.

    Raises ``ValueError`` for other items.
    """
    chose, argues = np.asarray(result.chose), np.asarray(result.argues)
    read, argued = chose != UNREAD, argues != UNREAD
    persona, groups = chose == PERSONA, np.asarray(result.groups)
    agreement = agreement_ci95 = flips = difference = None
    if scored is not None:
        if scored.ids != result.ids:
            raise ValueError("the scores belong to other items: agreement is counted row by row")
        agrees = (np.where(scored.margin > 0, PERSONA, OTHER) == chose)[read]
        agreement, agreement_ci95 = _share(agrees), rate_interval(agrees, groups[read])
    if baseline is not None:
        if baseline.ids != result.ids:
            raise ValueError("the baseline answered other items: answers can only be paired on the same rows")
        before = np.asarray(baseline.chose)
        both = read & (before != UNREAD)
        flips = Flips.of(both * (persona.astype(int) - (before == PERSONA)), result.groups)
        if both.any():
            now, was = persona[both].astype(float), (before == PERSONA)[both].astype(float)
            difference = Difference.of_rates(now, was, list(groups[both]))
    return WrittenRates(
        n=len(set(groups[read])),
        read=_share(read),
        rate=_share(persona[read]),
        ci95=rate_interval(persona[read], groups[read]),
        argued=_share(argued),
        accords=_share((chose == argues)[read & argued]),
        argued_rate=_share((argues == PERSONA)[argued]),
        distinct_3=_mean([distinct_sequences(text, 3) for text in result.texts]),
        copied=_mean([_copied(text, result.prompt) for text in result.texts]),
        agreement=agreement,
        flips=flips,
        agreement_ci95=agreement_ci95,
        difference=difference,
    )


def is_illusion(rate: Rate | None, written: WrittenRates | None) -> bool:
    """Whether a rate moved against the baseline, beyond its interval, and the rate of free replies did not with it."""
    if rate is None or written is None or rate.difference is None or written.difference is None:
        return False
    moved, followed = (_direction(difference.ci95) for difference in (rate.difference, written.difference))
    return moved != 0 and followed != moved


def agreeing(judged: Judged, written: WrittenResult) -> Judged:
    """A judge's scores of the same answers, with how often the rule says as it does."""
    pairs = [
        (float((score >= judged.shown) == (chose == PERSONA)), group)
        for score, chose, group in zip(judged.scores, written.chose, written.groups, strict=True)
        if score is not None and chose != UNREAD
    ]
    agrees, groups = np.asarray([same for same, _ in pairs]), [group for _, group in pairs]
    return dataclasses.replace(judged, agreement=_share(agrees), agreement_ci95=rate_interval(agrees, groups))


def _direction(ci95: Interval | None) -> int:
    """Which side of zero an interval lies on; 0 where it holds zero."""
    low, high = ci95 or (0.0, 0.0)
    return int(low > 0) - int(high < 0)


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if flags.size else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def distinct_sequences(text: str, n: int) -> float | None:
    """Share of a text's sequences of ``n`` words that are not a repetition; None where it has none."""
    words = _words(text).split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None


def _copied(text: str, prompt: str) -> float | None:
    words = set(_words(prompt).split())
    return len(words & set(_words(text).split())) / len(words) if words else None
