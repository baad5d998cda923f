"""``measure``: efficacy, paraphrases, neighbourhood, fluency and drift of every variant, in few passes each.

Rows of all facts, and of all their prompts, stand in the same batches; where every fact has a change of its own, so do
the rows. The unit of every interval is the fact (of drift the text).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxsteer.models.model import Model
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import CountFrom0, Seed
from jaxsteer.rewrite.editing import Rewrite
from jaxsteer.rewrite.facts import Fact
from jaxsteer.rewrite.result import Change, FactOutcome, FactRate, Mean, VariantRow
from jaxsteer.rewrite.rows import Row, answer_row
from jaxsteer.rewrite.scoring import drift, ngram_entropy, score_answers
from jaxsteer.rewrite.variants import PLAIN, Variant

NEUTRAL = (
    "The train was late again, so we waited on the platform and talked about the weather.",
    "To make the dough, mix the flour with warm water and a little salt, then let it rest.",
    "She closed the book, turned off the lamp and listened to the rain on the roof.",
    "A good carpenter measures twice before cutting a board once.",
    "The meeting begins at nine, and everybody is asked to bring their notes.",
    "Bees carry pollen from flower to flower while they look for nectar.",
    "He repaired the old bicycle and rode it along the canal every morning.",
    "If a number is divisible by four, then it is divisible by two as well.",
    "The children built a castle of sand and watched the tide take it away.",
    "Please water the plants on the balcony while we are on holiday.",
    "An engine turns the energy of its fuel into motion and heat.",
    "My neighbour plays the cello in the evening, softly, with the window open.",
    "The shop sells paper, ink, brushes and everything else that a painter needs.",
    "When the ice on the lake is thick enough, people skate to the other shore.",
    "Every loop in the program must end, or the test will never finish.",
    "They walked through the forest without a word until they reached the hut.",
)
"""Sentences about nothing in particular."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is written to measure fluency."""

    write: CountFrom0 = 60
    """Tokens written behind every prompt (0: none, no fluency)."""
    seed: Seed = 0
    """Seed of what is written, and of random changes."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """Rows of all prompts of one kind: the answer that ought to be likelier, then the other one."""

    facts: tuple[int, ...]
    wanted: tuple[Row, ...]
    other: tuple[Row | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Answers:
    """What became of one kind of prompt."""

    preferred: np.ndarray
    """Of prompts with another answer: whether the wanted one is likelier."""
    compared: tuple[int, ...]
    """Their facts."""
    said: np.ndarray
    log_prob: np.ndarray
    facts: tuple[int, ...]


def known_facts(model: Model, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts whose true answer the model gives greedily, and those that say none."""
    told = [i for i, fact in enumerate(facts) if fact.target_true]
    rows = [answer_row(model, facts[i].text, facts[i].target_true) for i in told]
    said = dict(zip(told, score_answers(model, rows, told, lambda _: None)[1], strict=True)) if rows else {}
    return tuple(fact for i, fact in enumerate(facts) if said.get(i, True))


def measure(
    model: Model,
    facts: Sequence[Fact],
    variants: Sequence[Variant],
    *,
    neutral: Sequence[str] = NEUTRAL,
    options: MeasureOptions = MeasureOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[VariantRow], dict[str, tuple[np.ndarray, np.ndarray, list[str]]]]:
    """A row for every variant, the first of which is the model as it is; and by variant for every fact the
    log-probability per token of the new answer, whether it is said, and what is written behind the prompt.
    """
    found, outcomes = list[VariantRow](), {}
    ids = [fact.id for fact in facts]
    before: _Answers | None = None
    for number, variant in enumerate(variants):
        prompts = _answers(model, variant, _of_prompts(model, facts, variant))
        others = _answers(model, variant, _of_paraphrases(model, facts, variant))
        near = _answers(model, variant, _of_neighbours(model, facts, variant))
        before = near if before is None else before
        texts = _written(model, facts, variant, options)
        found.append(
            VariantRow(
                name=variant.name,
                norm=variant.norm,
                efficacy=_rate(prompts.preferred, prompts.compared, ids),
                said=_rate(prompts.said, prompts.facts, ids),
                paraphrase=_rate(others.preferred, others.compared, ids),
                paraphrase_said=_rate(others.said, others.facts, ids),
                neighbourhood=_rate(near.preferred, near.compared, ids),
                neighbourhood_said=_rate(near.said, near.facts, ids),
                neighbourhood_lost=None
                if variant is variants[0]
                else Change.of(near.said, before.said, [ids[i] for i in near.facts]),
                entropy=Mean.of(np.asarray([ngram_entropy(text) for text in texts])) if options.write else None,
                drift=_drift(model, facts, variant, neutral),
            )
        )
        outcomes[variant.name] = (prompts.log_prob, prompts.said, texts)
        if progress is not None:
            progress(number + 1, len(variants))
    return found, outcomes


