"""The questions of one measurement, and what is measured on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import distinct
from jaxsteer.personas import (
    Dataset,
    Item,
    OpenQuestion,
    Persona,
    load_dataset,
    load_persona,
    number_of_questions,
    split,
)
from jaxsteer.personas.sources import find_source
from jaxsteer.prompts import Placement, Turns
from jaxsteer.ranges import Seed, check_ranges
from jaxsteer.study.free_replies import require_behaviour
from jaxsteer.writers.judge import BEHAVIOUR, Rubric
from jaxsteer.writers.writer import Writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured, and on which questions."""

    placement: Placement = Placement()
    """How questions are asked and where the prompt stands."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Which questions."""
    questions: int | None = None
    """At most this many of them (default: all)."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    per_token: bool | None = None
    """Compare answers by their log-probability per token, which matters where they differ in length (default: where
    they are replies of several words)."""
    generate: bool = False
    """Also let the model answer freely, and read by rules what it chooses and argues for."""
    judge: Writer | None = None
    """Also let it score the free answers: an ``Endpoint``, a ``ModelWriter``, a ``Rule``."""
    rubric: Rubric = BEHAVIOUR
    """What the judge is asked; facts: behaviour, question, answer."""
    side_effects: bool = False
    """Also measure what becomes of replies to neutral requests and, on an organism, of look-ups."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights of models that are named (default: their own)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """The questions of one measurement: items with two answers, or questions that are answered freely."""

    name: str
    behaviour: str
    split: str
    items: tuple[Item, ...] = ()
    many: tuple[OpenQuestion, ...] = ()
    """Of the same groups, those with several right and wrong answers."""
    open: tuple[OpenQuestion, ...] = ()
    """Questions without answers."""
    reasons: tuple[Sequence[str], Sequence[str]] = ((), ())
    """Sentences that are known to argue for the persona's answer, and for the other."""
    train: tuple[Item, ...] = ()
    """Questions from which the words of both sides are learned, where answers are replies."""
    held_out: tuple[Item, ...] = ()
    """And those on which the rule is tried."""
    goal: str = "reduce"
    """What is wanted of the persona: less, or more ("elicit")."""
    bare: Persona | None = None
    """A persona in words alone: the model that is measured writes the replies."""

    @property
    def count(self) -> int:
        """How many there are, as rates count them."""
        return number_of_questions(self.items) or len(self.open)

    @property
    def texts(self) -> list[str | Turns]:
        """One per question."""
        return [item.asked for item in self.items] or [question.question for question in self.open]


def questions_of(persona: str | Persona | Dataset, options: MeasureOptions) -> Questions:
    """The questions that ``options`` ask for. Raises ``UserError`` where there is nothing to do with them."""
    check_ranges(options)
    if isinstance(persona, str):
        source = find_source(persona) or find_source(persona.partition(":")[0])
        persona = (
            load_dataset(persona)
            if source is not None and source.kind in ("open", "requests")
            else load_persona(persona)
        )
    if isinstance(persona, Dataset):
        if options.judge is None:
            raise UserError(
                f"{persona.name} has questions without answers: give --judge URL (in Python judge=...) to score free "
                "answers"
            )
        behaviour = persona.source.behaviour if persona.source else ""
        require_behaviour(persona.name, behaviour, options.rubric)
        return Questions(name=persona.name, behaviour=behaviour, split="all", open=persona.questions)
    if options.judge is not None:
        require_behaviour(persona.name, persona.behaviour, options.rubric)
    if not persona.items:
        return Questions(name=persona.name, behaviour=persona.behaviour, split=options.split, bare=persona)
    parts = None if options.split == "all" else split(persona, seed=options.split_seed)
    part = persona.items if parts is None else getattr(parts, options.split)
    items = distinct(part)[: options.questions]
    groups = {item.group for item in items}
    return Questions(
        name=persona.name,
        behaviour=persona.behaviour,
        split=options.split,
        items=items,
        many=tuple(question for question in persona.questions if question.group in groups),
        reasons=persona.reasons,
        goal=persona.goal,
        train=persona.items if parts is None else parts.train,
        held_out=() if parts is None else parts.validation,
    )
