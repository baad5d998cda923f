"""Public datasets: each schema, what is wrong in a file with its line, paths and the hub."""

import json
import logging
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval, compared, distinct, rate
from jaxsteer.personas import (
    contrast_pairs,
    instructions,
    invitations,
    load_dataset,
    load_persona,
    mean_difference,
    search_conversations,
    seed_phrase,
    split,
)
from jaxsteer.personas.sources import SOURCES, find_source
from jaxsteer.prompts import build_slots
from tests.helpers.tiny import tiny_model

CSV = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
STATEMENTS = [
    {
        "question": f'Is the following statement something you would say?\n"{text}"',
        "statement": text,
        "label_confidence": 0.9,
        "answer_matching_behavior": " Yes" if i % 2 else " No",
        "answer_not_matching_behavior": " No" if i % 2 else " Yes",
    }
    for i, text in enumerate(
        ["I like rivers", "I hate towns", "Money is all", "Wait a year", "Friends help", "No facts"]
    )
]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_every_source_names_its_licence_and_place() -> None:
    for name, source in SOURCES.items():
        assert (
            source.licence in ("CC BY 4.0", "CC BY-NC 4.0", "MIT", "Apache-2.0")
            and "/" in source.repository
            and source.file
        ), name
    assert find_source("anthropic/persona/agreeableness").file == "persona/agreeableness.jsonl"
    for name in ("anthropic/persona/", "anthropic/persona/a:b", "anthropic/persona/../x", "other"):
        assert find_source(name) is None


MC1, MC2 = (
    {"choices": ["Because", "Never", "Maybe"], "labels": [1, 0, 0]},
    {"choices": ["So", "Because", "Never"], "labels": [1, 1, 0]},
)


@pytest.mark.parametrize(
    ("text", "wrong", "correct"),
    [
        (CSV.replace("Correct", "Best Incorrect Answer,Correct", 1) + "A,B,Why?,Because,%s,Because;So,Never;Maybe,x",
         None, ("Because", "So")),
        (json.dumps({"question": "Why?", "mc1_targets": MC1, "mc2_targets": MC2}), ("Never",), ("Because", "So")),
        (json.dumps({"question": "Why?", "mc1_targets": {"Because": 1, "Never": 0, "Maybe": 0}}), ("Never", "Maybe"),
         ("Because",)),
    ],
)  # fmt: skip
def test_truthfulqa_of_2025_and_its_multiple_choices(
    tmp_path: Path, text: str, wrong: tuple[str, ...] | None, correct: tuple[str, ...]
) -> None:
    path = tmp_path / ("x.csv" if wrong is None else "x.jsonl")
    for best in ("Never", "Maybe"):
        path.write_text(text % best if wrong is None else text)
        found = load_dataset("truthfulqa", path=path)
        (item,), (question,) = found.items, found.questions
        assert (item.not_matching, question.correct) == ("Because", correct)
        assert item.matching == best if wrong is None else question.incorrect == wrong


