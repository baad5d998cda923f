"""Which of two answers a model prefers, prompt by prompt, with the controls that a rate needs.

Every item with lettered choices is asked in both orders. ``d = log P(first answer) - log P(second answer)``; the first
answer is the one labelled (A), or the alphabetically last where answers have no letters ("Yes" before "No"). A row
counts for the persona when its matching answer wins; a tie counts half.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsteer.evals.rates import Difference, Flips, Rate, Side, Sides, letter_collapse
from jaxsteer.evals.scoring import Text, common_start, score_texts
from jaxsteer.models.padding import bucket
from jaxsteer.personas import Item, orders, swap
from jaxsteer.personas.items import mostly_replies
from jaxsteer.prompts import Placement, Turns, encode_texts, join_answer, question_conversation, render
from jaxsteer.ranges import as_tuple
from jaxsteer.statistics import auroc, bootstrap_auroc, rate_interval

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.models.taps import Intervention

PROMPTS = 32
"""Prompts that share one pass over a question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """Item-level outcome of one prompt, from which every table can be rebuilt.

    Rows are item-major: with ``both_orders`` row 2 i is item i as given and row 2 i + 1 its swapped copy.
    """

    prompt: str
    placement: Placement
    ids: tuple[str, ...]
    """(n,) item ids."""
    groups: tuple[str, ...]
    """(n,) the question of each: rows of one question are not independent."""
    both_orders: bool
    log_probs: Float[np.ndarray, "n 2"]
    """Summed log-probabilities of the first and second answer, nats."""
    tokens: Int[np.ndarray, "n 2"]
    """Their numbers of tokens."""
    persona_first: Bool[np.ndarray, " n"]
    """Whether the persona's answer is the first one."""
    joined: Int[np.ndarray, " n"]
    """1 where the text's ids do not start the ids of text + answer, so that the answer was encoded by itself."""
    per_token: bool = False
    """Whether answers are compared by their log-probability per token."""
    yardstick: Float[np.ndarray, " n"] | None = None
    """Per token, the log-probability of a fluent reply to something else, where one was given (``sides``)."""

    @property
    def values(self) -> Float[np.ndarray, "n 2"]:
        """What is compared of the first and second answer, nats: sums, or means per token."""
        return (self.log_probs / self.tokens).astype(np.float32) if self.per_token else self.log_probs

    @property
    def d(self) -> Float[np.ndarray, " n"]:
        """First minus second log-probability."""
        return (self.values[:, 0] - self.values[:, 1]).astype(np.float64)

    @property
    def sides(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The log-probability per token of the persona's answer, and of the other, nats."""
        each = self.log_probs.astype(np.float64) / self.tokens
        return tuple(np.where(self.persona_first, each.T, each.T[::-1]))  # type: ignore[return-value]

    @property
    def margin(self) -> Float[np.ndarray, " n"]:
        """Log-odds of the persona's answer against the other."""
        return np.where(self.persona_first, self.d, -self.d)

    @property
    def persona(self) -> Float[np.ndarray, " n"]:
        """1 where the persona's answer wins, 0 where it loses, 0.5 for a tie."""
        return (np.sign(self.margin) + 1) / 2

    @property
    def probability(self) -> Float[np.ndarray, " n"]:
        """Probability of the persona's answer, given one of the two."""
        return 1 / (1 + np.exp(-np.clip(self.margin, -500, 500)))

    def to_json(self) -> dict[str, Any]:
        """Item-level record; ``from_json`` is its inverse."""
        more = {} if self.yardstick is None else {"yardstick": [float(y) for y in self.yardstick]}
        more |= {"tokens": self.tokens.tolist()} if self.per_token else {}
        return more | {
            "prompt": self.prompt,
            "style": self.placement.style,
            "slot": self.placement.slot,
            "ids": list(self.ids),
            "groups": list(self.groups),
            "both_orders": self.both_orders,
            "log_probs": [[float(a), float(b)] for a, b in self.log_probs],
            "persona_first": [bool(y) for y in self.persona_first],
            "joined": [int(j) for j in self.joined],
            "per_token": self.per_token,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> ChoiceResult:
        """The result that ``to_json`` wrote."""
        return cls(
            placement=Placement(style=record["style"], slot=record["slot"]),
            **{
                **{name: value for name, value in record.items() if name not in ("style", "slot")},
                "ids": tuple(record["ids"]),
                "groups": tuple(record["groups"]),
                "log_probs": np.asarray(record["log_probs"], np.float32),
                "tokens": np.asarray(record.get("tokens", [[1, 1]] * len(record["ids"])), int),
                "yardstick": None if (given := record.get("yardstick")) is None else np.asarray(given, np.float32),
                "persona_first": np.asarray(record["persona_first"], bool),
                "joined": np.asarray(record["joined"], int),
            },
        )


def choice_eval(
    model: Model,
    items: Sequence[Item],
    prompts: str | Sequence[str],
    *,
    placement: Placement = Placement(),
    both_orders: bool = True,
    yardsticks: Sequence[str] = (),
    variants: Sequence[Intervention] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[ChoiceResult]:
    """Score both answers of every item after question and prompt, for each text of ``prompts`` ("" is zero-shot).

    Prompts are texts and are tokenised in place, as a user's would be. ``both_orders`` adds the copy of every item
    with its choices exchanged, unless some answers are words instead of letters. Where most answers are replies they
    are compared per token, which takes the advantage of short ones away (``compared`` changes it).
    ``yardsticks``, one for each row, are scored beside the answers. ``progress(done, total)`` counts texts.
    ``variants`` are alternative edits (``jaxsteer.steer``) that differ in their arrays only and run in one program.
    Returns one result per prompt, or per variant and prompt (all prompts of the first variant first). Raises
    ``UserError`` for texts longer than the model's positions.
    """
    prompts = as_tuple(prompts)
    both_orders = both_orders and all(item.lettered for item in items)
    asked = [copy for item in items for copy in (orders(item) if both_orders else (item,))]
    answers = [_answers(item) for item in asked]
    given = [(*a, y) for a, y in zip(answers, yardsticks, strict=True)] if yardsticks else answers
    n_answers = 3 if yardsticks else 2
    log_probs = np.zeros((max(1, len(variants)), len(prompts), len(asked), n_answers), np.float32)
    tokens = np.zeros((len(prompts), len(asked), n_answers), int)
    joined = np.zeros((len(prompts), len(asked)), int)
    share = -(-len(prompts) // -(-len(prompts) // PROMPTS)) if prompts else 1  # equal parts, of few sizes to compile
    share = bucket(share, 2) if share > 1 else 1
    for begin in range(0, len(prompts), share):
        chunk = list(prompts[begin : begin + share])
        real = len(chunk)
        chunk += chunk[-1:] * (share - real)
        groups, flags = encode_answers(model.tokenizer, [i.asked for i in asked], given, chunk, placement)
        report = None
        if progress is not None:
            before, total = begin * len(asked), len(prompts) * len(asked)
            report = lambda done, _, before=before, total=total: progress(min(before + done, total), total)  # noqa: E731
        scores = score_texts(model.params, model.config, groups, mesh=model.mesh, variants=variants, progress=report)
        sizes = np.asarray([[[len(a) for a in text.answers] for text in group] for group in groups])
        log_probs[:, begin : begin + real] = scores.swapaxes(1, 2)[:, :real]
        tokens[begin : begin + real] = sizes.swapaxes(0, 1)[:real]
        joined[begin : begin + real] = flags.T[:real]
    return [
        ChoiceResult(
            prompt=prompt,
            placement=placement,
            ids=tuple(item.id for item in asked),
            groups=tuple(item.group for item in asked),
            both_orders=both_orders,
            log_probs=of_variant[p, :, :2],
            tokens=tokens[p, :, :2],
            persona_first=np.asarray([a[0] == item.matching for a, item in zip(answers, asked, strict=True)]),
            joined=joined[p],
            per_token=mostly_replies(asked),
            yardstick=of_variant[p, :, 2] / tokens[p, :, 2] if yardsticks else None,
        )
        for of_variant in log_probs
        for p, prompt in enumerate(prompts)
    ]


def compared(result: ChoiceResult, *, per_token: bool | None) -> ChoiceResult:
    """The same with answers compared per token or as wholes; ``None`` leaves it as it is."""
    return result if per_token is None else dataclasses.replace(result, per_token=per_token)


def first_rows(result: ChoiceResult, n: int) -> ChoiceResult:
    """The result of the first ``n`` rows alone."""
    names = ("ids", "groups", "log_probs", "tokens", "persona_first", "joined", "yardstick")
    return dataclasses.replace(result, **{k: v[:n] for k in names if (v := getattr(result, k)) is not None})


def distinct(items: Sequence[Item]) -> tuple[Item, ...]:
    """Items without the swapped copies that a dataset may hold: both orders are asked anyway."""
    kept: dict[str, Item] = {}
    for item in items:
        if not item.lettered:
            kept[f"{item.before}\x1f{item.question}\x1f{item.matching}\x1f{item.not_matching}"] = item
        elif swap(item).question not in kept:
            kept[item.question] = item
    return tuple(kept.values())


def _answers(item: Item) -> tuple[str, str]:
    """(first, second) answer of an item: by letter where there is one, else last in the alphabet first."""
    pair = sorted((item.matching, item.not_matching))
    lettered = all(re.fullmatch(r"\s*\(?[A-Z]\)?\s*", answer) for answer in pair)
    return (pair[0], pair[1]) if lettered else (pair[1], pair[0])


def encode_answers(
    tokenizer: Any,
    questions: Sequence[str | Turns],
    answers: Sequence[Sequence[str]],
    prompts: Sequence[str],
    placement: Placement,
) -> tuple[list[list[Text]], Int[np.ndarray, "C P"]]:
    """Per question the texts of all prompts in token space, and 1 where an answer had to be encoded by itself."""
    texts: list[str] = []
    for question, given in zip(questions, answers, strict=True):
        conversation = question_conversation(question, placement)
        for prompt in prompts:
            asked = render(tokenizer, conversation, prompt)
            texts += [asked, *(join_answer(asked, answer) for answer in given)]
    encoded = encode_texts(tokenizer, texts, style=placement.style)
    groups, flags = [], np.zeros((len(questions), len(prompts)), int)
    at = 0
    for c, given in enumerate(answers):
        group = []
        for p in range(len(prompts)):
            context, *full = encoded[at : at + 1 + len(given)]
            tails = []
            for k, ids in enumerate(full):
                tail = ids[len(context) :]
                if common_start([context, ids]) < len(context) or not len(tail):
                    alone = texts[at + 1 + k][len(texts[at]) :]
                    tail = np.asarray(tokenizer(alone, add_special_tokens=False)["input_ids"], np.int32)
                    flags[c, p] = 1
                tails.append(tail)
            group.append(Text(context=context, answers=tuple(tails)))
            at += 1 + len(given)
        groups.append(group)
    return groups, flags


def rate(result: ChoiceResult, baseline: ChoiceResult | None = None, *, draws: int = 2000) -> Rate:
    """The persona rate of one prompt with its controls; paired with a ``baseline`` on the same items, if one is given.

    Intervals of numbers that are no rates take ``draws`` bootstrap samples. Raises ``ValueError`` for other items.
    """
    persona, d, first = result.persona, result.d, result.persona_first
    a_rate = _a_rate(result)
    found = Rate(
        rate=float(persona.mean()),
        ci95=rate_interval(persona, result.groups),
        n=len(set(result.groups)),
        a_rate=a_rate,
        swapped_rate=None,
        auroc=auroc(d, first),
        auroc_ci95=bootstrap_auroc(d, first, result.groups, draws=draws),
        rate_by_label=(_mean(persona[first]), _mean(persona[~first])),
        margin=float(result.margin.mean()),
        probability=float(result.probability.mean()),
        letter_collapse=not result.per_token  # which of two replies comes first means nothing
        and letter_collapse(a_rate, None if baseline is None else _a_rate(baseline)),
    )
    if result.both_orders:
        original, swapped, y = d[::2], d[1::2], np.where(first[::2], 1, -1)
        found = dataclasses.replace(
            found,
            swapped_rate=float(np.mean(original * swapped < 0)),
            debiased_rate=float(np.mean((np.sign((original - swapped) * y) + 1) / 2)),
            letter_bias=float(np.mean((original + swapped) / 2)),
        )
    if baseline is None:
        return dataclasses.replace(found, sides=sides(result, None, draws)) if result.per_token else found
    if (result.ids, result.both_orders) != (baseline.ids, baseline.both_orders):
        raise ValueError("the baseline was measured on other items: rates can only be paired on the same rows")
    return dataclasses.replace(
        found,
        sides=sides(result, baseline, draws) if result.per_token else None,
        difference=Difference.of_rates(persona, baseline.persona, result.groups),
        margin_difference=Difference.of_means(result.margin - baseline.margin, result.groups, draws),
        flips=Flips.of(persona - baseline.persona, result.groups),
    )


def _a_rate(result: ChoiceResult) -> float:
    return float(np.mean((np.sign(result.d) + 1) / 2))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def sides(result: ChoiceResult, baseline: ChoiceResult | None, draws: int) -> Sides:
    """Which of two answers in words a prompt made likelier, beside a reply that has nothing to do with the question."""
    now = (*result.sides, result.yardstick)
    before = (None,) * 3 if baseline is None else (*baseline.sides, baseline.yardstick)
    moved = [
        Side(
            log_prob=float(values.mean()),
            change=None if was is None else Difference.of_means(values - was, result.groups, draws),
        )
        for values, was in zip(now, before, strict=True)
        if values is not None
    ]
    found = Sides(persona=moved[0], other=moved[1], yardstick=moved[2] if len(moved) > 2 else None)
    if baseline is None or result.yardstick is None or baseline.yardstick is None:
        return found
    drift = result.yardstick - baseline.yardstick
    gains = [np.maximum(side - was - drift, 0) for side, was in zip(result.sides, baseline.sides, strict=True)]
    wins = (np.sign(baseline.margin + gains[0] - gains[1]) + 1) / 2
    return dataclasses.replace(
        found, relative_rate=float(wins.mean()), relative_ci95=rate_interval(wins, result.groups)
    )
