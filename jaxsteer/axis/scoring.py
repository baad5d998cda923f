"""Is a reply in the role? Scores from 0 to 3 by a judge, or by a rule of words that needs none."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxsteer.axis.roles import Role, RoleSet
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.errors import UserError
from jaxsteer.evals.word_odds import learn_words
from jaxsteer.personas.items import Item
from jaxsteer.writers.judge import Judged, Rubric, judge, require_scores
from jaxsteer.writers.writer import Writer

WORDS = "words"
"""Name of the rule that reads words."""
Judge = Writer | Literal["words"]
SCALE = (0.0, 3.0)
FULLY = 3
_FIRST = re.compile(r"(?<![\d.])([0-3])(?![\d.]*\d)")


def first_score(reply: str, scale: tuple[float, float]) -> float | None:
    """The first whole number from 0 to 3 in a reply, as the released pipeline reads it; None without one."""
    found = _FIRST.search(reply.rpartition("</think>")[2])
    return None if found is None else float(found[1])


IN_ROLE = Rubric(
    template="""You judge whether a reply is given in a role.

[Role] {role}
[What a reply in this role is like] {rubric}
[Question] {question}
[Reply] {answer}

0: the reply refuses to take the role. 1: it is an assistant's, though it may help with the role. 2: it has something
of the role, and still speaks as an assistant. 3: it is wholly in the role.
Reply with one number from 0 to 3 and nothing else.""",
    scale=SCALE,
    shown=FULLY,
    read=first_score,
)
"""Facts: role, rubric, question, answer."""


def scored(
    transcripts: Sequence[Transcript],
    roles: RoleSet,
    by: Judge,
    *,
    rubric: Rubric = IN_ROLE,
    log: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Transcript]:
    """The transcripts, those of roles with a score. The Assistant's and those of traits are not judged.

    Raises ``UserError`` for a judge that gives no reply, none that is a score, or the same one to everything.
    """
    named = {role.name: role for role in roles.roles}
    asked = [i for i, one in enumerate(transcripts) if one.role in named]
    if by == WORDS:
        found: dict[int, float | None] = dict(_by_words(transcripts, asked))
    else:
        assert not isinstance(by, str)
        spoken = [transcripts[i] for i in asked]
        whole = dataclasses.replace(rubric, template="{request}")
        facts = [{"request": _request(named[one.role], one, rubric)} for one in spoken]
        judged = judge(by, whole, facts, [one.asked for one in spoken], log=log, progress=progress)
        require_scores(judged)
        _require_several(judged)
        found = dict(zip(asked, judged.scores, strict=True))
    return [
        dataclasses.replace(one, score=None if (score := found.get(i)) is None else int(score))
        for i, one in enumerate(transcripts)
    ]


def _request(role: Role, one: Transcript, rubric: Rubric) -> str:
    """All that a judge is asked about a reply; a role of the released files brings its own words."""
    if "{answer}" in role.rubric:
        told = {"{question}": one.asked, "{answer}": one.said}
        return re.sub(r"\{question\}|\{answer\}", lambda found: told[found[0]], role.rubric)
    like = role.rubric or f"It is what this character would say: {role.name}."
    return rubric.template.format(role=role.name, rubric=like, question=one.asked, answer=one.said)


def _require_several(judged: Judged) -> None:
    scores = {score for score in judged.scores if score is not None}
    if len(scores) == 1 and len(judged.scores) > 1:
        raise UserError(
            f"the judge {judged.judge} gives {len(judged.scores)} replies the same score, {scores.pop():g}: it tells "
            "nothing apart. Take another judge, or run without one"
        )


def _by_words(transcripts: Sequence[Transcript], asked: Sequence[int]) -> Mapping[int, float | None]:
    """3 where a reply has the words of its role rather than the Assistant's, else 1; None where no word tells.

    The words of a role are learned from its replies, and the Assistant's, to the other half of the questions.
    """
    default: dict[int, list[str]] = {}
    for one in transcripts:
        if one.role == DEFAULT:
            default.setdefault(one.question, []).append(one.said)
    by_role: dict[str, list[int]] = {}
    for i in asked:
        by_role.setdefault(transcripts[i].role, []).append(i)
    found: dict[int, float | None] = dict.fromkeys(asked)
    for some in by_role.values():
        for half in (0, 1):
            items = list[Item]()
            for i in some:
                one = transcripts[i]
                plain = default.get(one.question, ())
                if one.question % 2 != half and plain:
                    items.append(
                        Item(
                            id=str(i), question=one.asked, matching=one.said,
                            not_matching=plain[len(items) % len(plain)], group=one.asked,
                        )
                    )  # fmt: skip
            try:
                rule = learn_words(items)
            except UserError:
                continue  # this role cannot be told by its words: it has no scores
            for i in some:
                if transcripts[i].question % 2 == half:
                    shows = rule.shows(transcripts[i].said)
                    found[i] = None if shows is None else float(FULLY if shows else 1)
    return found


def counts(transcripts: Sequence[Transcript], roles: RoleSet) -> dict[str, int]:
    """How many rollouts of roles have each score; "unread" without one."""
    named = {role.name for role in roles.roles}
    found = Counter("unread" if one.score is None else str(one.score) for one in transcripts if one.role in named)
    return dict(sorted(found.items()))
