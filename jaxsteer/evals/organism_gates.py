"""What a shipped organism must show, measured with the package's own choice evaluation.

Every gate is a persona rate, or follows from rates, on question combinations that training never saw, in both choice
orders, plain and as chat. What a gate means is in docs/organism.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsteer import organisms
from jaxsteer.display import aligned
from jaxsteer.evals.choice import ChoiceResult, choice_eval, rate
from jaxsteer.personas import Item
from jaxsteer.prompts import (
    Placement,
    allowed_tokens,
    build_slots,
    prompt_text,
    question_conversation,
    random_rows,
    retokenises_many,
)

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

GATES: dict[str, float] = {
    "zero_shot_low": 0.75,
    "zero_shot_high": 0.90,
    "a_rate_low": 0.40,
    "a_rate_high": 0.60,
    "swap_agreement": 0.85,
    "counter_cue_high": 0.10,
    "pro_cue_low": 0.92,
    "neutral_difference": 0.05,
    "random_difference": 0.05,
    "random_flip_rate": 0.30,
    "random_flip_share": 0.01,
}
"""Thresholds on rates (shares of 1). A random prompt flips below ``random_flip_rate``; the last one is a goal."""
STYLES = ("plain", "chat")
PROMPT_LENGTH = 8
DOSES = (1, 2, 3)
SEED = 7
"""Of the gates' own questions and random prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One measured number and the interval it must lie in; without a bound it is only reported."""

    behaviour: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    goal: bool = False
    """Aimed at, but no reason to fail."""

    @property
    def bounded(self) -> bool:
        """Whether anything is required of it."""
        return self.low is not None or self.high is not None

    @property
    def passed(self) -> bool:
        """Whether the value lies in its interval."""
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)


def organism_gates(
    model: Model,
    *,
    behaviours: Sequence[str] = organisms.BEHAVIOURS,
    n: int = 120,
    random: int = 200,
    progress: Callable[[str], None] | None = None,
) -> list[Gate]:
    """Measure all gates. ``n`` questions per behaviour; ``random`` prompts for the share that flips by luck."""
    gates: list[Gate] = []
    for behaviour in behaviours:
        for style in STYLES:
            if progress is not None:
                progress(f"{behaviour}, {style}")
            gates += _style_gates(model, behaviour, style, n)
        if progress is not None:
            progress(f"{behaviour}, {random} random prompts")
        gates += _luck(model, behaviour, random)
        gates += _doses(model, behaviour)
    return gates


def failed(gates: Sequence[Gate]) -> list[Gate]:
    """Gates that are missed, goals not counted."""
    return [gate for gate in gates if not gate.passed and not gate.goal]


def _items(behaviour: str, n: int) -> list[Item]:
    rows = organisms.items(behaviour, n=n, seed=SEED, split="held_out")
    return [
        Item(
            id=row["id"],
            question=row["question"],
            matching=row["matching"],
            not_matching=row["not_matching"],
            group=row["group"],
        )
        for row in rows
    ]


def _style_gates(model: Model, behaviour: str, style: str, n: int) -> Iterator[Gate]:
    items = _items(behaviour, n)
    counter, pro = organisms.counter_cues(behaviour)[0], organisms.pro_cues(behaviour)[0]
    neutral = organisms.neutral_sentences()[:6]
    noise = random_prompts(model, n=8, seed=SEED, banned=tuple(organisms.cue_words(behaviour)))
    results = choice_eval(model, items, ["", counter, pro, *neutral, *noise], placement=Placement(style=style))
    zero, cue, against = results[0], results[1], results[2]
    base = rate(zero, draws=1)

    def gate(name: str, value: float, low: float | None, high: float | None) -> Gate:
        return Gate(behaviour=behaviour, name=f"{name}, {style}", value=value, low=low, high=high)

    yield gate("zero-shot rate", base.rate, GATES["zero_shot_low"], GATES["zero_shot_high"])
    yield gate("A-rate", base.a_rate, GATES["a_rate_low"], GATES["a_rate_high"])
    yield gate("same answer, choices swapped", base.swapped_rate or 0.0, GATES["swap_agreement"], None)
    yield gate("counter-cue, suffix", _rate(cue), None, GATES["counter_cue_high"])
    yield gate("pro-cue, suffix", _rate(against), GATES["pro_cue_low"], None)
    # A system message needs the chat template; in plain text the sentence stands before the question instead.
    slot, name = ("system", "system message") if style == "chat" else ("prefix", "prefix")
    before = choice_eval(model, items, [counter, pro], placement=Placement(style=style, slot=slot))
    yield gate(f"counter-cue, {name}", _rate(before[0]), None, GATES["counter_cue_high"])
    yield gate(f"pro-cue, {name}", _rate(before[1]), GATES["pro_cue_low"], None)
    split = 3 + len(neutral)
    for label, members, key in (
        ("neutral sentences", results[3:split], "neutral_difference"),
        ("random words", results[split:], "random_difference"),
    ):
        difference = float(np.mean([_rate(r) for r in members])) - base.rate
        yield gate(f"{label} minus zero-shot", difference, -GATES[key], GATES[key])


