"""``RoleSet``: characters as instructions, the questions that all of them are asked, and traits as pairs."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated

from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files.records import Record
from jaxsteer.ranges import Range

MODEL_NAME = "{model_name}"
"""Stands in a default prompt for the model's own name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role(Record):
    """A character. Raises ``UserError`` for one without a name or without an instruction."""

    name: str
    instructions: tuple[str, ...]
    """System messages that ask for it, one conversation each."""
    rubric: str = ""
    """For a judge: what a reply in this role is like; or its whole request, with {question} and {answer}."""
    family: str = ""
    """What kind of character it is, for example "profession" or "creature"."""
    human: bool | None = None
    """Whether the character is a human being."""
    assistant_like: Annotated[int, Range(0, 3)] | None = None
    """How much it is like an assistant, by people, before anything was run: 0 not at all, 3 much."""

    def __post_init__(self) -> None:
        """Check that something can be asked for."""
        if not self.name:
            raise UserError("a role has no name: expected a text, for example 'librarian'")
        if not self.instructions or not all(text.strip() for text in self.instructions):
            raise UserError(
                f"role {self.name!r} has an empty instruction, or none: expected at least one system message"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraitPair(Record):
    """A trait as instructions for it and against it. Raises ``UserError`` where one of the sides is empty."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    rubric: str = ""

    def __post_init__(self) -> None:
        """Check that there is a difference to be read."""
        for side, texts in (("positive", self.positive), ("negative", self.negative)):
            if not texts or not all(text.strip() for text in texts):
                raise UserError(f"trait {self.name!r}: there are no {side} instructions, or an empty one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleSet(Record):
    """What a study of characters asks. Raises ``UserError`` for names that stand twice, and for missing parts."""

    name: str
    roles: tuple[Role, ...]
    questions: tuple[str, ...]
    """Asked in every role."""
    default: tuple[str, ...] = ("",)
    """System messages of the Assistant as it is; "" is none, and ``{model_name}`` the model's name."""
    traits: tuple[TraitPair, ...] = ()
    follow_ups: tuple[str, ...] = ()
    """What the user says after each reply, in turn: rollouts of several turns."""
    about: str = ""
    """Where it comes from, and how ``assistant_like`` was judged."""

    @property
    def data_hash(self) -> str:
        """sha256 over all that is asked and judged: everything but ``name`` and ``about``."""
        whole = dataclasses.replace(self, name="", about="").to_json()
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def only(
        self,
        *,
        roles: Sequence[str] | None = None,
        questions: int | None = None,
        instructions: int | None = None,
        traits: Sequence[str] | None = None,
    ) -> RoleSet:
        """A part: the named roles and traits in the order of the set, and the first of its questions and instructions.

        ``instructions`` counts what is kept of each role, of each side of a trait, and of the default prompts. ``None``
        keeps all. Raises ``UserError`` for names that are not in the set, with the nearest one, and for a count that is
        not between 1 and what there is (some roles may have fewer instructions).
        """
        for what, given, found in (("role", roles, self.roles), ("trait", traits, self.traits)):
            if given and not found:
                raise UserError(f"{self.name}: there are no {what}s, so that {given[0]!r} cannot be chosen")
            refuse_unknown(given or (), [one.name for one in found], what, f"{self.name}: ")
        longest = max(len(role.instructions) for role in self.roles)
        for what, count, most in (
            ("questions", questions, len(self.questions)),
            ("instructions", instructions, longest),
        ):
            if count is not None and not 1 <= count <= most:
                raise UserError(f"{self.name}: {count} {what} asked for, expected 1 to {most}")
        cut = slice(instructions)
        return dataclasses.replace(
            self,
            roles=tuple(
                dataclasses.replace(role, instructions=role.instructions[cut])
                for role in self.roles
                if roles is None or role.name in roles
            ),
            questions=self.questions[:questions],
            default=self.default[cut],
            traits=tuple(
                dataclasses.replace(trait, positive=trait.positive[cut], negative=trait.negative[cut])
                for trait in self.traits
                if traits is None or trait.name in traits
            ),
        )

    def __post_init__(self) -> None:
        """Check that every name means one thing."""
        for what, found in (("role", self.roles), ("question", self.questions), ("default prompt", self.default)):
            if not found:
                raise UserError(f"{self.name}: there is no {what}")
        if any(role.name == DEFAULT for role in self.roles):
            raise UserError(
                f"{self.name}: no role can be called {DEFAULT!r}, the name of the Assistant as it is: its system "
                "messages stand in the field default"
            )
        for place in (name for text in self.default for name in re.findall(r"\{(\w+)\}", text)):
            if place != "model_name" and difflib.get_close_matches(place, ["model_name"]):
                raise UserError(f"{self.name}: a default prompt has {{{place}}}: did you mean {{model_name}}?")
        names = [*(role.name for role in self.roles), *(trait.name for trait in self.traits), *self.questions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{self.name}: {twice[0]!r} stands twice: give every role, trait and question once")
