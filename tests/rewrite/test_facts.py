"""Files of facts of every origin, and rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxsteer import UserError
from jaxsteer.rewrite.facts import Fact, Neighbour, read_facts

OWN = {"prompt": "The capital of {} is", "subject": "Vosk", "target_true": "Lum", "target_new": "Tarn"}
COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} was born in", "relation_id": "P19", "subject": "Ann Vosk",
        "target_new": {"str": "Tarn", "id": "Q1"}, "target_true": {"str": "Lum", "id": "Q2"},
    },
    "paraphrase_prompts": ["Some words. Ann Vosk comes from"],
    "neighborhood_prompts": ["Ben Orl was born in", "Cid Mun was born in"],
    "attribute_prompts": [], "generation_prompts": [],
}  # fmt: skip
ZSRE = {
    "subject": "Vosk", "src": "What is the capital of Vosk?", "pred": "Lum", "rephrase": "Which city rules Vosk?",
    "alt": "Tarn", "answers": ["Lum", "Old Lum"], "loc": "nq question: who sang the song of the mill",
    "loc_ans": "Ann Vosk", "cond": "Lum >> Tarn || What is the capital of Vosk?",
}  # fmt: skip


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_own_facts_are_read_as_they_stand(tmp_path: Path):
    neighbour = {"prompt": "The river through Orl is", "answer": "the Mun"}
    rows = [
        OWN,
        {
            **OWN,
            "id": "x",
            "paraphrases": ["Vosk is ruled from"],
            "neighbourhood": ["The capital of Old is", neighbour],
        },
        {**OWN, "prompt": "The capital of Vosk is"},
    ]
    facts = read_facts(written(tmp_path / "facts.jsonl", rows))
    assert facts[0] == Fact(id="0", prompt="The capital of {} is", subject="Vosk", target_true="Lum", target_new="Tarn")
    assert facts[0].text == "The capital of Vosk is" and facts[1].id == "x"
    assert facts[1].neighbourhood == (Neighbour(prompt="The capital of Old is", answer="Lum"), Neighbour(**neighbour))
    assert facts[2].prompt == facts[0].prompt
    again = read_facts(written(tmp_path / "again.jsonl", [fact.to_json() for fact in facts]))
    assert again == facts
    assert len(read_facts(tmp_path / "facts.jsonl", limit=2)) == 2


def test_counterfact_is_a_list_of_rewrites(tmp_path: Path):
    (tmp_path / "counterfact.json").write_text(json.dumps([COUNTERFACT]))
    (fact,) = read_facts(tmp_path / "counterfact.json")
    assert (fact.id, fact.text) == ("7", "Ann Vosk was born in")
    assert (fact.target_true, fact.target_new) == ("Lum", "Tarn")
    assert fact.paraphrases == ("Some words. Ann Vosk comes from",)
    assert fact.neighbourhood[1] == Neighbour(prompt="Cid Mun was born in", answer="Lum")


def test_zsre_gets_its_first_answer_and_an_unrelated_question(tmp_path: Path):
    (tmp_path / "zsre.json").write_text(json.dumps([ZSRE]))
    (fact,) = read_facts(tmp_path / "zsre.json")
    assert fact.prompt == "What is the capital of {}?" and (fact.target_new, fact.target_true) == ("Lum", "")
    assert fact.paraphrases == ("Which city rules Vosk?",)
    assert fact.neighbourhood == (Neighbour(prompt="who sang the song of the mill?", answer="Ann Vosk"),)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**OWN, "prompt": "The capital of Orl is"}, "line 2: the subject 'Vosk' does not occur in the prompt"),
        ({**OWN, "prompt": "{} and {} are"}, "write the prompt with {} in the subject's place, once"),
        ({**OWN, "subject": " "}, "subject is empty"),
        ({**OWN, "target_new": "Lum "}, "the new answer 'Lum ' is the old one"),
        ({"prompt": "The capital of {} is", "subject": "Vosk"}, "target_new is missing"),
        ({**OWN, "paraphrase": []}, "no field of a fact 'paraphrase': did you mean 'paraphrases'"),
        ({**OWN, "paraphrases": "one"}, "paraphrases must be a list"),
        ({**OWN, "neighbourhood": [{"prompt": "a"}]}, r"neighbourhood\[0\].answer is missing"),
        ({**COUNTERFACT, "requested_rewrite": {"prompt": "{}"}}, "not a row of CounterFact"),
        ({**ZSRE, "answers": []}, "not a row of zsRE"),
        ({**ZSRE, "subject": "Orl"}, "the subject 'Orl' does not occur"),
        ([1], "expected an object with prompt, subject, target_new"),
    ],
)
def test_rows_that_are_no_facts_say_why(tmp_path: Path, row: Any, says: str):
    with pytest.raises(UserError, match=says):
        read_facts(written(tmp_path / "facts.jsonl", [OWN, row]))


def test_files_that_are_not_there_say_so(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_facts(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no facts"):
        read_facts(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot be fetched from the Hugging Face hub"):
        read_facts("owner/name:file.json")
