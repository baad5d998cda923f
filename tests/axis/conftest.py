"""The characters that are planted in organism:persona, and a run of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

import jaxsteer
from jaxsteer import axis
from jaxsteer.axis import AxisRun, Role, RoleSet, WritingOptions
from jaxsteer.models.model import Model
from jaxsteer.organisms import persona_world as world

WRITING = WritingOptions(prompts=1, max_new_tokens=20)


def planted_roles(questions: int = 12) -> RoleSet:
    """The roles of the organism, with the order that was planted as the rating; the Assistant is asked four times."""
    roles = [
        Role(
            name=name,
            instructions=tuple(world.role_sentence(name, i) for i in range(len(world.ROLE_SENTENCES))),
            assistant_like=round(3 * assistantness),
        )
        for name, assistantness in world.ASSISTANTNESS.items()
    ]
    asked = [text.format(topic) for text in world.TOPIC_QUESTIONS for topic in world.CALM_TOPICS]
    return RoleSet(name="planted", roles=tuple(roles), questions=tuple(asked[::6][:questions]), default=("",) * 4)


@pytest.fixture(scope="session")
def organism() -> Model:
    return jaxsteer.load("organism:persona")


@pytest.fixture(scope="session")
def planted(organism: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AxisRun]:
    """A run on the planted roles, and its directory."""
    out = tmp_path_factory.mktemp("axis") / "run"
    return out, axis.run(organism, planted_roles(), out=out, writing=WRITING)