def test_truthfulqa_as_csv_and_as_the_hub_spells_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = CSV + (
        'A,B,Why?,Because,Because; "It is so; ",Never; Because ;No reason,x\n'
        "A,B,How?,Well,Well; Slowly,Badly; Not at all,x\n"
        "A,B,how?,Well,Well; Slowly,Badly,x\n"
    )
    (tmp_path / "TruthfulQA.csv").write_text("\ufeff" + rows, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        found = load_dataset("truthfulqa", path=tmp_path)
    assert "1 wrong answers that are listed as right" in caplog.text
    assert found.dropped == {"exact duplicates": 1} and found.rows == 3 and found.source.licence == "Apache-2.0"
    first, second = found.questions
    assert (first.best, first.correct[0], first.incorrect) == ("Because", "Because", ("Never", "No reason"))
    assert (second.correct, second.incorrect) == (("Well", "Slowly"), ("Badly", "Not at all"))
    assert [item.not_matching for item in found.items] == ["Because", "Well"]
    drawn = {load_dataset("truthfulqa", path=tmp_path, seed=seed).items[1].matching for seed in range(8)}
    assert drawn == {"Badly", "Not at all"}  # test_defect_11: a seeded draw
    same = [load_dataset("truthfulqa", path=tmp_path).items for _ in range(2)]
    assert same[0] == same[1]
    hub = [
        {"question": "How?", "best_answer": "Well", "correct_answers": ["Well", "Slowly"],
         "incorrect_answers": ["Badly", "Not at all"]},
        {"question": "Why?", "true_answer": "Because", "incorrect_answers": '["Never", "No; reason"]'},
    ]  # fmt: skip
    other = load_dataset(f"truthfulqa:{lines(tmp_path / 'x.jsonl', hub)}")
    assert other.questions[0].incorrect == second.incorrect and other.questions[1].incorrect == ("Never", "No; reason")
    persona = load_persona(f"truthfulqa:{tmp_path}")
    assert persona.behaviour == "hallucination" and persona.questions == found.questions
    assert persona.counter_cues == instructions("hallucination") and len(persona.pro_cues) == 4


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("truthfulqa", CSV + "A,B,Why?,,x,y,z\n", "line 2: missing or empty best_answer"),
        ("truthfulqa", CSV + "A,B,Why?,a,a,,z\n", "line 2: no wrong answer"),
        ("truthfulqa", CSV + 'A,B,"Why\nso?",a,a,b,z\nA,B,How?,a,a,a,z\n', "line 4: no wrong answer"),
        (
            "truthfulqa",
            "Question,Best Answer\nWhy?,a\n",
            "line 2: correct_answers must be .* the row has best_answer",
        ),
        ("truthfulqa", "", "is empty: expected .* Best Answer"),
        ("halueval/qa", '{"question": "q", "right_answer": "a"}', "line 1: missing or empty hallucinated_answer"),
        ("halueval/qa", '{"question": "q", "right_answer"', "line 1: not JSON"),
        ("caa/refusal/open-ended", '[{"question": "q"},\n {"text": "x"}]', "line 2: missing or empty question"),
        ("caa/refusal/ab", '[{"question": "q"}]', "line 1: missing or empty answer_matching_behavior"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / ("x.csv" if name == "truthfulqa" else "x.json")
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_dataset(name, path=path)


def test_halueval_and_open_questions(tmp_path: Path) -> None:
    pair = {"knowledge": "k", "question": "Who?", "right_answer": "Ann", "hallucinated_answer": "Bob was it"}
    same = pair | {"question": "What?", "hallucinated_answer": "ann"}
    found = load_dataset("halueval/qa", path=lines(tmp_path / "qa_data.json", [pair, pair, same]))
    assert [(i.question, i.matching, i.not_matching) for i in found.items] == [("Who?", "Bob was it", "Ann")]
    assert found.dropped == {"exact duplicates": 1, "questions whose two answers are the same": 1}
    folder = tmp_path / "datasets" / "test" / "sycophancy"
    folder.mkdir(parents=True)
    (folder / "test_dataset_open_ended.json").write_text('[{"question": "Is it so?"}, {"question": "Why?"}]')
    free = load_dataset(f"caa/sycophancy/open-ended:{tmp_path}")
    assert (
        [q.question for q in free.questions] == ["Is it so?", "Why?"] and not free.items and len(free.data_hash) == 64
    )
    with pytest.raises(UserError, match="questions without answers"):
        load_persona(f"caa/sycophancy/open-ended:{tmp_path}")


def test_philosophers_answers_come_in_lists(tmp_path: Path) -> None:
    row = {
        "question": "Hello.\n\nChoices:\n (A) Yes\n (B) No", "answer_matching_behavior": " (A)",
        "answer_not_matching_behavior": [" (B)"],
    }  # fmt: skip
    three = row | {
        "question": "Hello.\n\nChoices:\n (A) Yes\n (B) No\n (C) Other",
        "answer_not_matching_behavior": [" (B)", " (C)"],
    }  # fmt: skip
    found = load_dataset("anthropic/sycophancy-philpapers2020", path=lines(tmp_path / "p.jsonl", [row, three]))
    assert [(i.matching, i.not_matching) for i in found.items] == [("(A)", "(B)")]
    assert found.dropped == {"questions that do not offer two choices": 1}


def test_a_place_that_does_not_hold_the_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not hold TruthfulQA.csv"):
        load_dataset("truthfulqa", path=tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("truthfulqa", path=tmp_path / "none.csv")
    with pytest.raises(UserError, match="unknown dataset 'nothing': expected anthropic/sycophancy-nlp-survey"):
        load_dataset("nothing")
    with pytest.raises(UserError, match="a public dataset"):
        load_persona("nothing:here")


def test_the_hub_is_asked_for_what_has_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "agreeableness.jsonl", STATEMENTS)
    asked = []

    def download(repo: str, file: str, *, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(load_dataset("anthropic/persona/agreeableness").items) == 6
    assert asked == [("Anthropic/model-written-evals", "persona/agreeableness.jsonl", "dataset")]
    monkeypatch.undo()  # and without network
    with pytest.raises(
        UserError, match=r"neither in the cache .* https://github.com/sylinrl/TruthfulQA .*truthfulqa:PATH"
    ):
        load_dataset("truthfulqa")
    with pytest.raises(
        UserError, match="is not on the Hugging Face hub: download it from https://github.com/nrimsky/CAA"
    ):
        load_dataset("caa/sycophancy/ab")


def test_parquet_is_read_or_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "validation.parquet"
    path.write_bytes(b"PAR1")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        with pytest.raises(UserError, match="needs pyarrow"):
            load_dataset("truthfulqa", path=path)
        return
    with pytest.raises(UserError, match="is not a Parquet file"):
        load_dataset("truthfulqa", path=path)
    rows = [{"question": "How?", "best_answer": "Well", "correct_answers": ["Well"], "incorrect_answers": ["Badly"]}]
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"question": "Why?", "incorrect_answers": []}]), path)
    with pytest.raises(UserError, match="row 2: no wrong answer"):
        load_dataset("truthfulqa", path=path)


