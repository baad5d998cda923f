"""Personas in words: read, written to by a model, kept and read again."""

import json

import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.personas import (
    CHARACTERS,
    contrast_pairs,
    load_persona,
    save_persona,
    split,
    with_replies,
)
from tests.helpers.tiny import tiny_model

QUESTIONS = [f"What is number {i}?" for i in range(12)]


def test_the_characters_that_ship_are_in_words():
    for name in CHARACTERS:
        persona = load_persona(name)
        assert persona.items == () and persona.role and len(persona.ask) == 150 and persona.goal == "elicit"
        assert len(persona.pro_cues) == len(persona.counter_cues) == len(persona.neutral_cues) == 4
        with pytest.raises(UserError, match="in words alone"):
            split(persona, seed=0)


def test_a_model_writes_replies_that_a_file_keeps(tmp_path):
    model = tiny_model()
    seen = []
    bare = jaxsteer.Persona(name="sailor", role="You are a sailor.", ask=tuple(QUESTIONS), goal="reduce")
    written = with_replies(model, bare, max_new_tokens=6, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24, 24) and len(written.items) >= 10 and written.recipe["decoding"] == "greedy, 6 tokens"
    assert {item.before for item in written.items} == {(("system", "You are a sailor."),)}
    assert with_replies(model, written) is written
    save_persona(written, tmp_path / "p.json")
    again = load_persona(tmp_path / "p.json")
    assert [(i.asked, i.matching, i.not_matching) for i in again.items] == [
        (i.asked, i.matching, i.not_matching) for i in written.items
    ]
    assert (again.role, again.goal, again.ask, again.recipe) == (written.role, "reduce", bare.ask, written.recipe)
    plain = jaxsteer.Persona.from_replies(model, "You are a sailor.", QUESTIONS, name="sailor", pro_cues=("Ahoy!",))
    assert {item.before for item in plain.items} == {()} and plain.goal == "elicit" and plain.pro_cues == ("Ahoy!",)


def test_too_few_questions_are_refused_before_the_model_writes():
    bare = jaxsteer.Persona(name="sailor", role="You are a sailor.", ask=("Who?",) * 16)
    with pytest.raises(UserError, match="asks 1 different questions: give at least 10"):
        with_replies(tiny_model(), bare)
    with pytest.raises(UserError, match="asks 1 different questions"):
        jaxsteer.Persona.from_replies(tiny_model(), "You are a sailor.", "Which way do we go, and why?")


def test_directions_of_a_role_leave_it_out():
    """The contrast is that of the sentences; the role would stand on both sides of it."""
    model = tiny_model()
    cues = {"pro_cues": ("Ahoy!",), "counter_cues": ("Be plain.",), "neutral_cues": ("Answer.",)}
    asked = [
        jaxsteer.Persona.from_replies(model, "You are a sailor.", QUESTIONS, goal=g, **cues)
        for g in ("elicit", "reduce")
    ]
    pairs = [contrast_pairs(model, persona, persona.items, "decision") for persona in asked]
    assert all((a == b).all() for a, b in zip(pairs[0].good, pairs[1].good, strict=True))
    assert pairs[0].recipe["contrast"] == "neutral cue/pro cue"
    good, bad = (model.tokenizer.decode(side[0]) for side in (pairs[0].good, pairs[0].bad))
    assert "Answer." in good and "Ahoy!" in bad and "sailor" not in good


class Frame(list):
    """What is used of a pandas data frame."""

    def rename(self, columns):
        return Frame({columns[name]: value for name, value in row.items()} for row in self)

    def to_dict(self, kind):
        return list(self) if kind == "records" else None


def test_personas_from_pairs_and_frames():
    rows = [(f"Question {i}?", "I love it a lot", "I do not like it") for i in range(5)]
    persona = jaxsteer.Persona.from_pairs(rows, name="love", pro_cues=("Love!",))
    assert len(persona.items) == 5 and persona.items[0].replies and persona.subject == "love"
    names = {"q": "question", "yes": "positive", "no": "negative"}
    frame = Frame(dict(zip(names, row, strict=True)) for row in rows)
    assert jaxsteer.Persona.from_frame(frame, columns=names).data_hash == persona.data_hash
    assert jaxsteer.Persona.from_pairs([("good day to you all", "go away from me")]).items[0].question == ""
    assert load_persona("sycophancy", n=9, pro_cues="Agree!").pro_cues == ("Agree!",)  # one text, not its letters
    with pytest.raises(UserError, match="reads a pandas data frame, got dict: from_pairs"):
        jaxsteer.Persona.from_frame({"question": ["q"]})
    with pytest.raises(UserError, match="love, line 2: expected"):
        jaxsteer.Persona.from_pairs([rows[0], "text"], name="love")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": 3, "questions": ["q"]}, "role must be a text"),
        ({"role": "r", "questions": ["q"], "goal": "more"}, "goal must be reduce or elicit"),
        ({"role": "r", "questions": ["q"], "fractions": [0.6, "x"]}, "fractions must be three positive numbers"),
        ({"data": [{}], "fractions": [0.9, 0.9, 0.9]}, "p.json: fractions must be three positive numbers"),
        ({"role": "r", "questions": ["q"], "recipe": {"a": 1}}, "recipe must be an object of texts"),
        ({"questions": ["q"]}, 'expected "data"'),
        ({"data": [{"question": "q"}]}, "line 1: missing or empty answer_matching"),
        ({"data": 5}, 'expected "data"'),
    ],
)
def test_bad_persona_files_are_named(tmp_path, fields, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        load_persona(path)
