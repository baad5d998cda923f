"""The role set that ships, and parts of role sets."""

from __future__ import annotations

import collections
import json
import re
import tomllib
from collections.abc import Callable
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


def test_at_least_42_traits_with_five_instructions_on_each_side():
    assert len(SHIPPED.traits) >= 42
    for trait in SHIPPED.traits:
        assert len(trait.positive) == len(trait.negative) == 5 and trait.rubric
        assert all(2 <= len(text.split()) <= 30 for text in (*trait.positive, *trait.negative)), trait.name


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


def released(folder: Path, **changes: object) -> Path:
    """A folder as the paper's authors publish theirs, with a file of each kind; ``changes`` replace files by path."""
    files: dict[str, object] = {
        "roles/instructions/ghost.json": {
            "instruction": [{"pos": "You are a ghost."}, {"pos": "Haunt."}],
            "questions": ["Boo?"],
            "eval_prompt": "Rate {answer} to {question}.",
        },
        "roles/instructions/clerk.json": {"instruction": [{"pos": "You are a clerk."}]},
        "roles/instructions/default.json": {"instruction": [{"pos": ""}, {"pos": "You are {model_name}."}]},
        "traits/instructions/calm.json": {"instruction": [{"pos": "Be calm.", "neg": "Be loud."}]},
        "extraction_questions.jsonl": '{"question": "Why?", "id": 0}\n{"question": "How?", "id": 1}\n',
    }
    for name, content in (files | changes).items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("place", [".", "data", "data/roles/instructions"])
def test_a_released_folder_is_read_from_any_of_its_levels(tmp_path, place):
    found = load_roles(released(tmp_path) / place)
    assert [(role.name, role.instructions, role.rubric) for role in found.roles] == [
        ("clerk", ("You are a clerk.",), ""),
        ("ghost", ("You are a ghost.", "Haunt."), "Rate {answer} to {question}."),
    ]
    assert found.questions == ("Why?", "How?") and found.default == ("", "You are {model_name}.")
    assert [(trait.name, trait.positive, trait.negative) for trait in found.traits] == [
        ("calm", ("Be calm.",), ("Be loud.",))
    ]


GHOST = "roles/instructions/ghost.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (GHOST, {"questions": []}, "ghost.json: 'ghost' has no field 'instruction'"),
        (GHOST, {"instruction": [{"pos": "a"}, {"neg": "b"}]}, "instruction 1 of 'ghost' has nothing at 'pos'"),
        (GHOST, {"instruction": [{"pos": 3}]}, "instruction 0 of 'ghost' has a number at 'pos'"),
        (GHOST, {"instruction": ["a"]}, "ghost.json: instruction must be a list of objects, got a list with a string"),
        (GHOST, {"instruction": [{"pos": " "}]}, "role 'ghost' has an empty instruction"),
        (GHOST, {"instruction": [{"pos": "a"}], "eval_prompt": 1}, "eval_prompt of 'ghost' is a number"),
        ("traits/instructions/calm.json", {"instruction": [{"pos": "a"}]}, "of 'calm' has nothing at 'neg'"),
        ("extraction_questions.jsonl", '{"question": "Why?"}\n{"id": 3}\n', "line 2: expected"),
        ("extraction_questions.jsonl", None, "there is no extraction_questions.jsonl"),
        ("roles/instructions/default.json", None, "there is no default.json"),
    ],
)
def test_a_released_folder_with_a_fault_is_refused_by_name(tmp_path, name, content, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_roles(released(tmp_path, **{name: content}))
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_role_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no role files"):
        load_roles(tmp_path)


def own_file(change: Callable[[dict], object]) -> dict:
    whole = json.loads(json.dumps(small().to_json()))
    change(whole)
    return whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["roles"][1].pop("instructions"), "role 'clerk'.instructions is missing"),
        (lambda w: w["roles"][1].pop("name"), "role 1.name is missing"),
        (lambda w: w["roles"][0].update(assistant_like=4), "role 'ghost'.assistant_like must be at most 3, got 4"),
        (lambda w: w["roles"][0].update(instructions=[]), "role 'ghost' has an empty instruction, or none"),
        (lambda w: w["roles"].append("knight"), "roles must be a list of objects, got a list with a string"),
        (lambda w: w.pop("roles"), "roles is missing"),
        (lambda w: w.pop("questions"), "questions is missing"),
        (lambda w: w.update(questions=["Why?", "Why?"]), "'Why?' stands twice"),
        (lambda w: w["roles"][0].update(name="default"), "no role can be called 'default'"),
        (lambda w: w["roles"][0].update(assistent_like=1), "no field 'assistent_like': did you mean 'assistant_like'"),
        (lambda w: w.update(questons=[]), "there is no field 'questons': did you mean 'questions'"),
        (lambda w: w.update(questions="Why?"), "questions is 'Why?', expected a list of texts"),
        (lambda w: w.update(default=["You are {modelname}."]), "{modelname}: did you mean {model_name}?"),
        (lambda w: w.update(traits=[{"name": "calm", "positive": ["x"]}]), "trait 'calm'.negative is missing"),
    ],
)
def test_a_file_with_a_fault_is_refused_with_file_role_and_field(tmp_path, change, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(own_file(change)))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_roles(path)
    assert str(path) in str(error.value)


def test_a_file_of_ones_own_needs_no_name(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(own_file(lambda whole: whole.pop("name"))))
    assert load_roles(str(path)) == small(name="mine")


PAGE = (ROOT / "docs" / "assistant-axis.md").read_text(encoding="utf-8")


def test_the_file_on_the_page_can_be_read(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    found = load_roles(path)
    assert found.roles[0].name == "night nurse" and found.traits[0].name == "calm" and len(found.default) == 3


def test_the_page_counts_as_the_file_does():
    families = collections.Counter(role.family for role in SHIPPED.roles)
    humans = sum(role.human is True for role in SHIPPED.roles)
    rated = collections.Counter(role.assistant_like for role in SHIPPED.roles)
    longest = max(len(question.split()) for question in SHIPPED.questions)
    for told in (
        f"| {len(SHIPPED.roles)} in {len(families)} families of {min(families.values())} to {max(families.values())}; "
        f"{humans} human, {len(SHIPPED.roles) - humans} not |",
        f"| {len(SHIPPED.questions)}, at most {longest} words long",
        f"| {len(SHIPPED.traits)}, with five instructions",
        f"{rated[3]} roles have 3 (",
        f"{rated[2]} have 2, {rated[1]} have 1\nand {rated[0]} have 0",
    ):
        assert told in PAGE, told


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