def test_answers_in_words_serve_directions_search_and_evaluation(tmp_path: Path) -> None:
    """A statement has no order of choices to exchange: one row per item, and the decision lies before Yes and No."""
    model = tiny_model()
    persona = load_persona(f"anthropic/persona/agreeableness:{lines(tmp_path / 'x.jsonl', STATEMENTS)}")
    splits = split(persona, seed=0)
    assert not any(item.lettered for item in persona.items) and distinct(persona.items) == persona.items
    for position, per_item in (("published", 1), ("matched", 2), ("decision", 1)):
        conversations = search_conversations(splits.train, position)
        assert len(conversations) == per_item * len(splits.train)
    slots = build_slots(model.tokenizer, [c for c, _ in search_conversations(splits.train, "decision")], 2)
    assert len(slots) == len(splits.train)
    pairs = contrast_pairs(model, persona, splits.train, "matched")
    assert len(pairs) == len(splits.train) and set(pairs.good_letter) == {""}
    direction = mean_difference(model, pairs, ["blocks.1.hook_resid_post"])
    assert direction.delta["blocks.1.hook_resid_post"].any()
    (result,) = choice_eval(model, persona.items, [""])
    assert len(result.ids) == 6 and not result.both_orders and rate(result).swapped_rate is None
    assert [bool(first) for first in result.persona_first] == [i.matching == "Yes" for i in persona.items]
    long = [dataclass_with(item, "Yes indeed, my friend") for item in persona.items]
    (normed,) = choice_eval(model, long, [""])
    summed = compared(normed, per_token=False)
    assert normed.per_token and (summed.values == summed.log_probs).all()  # answers of several words
    assert (normed.tokens.max(1) > normed.tokens.min(1)).all()
    np.testing.assert_allclose(normed.values, summed.values / normed.tokens, rtol=1e-6)


def dataclass_with(item, yes):
    import dataclasses

    answers = {"Yes": yes, "No": "No"}
    return dataclasses.replace(item, matching=answers[item.matching], not_matching=answers[item.not_matching])


def test_sentences_for_and_against_any_behaviour() -> None:
    for behaviour in ("sycophancy", "hallucination", "myopic", "power-seeking"):
        against = instructions(behaviour)
        assert len(set(against)) == 10 and len(set(invitations(behaviour))) == 4 and seed_phrase(behaviour)
    assert all("power-seeking" in text for text in instructions("power-seeking"))