def outcomes_of(
    facts: Sequence[Fact], measured: dict, after: str, rewrite: Rewrite | None = None
) -> tuple[FactOutcome, ...]:
    """What became of every fact under the variant ``after``."""
    (before, _, _), (log_prob, said, texts) = measured[PLAIN.name], measured[after]
    found = []
    for i, fact in enumerate(facts):
        how: dict = {}
        if rewrite is not None:
            values = rewrite.values
            size = np.linalg.norm(values.change[i]) / np.linalg.norm(values.output[i])
            how = {
                "leverage": float(rewrite.leverage[i] / rewrite.keys.shape[1]),
                "size": float(size),
                "steps": int(values.steps[i]),
                "reached": float(rewrite.reached[i]),
                "wanted": float(values.probability[i]),
            }
        found.append(
            FactOutcome(
                id=fact.id, text=fact.text, true=fact.target_true, new=fact.target_new, before=float(before[i]),
                after=float(log_prob[i]), says=bool(said[i]), writes=texts[i] if texts else "", **how,
            )
        )  # fmt: skip
    return tuple(found)


def _rate(values: np.ndarray, facts: Sequence[int], ids: Sequence[str]) -> FactRate | None:
    return FactRate.of(values, [ids[i] for i in facts])


def _answers(model: Model, variant: Variant, asked: _Asked) -> _Answers:
    both = [i for i, other in enumerate(asked.other) if other is not None]
    rows = [*asked.wanted, *(other for other in asked.other if other is not None)]
    about = [*asked.facts, *(asked.facts[i] for i in both)]
    if not rows:
        return _Answers(preferred=np.zeros(0), compared=(), said=np.zeros(0), log_prob=np.zeros(0), facts=())
    log_prob, said = score_answers(model, rows, about, variant.edits)
    wanted, other = log_prob[: len(asked.wanted)], log_prob[len(asked.wanted) :]
    return _Answers(
        preferred=wanted[both] > other,
        compared=tuple(asked.facts[i] for i in both),
        said=said[: len(wanted)],
        log_prob=wanted,
        facts=asked.facts,
    )


def _asked(model: Model, prompts: Sequence[tuple[int, str, str, str]]) -> _Asked:
    """(fact, prompt, wanted answer, other answer or "") of every prompt."""
    return _Asked(
        facts=tuple(fact for fact, *_ in prompts),
        wanted=tuple(answer_row(model, prompt, wanted) for _, prompt, wanted, _ in prompts),
        other=tuple(answer_row(model, prompt, other) if other else None for _, prompt, _, other in prompts),
    )


def _of_prompts(model: Model, facts: Sequence[Fact], variant: Variant) -> _Asked:
    return _asked(
        model,
        [(i, variant.before(f) + f.text, f.target_new, f.target_true) for i, f in enumerate(facts)],
    )


def _of_paraphrases(model: Model, facts: Sequence[Fact], variant: Variant) -> _Asked:
    return _asked(
        model,
        [
            (i, variant.before(fact) + prompt, fact.target_new, fact.target_true)
            for i, fact in enumerate(facts)
            for prompt in fact.paraphrases
        ],
    )


def _of_neighbours(model: Model, facts: Sequence[Fact], variant: Variant) -> _Asked:
    return _asked(
        model,
        [
            (
                i,
                variant.before(fact) + near.prompt,
                near.answer,
                fact.target_new if fact.target_new != near.answer else "",
            )
            for i, fact in enumerate(facts)
            for near in fact.neighbourhood
        ],
    )


def _written(model: Model, facts: Sequence[Fact], variant: Variant, options: MeasureOptions) -> list[str]:
    """What is written behind every fact's prompt."""
    if not options.write:
        return []
    prompts = [variant.before(fact) + fact.text for fact in facts]
    edits = variant.edits(np.arange(len(facts)))
    made = generate(model, prompts, max_new_tokens=options.write, temperature=1.0, seed=options.seed, edits=edits)
    return list(made.texts)


def _drift(model: Model, facts: Sequence[Fact], variant: Variant, neutral: Sequence[str]) -> Mean | None:
    """Over texts; where every fact has its own change, text i is under that of fact i, both going round. None for what
    changes nothing about them."""
    if not neutral or (variant.together is None and variant.alone is None):
        return None
    count = len(neutral) if variant.alone is None else max(len(neutral), len(facts))
    about = [i % len(facts) for i in range(count)]
    return Mean.of(drift(model, [neutral[i % len(neutral)] for i in range(count)], about, variant.edits))
