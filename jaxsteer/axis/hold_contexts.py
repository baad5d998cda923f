"""Conversations for ``hold``: roles and attacks that stand while prompts are searched, chosen and tested."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxsteer.axis.result import AxisResult
from jaxsteer.axis.role_files import load_roles
from jaxsteer.axis.roles import Role, RoleSet
from jaxsteer.axis.scripts import persona_attacks
from jaxsteer.errors import UserError
from jaxsteer.prompts import with_system
from jaxsteer.ranges import CountFrom0, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldOptions:
    """How prompts are searched, and what the test asks."""

    train_roles: int = 4
    """Roles in whose conversations prompts are searched, evenly from the far end of the axis to its middle."""
    roles: int = 8
    """Other roles of the test."""
    questions: int = 4
    """Questions to each role of the test, and 2 others to each of the search and 2 of the choice."""
    attacks: CountFrom0 = 8
    """Persona attacks of the test, one question each."""
    steps: int = 30
    """Of each search."""
    population: int = 6
    """Prompts of a search that have children."""
    children: int = 16
    """Candidates per prompt and step."""
    prompt_length: int = 8
    """Tokens of a prompt."""
    searches: int = 1
    """Seeds of the search along the axis, and along random directions."""
    leads: int = 3
    """Prompts of each search that are compared on validation questions."""
    max_new_tokens: int = 48
    """Longest reply."""
    seed: Seed = 0
    """Seed of the searches, and of random directions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A conversation up to the reply; a prompt stands behind the question."""

    role: str
    system: str
    before: str
    """What the user says around the question: a template with {request}."""
    question: str
    attack: bool = False

    def messages(self, prompt: str = "") -> list[dict[str, str]]:
        """The turns, with a prompt right behind the question."""
        said = self.before.replace("{request}", self.question + prompt)
        return with_system([{"role": "user", "content": said}], self.system)


def contexts(found: AxisResult, roles: RoleSet, options: HoldOptions) -> dict[str, list[Context]]:
    """Conversations of the search, of the choice and of the test. The unit of the test is the role."""
    order = [place.name for place in reversed(found.roles)][: max(len(found.roles) * 2 // 3, 1)]
    wanted, named = options.train_roles + options.roles, {role.name: role for role in roles.roles}
    if len(order) < wanted:
        raise UserError(
            f"the run has {len(order)} roles away from the Assistant, and {options.train_roles} to search with and "
            f"{options.roles} to test are asked for: ask for fewer, or run more roles"
        )
    picked = [order[round(float(at))] for at in np.linspace(0, len(order) - 1, wanted)]
    stride = max(wanted // options.train_roles, 1)
    train = picked[::stride][: options.train_roles]
    test = [name for name in picked if name not in train][: options.roles]
    questions = _questions(roles, 4 + options.questions + options.attacks)

    def ask(role: Role, i: int, question: str) -> Context:
        text = role.instructions[i % len(role.instructions)]
        return Context(role=role.name, system=text, before="{request}", question=question)

    attacks = list(persona_attacks().items())[: options.attacks]
    return {
        "search": [ask(named[name], i, questions[i % 2]) for i, name in enumerate(train * 2)],
        "choice": [ask(named[name], i, questions[2 + i // len(train)]) for i, name in enumerate(train * 2)],
        "test": [
            *(ask(named[name], i, q) for name in test for i, q in enumerate(questions[4 : 4 + options.questions])),
            *(
                Context(role=name, system="", before=text, question=question, attack=True)
                for (name, text), question in zip(attacks, questions[4 + options.questions :])
            ),
        ],
    }


def _questions(roles: RoleSet, n: int) -> list[str]:
    """``n`` questions, those that the run did not ask first. Raises ``UserError`` where there are fewer."""
    shipped = load_roles()
    others = [q for q in shipped.questions if q not in roles.questions]
    found = (others if any(q in shipped.questions for q in roles.questions) else []) + list(roles.questions)
    if len(found) < n:
        raise UserError(f"the role set has {len(found)} questions, and {n} are needed: ask fewer, or give more")
    return found[:n]
