"""What a judge is asked about a reply in a role."""

from __future__ import annotations

from jaxsteer.axis.roles import Role, RoleSet
from jaxsteer.axis.scoring import scored
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.writers.writer import Rule

ROLES = RoleSet(
    name="r",
    roles=(
        Role(
            name="ghost",
            instructions=("Haunt.",),
            rubric='Is "{answer}" to "{question}" a ghost\'s? {} {0} Reply 0 to 3.',
        ),
        Role(name="clerk", instructions=("File.",), rubric="Speaks of {files}."),
        Role(name="oak", instructions=("Stand.",)),
    ),
    questions=("Why?",),
)


def said(role: str, text: str) -> Transcript:
    messages = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": text})
    return Transcript(role=role, messages=messages)


def test_a_role_with_a_whole_request_is_judged_by_it_and_others_by_the_rubric():
    seen: list[str] = []

    def write(messages) -> str:
        seen.append(messages[0]["content"])
        return "3" if "ghost's" in messages[0]["content"] else "1"

    replies = [
        said("ghost", "Boo {question} {answer}"),
        said("clerk", "No {braces}"),
        said(DEFAULT, "x"),
        said("oak", "y"),
    ]
    found = scored(replies, ROLES, Rule(write=write))
    assert [one.score for one in found] == [3, 1, None, 1]
    assert seen[0] == 'Is "Boo {question} {answer}" to "Why?" a ghost\'s? {} {0} Reply 0 to 3.'
    assert "[Role] clerk" in seen[1] and "Speaks of {files}." in seen[1] and "No {braces}" in seen[1]
    assert "It is what this character would say: oak." in seen[2] and len(seen) == 3
