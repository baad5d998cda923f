"""Conversations of characters: asked of a model in shards that can be resumed, or read from a file.

A rollout is one question asked under one instruction of a role. Shard k of a run is the same whatever came before it:
its random numbers depend on the seed and on k alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from jaxsteer.axis.roles import MODEL_NAME, RoleSet
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory
from jaxsteer.models.model import Model
from jaxsteer.processes import from_first
from jaxsteer.prompts.conversation import with_system
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import Range, Seed, Weight
from jaxsteer.runs.files import read_lines, write_lines

SHARD = 256
"""Rollouts that are written, read and kept together."""
_QUANTISED = re.compile(r"[.-](?:i?q\d\w*|f16|f32|bf16)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """How rollouts are asked for and written."""

    prompts: int = 5
    """Instructions of a role that each question is asked under; with fewer than a role has, they take turns. The
    Assistant is asked under all of its own."""
    max_new_tokens: int = 64
    """Longest reply. The paper has 512."""
    temperature: Weight = 0.7
    """0: always the likeliest token."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 0.9
    """Only the likeliest tokens that together reach this probability."""
    batch: int = 64
    """Conversations at the same time."""
    model_name: str = ""
    """What stands for {model_name} in default prompts (default: the name of the model's file or directory)."""
    seed: Seed = 0
    """Seed of what is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A rollout before it is written."""

    role: str
    prompt: int
    question: int
    system: str

    def transcript(self, turns: Sequence[str]) -> Transcript:
        """With what the user and the assistant said in turn."""
        names = ("user", "assistant")
        said = [{"role": names[i % 2], "content": text} for i, text in enumerate(turns)]
        return Transcript(
            role=self.role, prompt=self.prompt, question=self.question, messages=tuple(with_system(said, self.system))
        )


def plan(roles: RoleSet, options: WritingOptions, model_name: str) -> list[Asked]:
    """Every rollout: the Assistant's, the roles', and the two sides of each trait."""
    found = []

    def ask(name: str, instructions: Sequence[str], prompts: int) -> None:
        for question in range(len(roles.questions)):
            for j in range(min(prompts, len(instructions))):
                k = (question * prompts + j) % len(instructions)
                found.append(Asked(role=name, prompt=k, question=question, system=instructions[k]))

    named = options.model_name or _model_name(model_name)
    ask(DEFAULT, [text.replace(MODEL_NAME, named) for text in roles.default], len(roles.default))
    for role in roles.roles:
        ask(role.name, role.instructions, options.prompts)
    for trait in roles.traits:
        for sign, instructions in (("+", trait.positive), ("-", trait.negative)):
            ask(trait.name + sign, instructions, options.prompts)
    return found


def _model_name(model: str) -> str:
    """What people call a model, from its path."""
    return _QUANTISED.sub("", os.path.basename(model.rstrip("/")).removesuffix(".gguf")) or "jaxsteer"


def write_rollouts(
    model: Model,
    roles: RoleSet,
    options: WritingOptions,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Transcript]:
    """All rollouts of ``plan`` as the model writes them. Shards that stand in ``folder`` are not written again.

    Raises ``UserError`` for conversations that do not fit the model's positions.
    """
    asked, found = plan(roles, options, model.name), list[Transcript]()
    make_directory(folder)
    for number, begin in enumerate(range(0, len(asked), SHARD)):
        path = folder / f"{number:05d}.jsonl"
        if not from_first(path.exists):
            shard = _written(
                model,
                roles,
                asked[begin : begin + SHARD],
                options,
                number,
                progress and _from(progress, begin, len(asked)),
            )
            write_lines(path, [one.to_json() for one in shard])
        found += read_transcripts(path)
        if progress is not None:
            progress(len(found), len(asked))
    return found


def _from(progress: Callable[[int, int], None], begin: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(begin + done, total)


def _written(
    model: Model,
    roles: RoleSet,
    asked: Sequence[Asked],
    options: WritingOptions,
    number: int,
    progress: Callable[[int, int], None] | None,
) -> list[Transcript]:
    """One shard: all its conversations side by side, turn by turn."""
    says = [[roles.questions[one.question], *roles.follow_ups] for one in asked]
    turns: list[list[str]] = [[] for _ in asked]
    for turn in range(1 + len(roles.follow_ups)):
        for said, user in zip(turns, says, strict=True):
            said.append(user[turn])
        digest = hashlib.sha256(f"{options.seed}\x1f{number}\x1f{turn}".encode()).digest()
        made = generate(
            model, [one.transcript(said).messages for one, said in zip(asked, turns, strict=True)],
            seed=int.from_bytes(digest[:4], "big") >> 1, temperature=options.temperature, top_p=options.top_p,
            max_new_tokens=options.max_new_tokens, batch=options.batch, progress=progress,
        )  # fmt: skip
        for said, text in zip(turns, made.texts, strict=True):
            said.append(text.strip())
    return [one.transcript(said) for one, said in zip(asked, turns, strict=True)]


def require_template(model: Model) -> None:
    """Raises ``UserError`` for a model that cannot be spoken to."""
    if model.tokenizer is None or not model.tokenizer.chat_template:
        raise UserError(
            f"{model.name} has no chat template: characters are asked for in system messages, and its replies have to "
            "be told from what it was asked. Take a chat model"
        )


def read_transcripts(path: str | Path) -> list[Transcript]:
    """Rollouts of a JSON Lines file. Raises ``UserError`` with the line of one that is none."""
    return [Transcript.from_json(row, f"{path}:{i}") for i, row in enumerate(read_lines(Path(path)), 1)]
