"""Starts: a phrase's own tokens, an earlier run's prompts, and what cannot stand in a slot."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompts import PAD, Placement, build_slots, prompt_text, question_conversation, retokenises
from jaxsteer.study.initial_prompts import first_prompts, listed_texts, phrase_ids, spread
from tests.helpers.tiny import KINDS, tiny_tokenizer

QUESTIONS = ("Do you agree or disagree?", "I think the answer is clear.")


def conversations(slot: str = "suffix"):
    return [question_conversation(q, Placement(slot=slot), alternatives=("(A)", "(B)")) for q in QUESTIONS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", ["suffix", "prefix", "system"])
def test_a_phrase_gives_the_ids_that_its_text_has_in_place(kind: str, slot: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    ids = phrase_ids(tokenizer, conversations(slot), "Be honest and careful")
    assert ids is not None and len(ids) > 3
    slots = build_slots(tokenizer, conversations(slot), len(ids))
    assert retokenises(tokenizer, slots, ids)
    assert prompt_text(tokenizer, ids).strip() == "Be honest and careful"


def test_an_earlier_run_is_taken_by_its_texts(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [("Be honest and careful", True), ("frank evidence please", True), ("Be honest and x", False)]
    lines = [json.dumps({"text": text, "retokenises": good}) for text, good in rows]
    (tmp_path / "pareto.jsonl").write_text("\n".join(lines) + "\n")

    def ask(**given):
        return first_prompts(tokenizer, conversations(), **{"phrase": None, "run": None, "lengths": None} | given)

    first, second = (phrase_ids(tokenizer, conversations(), text) for text, good in rows if good)
    assert ask() is None
    found = ask(run=tmp_path, lengths=(len(second), len(second)))
    np.testing.assert_array_equal(found, second[None])
    np.testing.assert_array_equal(ask(run=tmp_path), first[None])
    np.testing.assert_array_equal(ask(phrase=rows[0][0]), first[None])
    with pytest.raises(UserError, match=r"has \d+ tokens, but --prompt-length is 2"):
        ask(phrase=rows[0][0], lengths=(2, 2))
    several = ask(run=tmp_path, lengths=(1, len(first) + 2))
    np.testing.assert_array_equal(several[0], [PAD, PAD, *first])
    assert len(several) == 2 and several[1].tolist()[-len(second) :] == second.tolist()
    with pytest.raises(UserError, match="give one of them"):
        ask(phrase="x", run=tmp_path)
    with pytest.raises(UserError, match="not the result of a search"):
        ask(run=tmp_path / "none")
    with pytest.raises(UserError, match="cannot stand in the slot"):
        ask(phrase="  ")
    (tmp_path / "pareto.jsonl").write_text(lines[2])
    with pytest.raises(UserError, match="found no prompt"):
        ask(run=tmp_path)


def test_spread_gives_the_first_slot_the_best() -> None:
    prompts = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(spread(prompts, 5)[:, 0], [0, 0, 2, 4, 4])
    np.testing.assert_array_equal(spread(prompts[:1], 3)[:, 0], [0, 0, 0])


def test_what_is_allowed_may_stand_in_files(tmp_path) -> None:
    (tmp_path / "words.txt").write_text("honest\n\n frank\nhonest\n")
    assert listed_texts(["clear", str(tmp_path / "words.txt")]) == ["clear", "honest", " frank"]
    assert listed_texts([]) == []
    (tmp_path / "words.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no text"):
        listed_texts([str(tmp_path / "words.txt")])
