"""The role set that ships, and parts of role sets."""

from __future__ import annotations

import collections
import json
import re
import tomllib
from pathlib import Path

import pytest

import jaxsteer.axis
from jaxsteer.axis.role_files import load_roles
from jaxsteer.axis.roles import MODEL_NAME, Role, RoleSet
from jaxsteer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = load_roles()


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def every_text() -> list[str]:
    roles = [text for role in SHIPPED.roles for text in (*role.instructions, role.rubric)]
    traits = [text for trait in SHIPPED.traits for text in (*trait.positive, *trait.negative, trait.rubric)]
    return [*roles, *traits, *SHIPPED.questions]


def test_there_are_enough_roles_questions_and_families():
    assert len(SHIPPED.roles) >= 126 and len(SHIPPED.questions) >= 126
    families = collections.Counter(role.family for role in SHIPPED.roles)
    assert 10 <= len(families) <= 15 and min(families.values()) >= 5
    assert {role.assistant_like for role in SHIPPED.roles} == {0, 1, 2, 3}
    humans = sum(role.human is True for role in SHIPPED.roles)
    assert humans >= 40 and len(SHIPPED.roles) - humans >= 40


def test_a_role_has_five_instructions_in_different_words():
    for role in SHIPPED.roles:
        assert len(role.instructions) == len(set(role.instructions)) == 5
        assert all(3 <= len(text.split()) <= 30 for text in role.instructions)
        bags = [set(words(text)) for text in role.instructions]
        assert max(len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]) < 0.6, role.name


def test_at_least_two_instructions_are_in_no_form_that_other_roles_share():
    openings = [[tuple(words(text)[:4]) for text in role.instructions] for role in SHIPPED.roles]
    roles_with = collections.Counter(opening for found in openings for opening in set(found))
    for role, found in zip(SHIPPED.roles, openings):
        assert sum(roles_with[opening] <= 3 for opening in found) >= 2, role.name


def test_texts_are_unique_and_clean():
    texts = every_text()
    assert [text for text, n in collections.Counter(texts).items() if n > 1] == []
    for text in texts:
        assert text == text.strip() and "  " not in text and "\n" not in text, text
        assert text.isascii() and text[0].isupper() and text[-1] in ".!?", text
        doubled = re.search(r"\b(\w+) \1\b", text, re.IGNORECASE)
        assert not doubled or doubled[1].lower() in ("no", "that"), text


def test_questions_are_short_questions_and_no_two_are_nearly_the_same():
    bags = [frozenset(words(question)) for question in SHIPPED.questions]
    for i, question in enumerate(SHIPPED.questions):
        assert question.endswith("?") and 3 <= len(question.split()) <= 15, question
        assert max(len(bags[i] & bag) / len(bags[i] | bag) for bag in bags[:i] + bags[i + 1 :]) < 0.75, question


def test_default_prompts_are_those_of_the_paper():
    assert len(SHIPPED.default) == 5 and SHIPPED.default[0] == ""
    assert sum(MODEL_NAME in text for text in SHIPPED.default) == 1
    assert MODEL_NAME not in json.dumps([role.to_json() for role in SHIPPED.roles])


def test_the_file_says_how_roles_were_rated():
    assert "2026-11-30" in SHIPPED.about and "before" in SHIPPED.about


def test_data_is_in_the_wheel():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = Path(jaxsteer.axis.__file__).parent
    packed = {path for pattern in patterns["jaxsteer.axis"] for path in folder.glob(pattern)}
    assert packed == set((folder / "data").iterdir())


def test_a_set_comes_back_from_its_json():
    again = RoleSet.from_json(json.loads(json.dumps(SHIPPED.to_json())))
    assert again == SHIPPED and again.data_hash == SHIPPED.data_hash


def small(**changes) -> RoleSet:
    fields = dict(
        name="small",
        roles=(Role(name="ghost", instructions=("a", "b", "c")), Role(name="clerk", instructions=("d",))),
        questions=("Why?", "How?"),
        default=("", "x", "y"),
    )
    return RoleSet(**(fields | changes))


def test_a_part_keeps_the_order_and_the_first_of_everything():
    part = small().only(roles=("clerk", "ghost"), questions=1, instructions=2)
    assert [role.name for role in part.roles] == ["ghost", "clerk"]
    assert [role.instructions for role in part.roles] == [("a", "b"), ("d",)]
    assert part.questions == ("Why?",) and part.default == ("", "x")
    assert small().only() == small()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"roles": ("gost",)}, "there is no role 'gost': did you mean 'ghost'"),
        ({"traits": ("calm",)}, "there are no traits"),
        ({"questions": 3}, "3 questions asked for, expected 1 to 2"),
        ({"questions": 0}, "0 questions asked for, expected 1 to 2"),
        ({"instructions": 4}, "4 instructions asked for, expected 1 to 3"),
    ],
)
def test_a_part_that_is_not_there_is_refused(asked, message):
    with pytest.raises(UserError, match=re.escape(message)):
        small().only(**asked)


def test_the_hash_follows_content_and_not_the_name():
    one = small()
    assert one.data_hash == small(name="other", about="words").data_hash
    assert one.data_hash != small(questions=("Why?", "How so?")).data_hash
    assert one.data_hash != one.only(instructions=2).data_hash
