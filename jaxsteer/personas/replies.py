"""Replies that a model writes itself: in character under a role's system message, and as it is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas.items import Item, data_hash, group_of, normal
from jaxsteer.prompts import with_system
from jaxsteer.prompts.generate import generate

if TYPE_CHECKING:
    from jaxsteer.personas.persona import Goal, Persona

log = logging.getLogger(__name__)

REPLY_TOKENS = 32
"""Longest reply that is written."""
LEAST = 10
"""Questions, at least, that get another reply in the role."""
BATCH = 64


def with_replies(
    model: Model,
    persona: Persona,
    *,
    goal: Goal | None = None,
    max_new_tokens: int = REPLY_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Persona:
    """The persona with an item for every question: the model's greedy reply in character, and its plain one.

    The reply in character is written under the persona's ``role`` as system message. To "elicit" the character, nothing
    stands before the questions; to "reduce" it, the role does. Questions that get the same reply twice are left out and
    counted in the log. ``progress(done, total)`` counts replies. A persona that has items already is returned as it is.
    Raises ``UserError`` for a persona without role or with fewer than ``LEAST`` questions, and when fewer are left.
    """
    if persona.items:
        return persona
    if not persona.ask or not persona.role:
        raise UserError(f"persona {persona.name!r} has neither items nor a role and questions to write them with")
    goal = goal or persona.goal
    asked = tuple({group_of(question): question for question in persona.ask}.values())
    if len(asked) < LEAST:
        raise UserError(f"persona {persona.name!r} asks {len(asked)} different questions: give at least {LEAST}")
    texts: list[str] = []
    total = 2 * len(asked)
    for role in (persona.role, ""):
        chats = [with_system([{"role": "user", "content": question}], role) for question in asked]
        for start in range(0, len(chats), BATCH):
            chunk = chats[start : start + BATCH]
            made = generate(model, chunk, temperature=0, max_new_tokens=max_new_tokens, batch=BATCH)
            texts += [text.strip() for text in made.texts]
            if progress is not None:
                progress(len(texts), total)
    in_role, plain = texts[: len(asked)], texts[len(asked) :]
    items = tuple(
        Item(
            id=f"{persona.name}-{number}",
            question=question,
            matching=shown,
            not_matching=other,
            group=group_of(question),
            before=(("system", persona.role),) if goal == "reduce" else (),
        )
        for number, (question, shown, other) in enumerate(zip(asked, in_role, plain, strict=True))
        if shown and other and normal(shown) != normal(other)
    )
    if len(items) < len(asked):
        log.warning("%s: %d questions get the same reply in role or not", persona.name, len(asked) - len(items))
    if len(items) < LEAST:
        raise UserError(
            f"only {len(items)} of {len(asked)} questions get another reply from {model.name} in the role "
            f"{persona.role!r}, and at least {LEAST} have to: give more questions, or a role that the model can play"
        )
    recipe = recipe_of(model, goal, max_new_tokens)
    return dataclasses.replace(persona, items=items, goal=goal, data_hash=data_hash(items), recipe=recipe)


def recipe_of(model: Model, goal: Goal, max_new_tokens: int = REPLY_TOKENS) -> dict[str, str]:
    """How ``with_replies`` writes, as text for a file."""
    return {
        "written_by": model.name,
        "fingerprint": model.fingerprint,
        "decoding": f"greedy, {max_new_tokens} tokens",
        "goal": goal,
    }
