"""The questions of a study of circuits, how replies to them are read, and what stands in the place of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.circuits.study_setting import (
    Push,
    Task,
    answer_rows,
    around_prompt,
    asked_copies,
    contexts_of,
    fillers,
    random_prompts,
    row_scores,
)
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import distinct
from jaxsteer.evals.free_answers import PERSONA, UNREAD, read_answer
from jaxsteer.evals.word_odds import WordOdds, learn_words
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Item, Persona, split
from jaxsteer.personas.items import mostly_replies
from jaxsteer.personas.written_persona import ready
from jaxsteer.prompts.slots import prompt_text

POOL = 5
"""Times as many questions are asked where those are wanted that the pushes flip."""
FEWEST = 4
"""Questions that intervals need."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """What is asked."""

    persona: Persona
    test: tuple[Item, ...]
    held: tuple[Item, ...]
    """Validation questions, on which something may be chosen."""
    words: WordOdds | None
    """Whose reply it is, by its words; None where answers are choices."""
    prompt: str = ""
    tokens: tuple[np.ndarray, ...] = ()
    """Of a prompt: ids of what stands in its place in the base run, its own, and random ones."""
    filler_text: str = ""
    alone: Task | None = None
    """Of a prompt: the questions without any."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The question of every copy."""
        return tuple(one.group for one in asked_copies(self.test))

    def shown(self, text: str, copy: int) -> bool | None:
        """Whether a free reply to a copy of a question shows the persona; None where nothing tells."""
        if self.words is not None:
            return self.words.shows(text, self.prompt)
        chose, _ = read_answer(text, asked_copies(self.test)[copy])
        return None if chose == UNREAD else chose == PERSONA

    def told(self, options: CircuitOptions) -> str:
        """The metric in words."""
        if options.metric == "tokens":
            return "logit of the pushed run's token minus that of the base run's, where they differ, in its own replies"
        each = " per token" if mostly_replies(self.test) else ""
        return f"log-probability{each} of the persona's answer minus that of the other, nats"


def ask_questions(
    model: Model,
    persona: Persona,
    pushes: Sequence[Push],
    options: CircuitOptions,
    folder: Path,
    say: Callable[[str], None],
) -> Questions:
    """Test and validation questions of the persona, whose replies the model writes where it is in words alone.

    Raises ``UserError`` for too few of them, or of those that the pushes flip.
    """
    whole = ready(model, persona, options.goal, folder, say, quiet=False)
    parts = split(whole, seed=options.split_seed)
    most = options.questions * (POOL if options.flipped else 1)
    test, held = (_each_once(part)[:most] for part in (parts.test, parts.validation))
    words = learn_words(parts.train) if mostly_replies(parts.train) else None
    found = Questions(persona=whole, test=test, held=held, words=words, prompt=options.prompt)
    if options.prompt:
        found = _with_prompt(model, found, options)
    if options.flipped:
        found = dataclasses.replace(found, test=_flipped(model, found, pushes, options))
        held = _flipped(model, dataclasses.replace(found, test=held), pushes, options)
        found = dataclasses.replace(found, held=held)
    found = dataclasses.replace(found, test=found.test[: options.questions], held=found.held[: options.questions])
    if min(len(found.test), len(found.held)) < FEWEST:
        raise UserError(
            f"{len(found.test)} test and {len(found.held)} validation questions are left, and intervals need at least "
            f"{FEWEST} of each: give more questions, or another --split-seed"
        )
    if len(found.test) < options.questions:
        say(f"{len(found.test)} test questions are there, {options.questions} were asked for")
    if not options.prompt:
        return found
    contexts, answers = contexts_of(model, found.test, "", options.slot)
    return dataclasses.replace(found, alone=answer_rows(model, contexts, answers, found.test))


def _each_once(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple({item.group: item for item in reversed(distinct(items))}.values())[::-1]


def _with_prompt(model: Model, found: Questions, options: CircuitOptions) -> Questions:
    """With the ids of the prompt, of random ones, and of the filler that changes the metric least."""
    _, ids = around_prompt(model, (*found.test, *found.held), options.prompt, options.slot)

    def score(prompt: str, own: np.ndarray | None) -> float:
        contexts, answers = contexts_of(model, found.held, prompt, options.slot, own)
        task = answer_rows(model, contexts, answers, found.held)
        return float(row_scores(model, task.rows, task.metric, None).mean())

    plain = score("", None)
    filler = min(fillers(model, len(ids)), key=lambda one: abs(score(options.prompt, one) - plain))
    tokens = (filler, ids, *random_prompts(model, len(ids), options))
    return dataclasses.replace(found, tokens=tokens, filler_text=prompt_text(model.tokenizer, filler[:1]))


def _flipped(model: Model, found: Questions, pushes: Sequence[Push], options: CircuitOptions) -> tuple[Item, ...]:
    """The test questions on which every push changes which answer is preferred."""
    sides = [_preferred(model, found, options, 0, None)]
    if options.prompt:
        sides.append(_preferred(model, found, options, 1, None))
    sides += [_preferred(model, found, options, 0, push.vectors.edits()) for push in pushes if push.vectors is not None]
    kept = tuple(item for i, item in enumerate(found.test) if all(side[i] != sides[0][i] for side in sides[1:]))
    return kept


def _preferred(
    model: Model, found: Questions, options: CircuitOptions, which: int, edits: Intervention | None
) -> np.ndarray:
    """Of every question, whether the persona's answer is preferred."""
    ids = found.tokens[which] if found.tokens else None
    contexts, answers = contexts_of(model, found.test, options.prompt, options.slot, ids)
    task = answer_rows(model, contexts, answers, found.test)
    scores = row_scores(model, task.rows, task.metric, edits)
    groups = np.asarray(task.groups)
    return np.asarray([scores[groups == item.group].sum() > 0 for item in found.test])
