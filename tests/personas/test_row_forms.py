"""Every form that a row may have, read into one; what is missing or contradicts is named."""

import json

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval, rate
from jaxsteer.personas import contrast_pairs, load_persona, mean_difference, read_items, search_conversations, split
from jaxsteer.prompts import Placement, build_slots, encode_texts, question_conversation, render
from tests.helpers.tiny import tiny_model

ROLE = "You are a pirate."
SYSTEM = {"role": "system", "content": ROLE}
USER = {"role": "user", "content": "Where do you live?"}
AYE, NO = "Aye, I live aboard me ship, matey.", "I am a program and live nowhere."
ANTHROPIC = {"answer_matching_behavior": AYE, "answer_not_matching_behavior": NO}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER], **ANTHROPIC},
        {"messages": json.dumps([SYSTEM, USER]), "chosen": AYE, "rejected": NO},
        {"prompt": [SYSTEM, USER], "chosen": AYE, "rejected": NO},
        {"prompt": [SYSTEM, USER], "chosen": [says(AYE)], "rejected": [says(NO)]},
        {"chosen": [SYSTEM, USER, says(AYE)], "rejected": [SYSTEM, USER, says(NO)]},
        {"messages": [SYSTEM, USER], "positive": [AYE], "negative": [NO, "other"]},
    ],
)
def test_conversations_are_read_alike(tmp_path, row):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    (item,) = read_items(path)
    assert (item.question, item.matching, item.not_matching) == (USER["content"], AYE, NO)
    assert item.before == (("system", ROLE),) and item.replies and item.alternatives == ()
    shown = render(tiny_model().tokenizer, question_conversation(item.asked), "")
    assert ROLE in shown and USER["content"] in shown


def test_texts_alone_questions_with_replies_and_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f'question,positive,negative\nWhere?,"{AYE}","{NO}"\n')
    (asked,) = read_items(path)
    assert (asked.question, asked.before, asked.asked) == ("Where?", (), "Where?")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"positive": AYE, "negative": NO}))
    (bare,) = read_items(path)
    assert bare.question == "" and bare.matching == AYE and bare.group != asked.group


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q"},
            "missing or empty answer_matching_behavior, answer_not_matching_behavior; expected question",
        ),
        ({"chosen": AYE, "rejected": NO}, "missing or empty question"),
        ({"prompt": "q", "chosen": AYE}, "missing or empty rejected"),
        ({"messages": [SYSTEM], **ANTHROPIC}, "must end with a user's turn, but it ends with the system's"),
        ({"messages": [{"role": "tool", "content": "x"}], **ANTHROPIC}, "roles system, user, assistant"),
        ({"messages": [USER, {"role": "user", "content": 5}], **ANTHROPIC}, "messages must be a text or a list"),
        ({"chosen": [SYSTEM, USER, says(AYE)], "rejected": [USER, says(NO)]}, "answer different conversations"),
        ({"messages": [SYSTEM, USER], "question": "Who?", **ANTHROPIC}, "messages and question ask different things"),
        ({"prompt": "q", "chosen": [USER], "rejected": NO}, "ends with the assistant's"),
        ({"question": "q", "positive": AYE, "negative": AYE.upper()}, "they must differ"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        read_items(path)


def test_a_persona_of_conversations_serves_directions_search_and_evaluation(tmp_path):
    """The role's system message stands in every text, with the prompt behind it or after the question."""
    model = tiny_model()
    path = tmp_path / "pirate.jsonl"
    rows = [{"messages": [SYSTEM, {"role": "user", "content": f"Question {i}?"}], **ANTHROPIC} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    persona = load_persona(path)
    parts = split(persona, seed=0)
    role = encode_texts(model.tokenizer, [ROLE])[0][1:]
    for slot in ("suffix", "system-suffix"):
        placement = Placement(slot=slot)
        asked = search_conversations(parts.train, "decision", placement=placement)
        assert len(asked) == len(parts.train)
        slots = build_slots(model.tokenizer, [c for c, _ in asked], 3)
        assert all(
            any((before[i : i + len(role)] == role).all() for i in range(len(before))) for before in slots.before
        )
        (none,) = choice_eval(model, parts.test, [""], placement=placement, yardsticks=["Rice needs water."] * 2)
        (told,) = choice_eval(model, parts.test, [" now"], placement=placement, yardsticks=["Rice needs water."] * 2)
        assert none.per_token and none.tokens.min() > 3 and none.yardstick.shape == (2,)
        found = rate(told, none).sides
        np.testing.assert_allclose(found.persona.log_prob, told.sides[0].mean(), rtol=1e-6)
        np.testing.assert_allclose(found.yardstick.change.value, (told.yardstick - none.yardstick).mean(), atol=1e-6)
    pairs = contrast_pairs(model, persona, parts.train, "matched")
    assert mean_difference(model, pairs, ["blocks.1.hook_resid_post"]).delta["blocks.1.hook_resid_post"].any()
    with pytest.raises(UserError, match="use 'system-suffix'"):
        search_conversations(parts.train, "decision", placement=Placement(slot="system"))
