"""Personas in words get their replies from the model that is searched, once for each directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxsteer.models.model import Model
from jaxsteer.personas.datasets import load_persona
from jaxsteer.personas.persona import Goal, Persona
from jaxsteer.personas.persona_files import save_persona
from jaxsteer.personas.replies import recipe_of, with_replies
from jaxsteer.processes import from_first, is_first
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.files import PERSONA


def ready(
    model: Model, persona: Persona, goal: Goal | None, folder: Path | None, say: Callable[[str], None], *, quiet: bool
) -> Persona:
    """The persona with this ``goal`` (by default its own), and with the model's replies where it has none.

    They are kept in persona.json of ``folder`` and taken from there where the same model wrote them to the same
    questions.
    """
    persona = dataclasses.replace(persona, goal=goal or persona.goal)
    if persona.items:
        return persona
    file = None if folder is None else folder / PERSONA
    if file is not None and from_first(file.is_file):
        kept = load_persona(file)
        if (kept.recipe, kept.ask, kept.role) == (recipe_of(model, persona.goal), persona.ask, persona.role):
            return dataclasses.replace(persona, items=kept.items, data_hash=kept.data_hash, recipe=kept.recipe)
    say(f"Replies: {model.name} answers {len(persona.ask)} questions in the role {persona.role!r}, and as it is")
    with progress_bar("replies", unit="reply", quiet=quiet) as advance:
        written = with_replies(model, persona, progress=advance)
    if file is not None and is_first():
        save_persona(written, file)
    return written