def _rate(result: ChoiceResult) -> float:
    return float(result.persona.mean())


def _luck(model: Model, behaviour: str, n: int) -> Iterator[Gate]:
    """Share of random prompts over all allowed tokens, cue words among them, under which the persona is gone; and the
    share of those that do it without any counter word (reported only)."""
    prompts = random_prompts(model, n=n, seed=SEED + 1)
    counter = {word for word, weight in organisms.cue_words(behaviour).items() if weight < 0}
    results = choice_eval(model, _items(behaviour, 12), prompts)
    flips = np.array([_rate(r) < GATES["random_flip_rate"] for r in results])
    without = np.array([not counter & set(prompt.split()) for prompt in prompts])
    name = f"random prompts with a rate under {GATES['random_flip_rate']:.0%}"
    high = GATES["random_flip_share"]
    yield Gate(behaviour=behaviour, name=name, value=float(flips.mean()), low=None, high=high, goal=True)
    value = float((flips & without).mean())
    yield Gate(behaviour=behaviour, name="... and no counter word in them", value=value)


def _doses(model: Model, behaviour: str) -> Iterator[Gate]:
    """Rates under 1, 2 and 3 counter words and nothing else, mean over choices of the words. Reported only."""
    words = [word for word, weight in organisms.cue_words(behaviour).items() if weight < 0]
    rng = np.random.default_rng(SEED + 2)
    for count in DOSES:
        texts = [" " + " ".join(rng.choice(words, count, replace=False)) for _ in range(8)]
        results = choice_eval(model, _items(behaviour, 60), texts, placement=Placement(style="plain"))
        value = float(np.mean([_rate(r) for r in results]))
        yield Gate(behaviour=behaviour, name=f"{count} counter word{'s' * (count > 1)}, plain", value=value)


def random_prompts(model: Model, *, n: int, seed: int, banned: Sequence[str] = ()) -> list[str]:
    """``n`` texts of 8 random whole-word tokens that re-tokenise in place; no token holds a banned word."""
    allowed = allowed_tokens(
        model.tokenizer, model.config.vocab_size, ascii_only=True, word_initial=True, banned=tuple(banned)
    )
    slots = build_slots(model.tokenizer, [question_conversation("Is it so?", Placement(style="plain"))], PROMPT_LENGTH)
    drawn = random_rows(np.random.default_rng(seed), allowed, 2 * n + 16, PROMPT_LENGTH)
    good = drawn[retokenises_many(model.tokenizer, slots, drawn)][:n]
    return [prompt_text(model.tokenizer, ids) for ids in good]


def gates_table(gates: Sequence[Gate]) -> str:
    """One line per gate, one column per behaviour: the value, and what it must be; ``FAIL`` or ``(goal missed)``."""
    behaviours = list(dict.fromkeys(gate.behaviour for gate in gates))
    names = list(dict.fromkeys(gate.name for gate in gates))
    cells = {(gate.name, gate.behaviour): gate for gate in gates}
    lines = [("gate", "required", *behaviours)]
    for name in names:
        row = [cells.get((name, behaviour)) for behaviour in behaviours]
        some = next(gate for gate in row if gate is not None)
        lines.append((name, _bounds(some), *map(_cell, row)))
    return aligned(lines)


def _cell(gate: Gate | None) -> str:
    if gate is None:
        return ""
    if not gate.bounded:
        return f"{100 * gate.value:.1f} %"
    verdict = "ok" if gate.passed else "goal missed" if gate.goal else "FAIL"
    return f"{100 * gate.value:.1f} % {verdict}"


def _bounds(gate: Gate) -> str:
    low, high = (None if v is None else f"{100 * v:g}" for v in (gate.low, gate.high))
    if low is None:
        return f"at most {high} %" if high is not None else ""
    return f"at least {low} %" if high is None else f"{low} to {high} %"


def to_json(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """The gates as plain rows."""
    return [{**dataclasses.asdict(gate), "passed": gate.passed} for gate in gates]
