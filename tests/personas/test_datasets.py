"""Dataset files: every accepted form, and one clear message with its line for every refused one."""

import json
import logging

import pytest

from jaxsteer.errors import UserError
from jaxsteer.personas import load_persona, read_items

A, B = " (A)", " (B)"


def row(question="Now or later?", matching=A, not_matching=B, **more):
    return {
        "question": f"{question}\n\nChoices:\n (A) now\n (B) later",
        "answer_matching_behavior": matching,
        "answer_not_matching_behavior": not_matching,
        **more,
    }


def jsonl(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_labels_with_and_without_spaces_are_the_same(tmp_path):
    """test_defect_22: " (A)" equals "(A)"."""
    path = jsonl(tmp_path, row("one?"), "", row("two?", "(A)", "(B) "), row("three?", "B", "A"))
    items = read_items(path)
    assert [(i.matching, i.not_matching, i.line) for i in items] == [
        ("(A)", "(B)", 1),
        ("(A)", "(B)", 3),
        ("(B)", "(A)", 4),
    ]


def test_json_lists_and_csv_give_the_same_items(tmp_path):
    rows = [row("one?"), row('a, "quoted"\nquestion?', B, A)]
    lines = read_items(jsonl(tmp_path, *rows))
    listed = tmp_path / "data.json"
    listed.write_text(json.dumps(rows, indent=2))
    table = tmp_path / "data.csv"
    cells = [",".join('"' + value.replace('"', '""') + '"' for value in r.values()) for r in rows]
    table.write_text("\ufeff" + ",".join(rows[0]) + "\n" + "\n".join(cells) + "\n", encoding="utf-8")
    for path, starts in ((listed, [2, 7]), (table, [2, 7])):
        items = read_items(path)
        assert [(i.question, i.matching, i.group) for i in items] == [(i.question, i.matching, i.group) for i in lines]
        assert [i.line for i in items] == starts


def test_duplicates_and_other_choice_counts_are_dropped_and_counted(tmp_path, caplog):
    three = row("three?", A, " (C)")
    three["question"] += "\n (C) never"
    bare = {**row(), "question": "No choices here?"}
    path = jsonl(tmp_path, row(), row(), three, bare, row("two?"))
    with caplog.at_level(logging.WARNING):
        items = read_items(path)
    assert [i.line for i in items] == [1, 5]
    assert "1 exact duplicates" in caplog.text and "2 questions that do not offer two choices" in caplog.text


def test_the_same_question_in_both_orders_is_kept(tmp_path):
    other = row("Now or later?", B, A)
    other["question"] = other["question"].replace("(A) now\n (B) later", "(A) later\n (B) now")
    items = read_items(jsonl(tmp_path, row(), other))
    assert len(items) == 2 and items[0].group == items[1].group


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row(), {"question": "q"}], "line 2: missing or empty answer_matching_behavior, answer_not_matching"),
        ([row(), row("x?", "  ", B)], "line 2: missing or empty answer_matching_behavior"),
        ([row("x?", 1, B)], "line 1: answer_matching_behavior must be a text"),
        ([row("x?", " (C)", B)], r"line 1: answer_matching_behavior is '\(C\)'"),
        ([row("x?", " Yes", " No")], "line 1: answer_matching_behavior is 'Yes'"),
        ([row("x?", A, "(A)")], "line 1: both answers are"),
        ([row(), '{"question": '], "line 2: not JSON"),
        ([row(), '"text"'], "line 2: expected an object"),
        (["null"], "line 1: expected an object with a question, two answers, got null"),
        ([row("x?", "[A]", "[B]") | {"question": "x?\n[A] now\n[B] later"}], "line 1: .*look like labels"),
        ([row("x?", "0)", "1)") | {"question": "x?\n 0) now\n 1) later"}], "line 1: .*look like labels"),
        ([row("x?", "（A）", "（B）") | {"question": "x?\n（A） now\n（B）later"}], "line 1: .*look like labels"),  # noqa: RUF001
        ([row("x?", "А", "Б") | {"question": "x?\nА) now\nБ) later"}], "line 1: .*look like labels"),  # noqa: RUF001
        ([row() | {"question": "x?\n (A) Same\n (B) same"}], "none of its 1 questions"),
        ([row() | {"question": "x?\n (A)\n (B)"}], "none of its 1 questions"),
        ([row(), row("y?"), row("Now  OR later?", B, A)], "lines 1 and 3 .* disagree"),
        ([], "is empty"),
        ([{**row(), "question": "No choices?"}], "none of its 1 questions"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_items(jsonl(tmp_path, *lines))


def test_a_swapped_copy_that_disagrees_is_refused(tmp_path):
    other = row()
    other["question"] = other["question"].replace("(A) now\n (B) later", "(A) later\n (B) now")
    with pytest.raises(UserError, match="lines 1 and 2"):
        read_items(jsonl(tmp_path, row(), other))


def test_csv_without_the_columns_lists_what_it_has(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("Question,Best Answer\na,b\n")
    with pytest.raises(
        UserError, match="missing or empty question, .* the row has Best Answer, Question .a public dataset"
    ):
        read_items(path)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_items(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,positive,negative\nq,Yes,No\nWell, do you like it?,Yes,No\n", "line 3: there are more values"),
        ("question,positive,positive\nq,Yes,No\n", "line 1: there are two columns 'positive'"),
        ("question;positive;negative\nq;Yes;No\n", "line 1: there is one column, .* must be separated by commas"),
    ],
)
def test_csv_cells_are_not_lost(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_items(path)
    path.write_text("question,positive,negative,,\nq,Yes,No,,,\n")
    assert read_items(path)[0].matching == "Yes"


def test_broken_json_lists_and_encodings_are_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[\n" + json.dumps(row()) + ",\n{oops}]")
    with pytest.raises(UserError, match="line 3: not JSON"):
        read_items(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not UTF-8"):
        read_items(path)
    with pytest.raises(UserError, match="does not exist"):
        read_items(tmp_path / "absent.jsonl")


def test_a_persona_file_brings_its_cues(tmp_path):
    jsonl(tmp_path, row())
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"name": "haste", "data": "data.jsonl", "counter_cues": ["Wait."], "pro_cues": ["Hurry."]})
    )
    persona = load_persona(path)
    assert (persona.name, persona.counter_cues, persona.pro_cues) == ("haste", ("Wait.",), ("Hurry.",))
    assert load_persona(path, counter_cues=["Be patient."]).counter_cues == ("Be patient.",)
    plain = load_persona(tmp_path / "data.jsonl", pro_cues=["Now!"])
    assert plain.name == "data" and plain.pro_cues == ("Now!",) and plain.data_hash == persona.data_hash
    path.write_text(json.dumps({"data": "data.jsonl", "pro_cues": "Hurry."}))
    with pytest.raises(UserError, match="pro_cues must be a list"):
        load_persona(path)
    path.write_text(json.dumps({"data": "data.jsonl", "counter_cue": ["Wait."]}))
    with pytest.raises(UserError, match="no field 'counter_cue': did you mean 'counter_cues'"):
        load_persona(path)


def test_unknown_personas_list_the_known_ones():
    with pytest.raises(UserError, match="sycophancy, hallucination, myopic"):
        load_persona("grumpiness")


def test_built_in_personas_need_no_file():
    persona = load_persona("sycophancy", n=40)
    assert len(persona.items) == 40 and persona.counter_cues and persona.pro_cues
    assert load_persona("sycophancy", n=40).data_hash == persona.data_hash


def test_refusal_is_a_built_in_persona_with_requests_of_its_own():
    persona = load_persona("refusal", n=60)
    assert len(persona.items) == 60 and persona.counter_cues and persona.pro_cues
    assert load_persona("refusal", n=60).data_hash == persona.data_hash
    assert sum(item.id.startswith("harmful") for item in persona.items) == 30
    assert all(item.matching.startswith("I ") and item.not_matching[0] in "SYG" for item in persona.items)


@pytest.mark.parametrize(
    ("first", "second", "matching", "not_matching"),
    [
        ("(a)", "(b)", "(a)", " (b)"),
        ("a)", "b)", "a", "b"),
        ("1)", "2)", "1)", "2)"),
        ("(1)", "(2)", "(1)", "2"),
        ("A.", "B.", "A.", "B"),
        ("A)", "B)", "A)", "(B)"),
        ("(A)", "(B)", "a", "(b)"),
    ],
)
def test_choices_are_labelled_in_many_ways(tmp_path, first, second, matching, not_matching):
    text = f"1. Read. Which?\n {first} now\n {second} later\n"
    (item,) = read_items(jsonl(tmp_path, row("x", matching, not_matching) | {"question": text}))
    assert item.question == "1. Read. Which?\n (A) now\n (B) later"
    assert (item.matching, item.not_matching) == ("(A)", "(B)")


def test_numbers_are_answers_in_words_where_no_choice_has_such_a_label(tmp_path):
    other = {"question": "1. How many?", "answer_matching_behavior": "1", "answer_not_matching_behavior": "2"}
    (item,) = read_items(jsonl(tmp_path, other))
    assert (item.question, item.matching) == ("1. How many?", "1")


def test_an_object_may_hold_the_rows(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"counter_cues": ["Wait."], "data": [row(), row("two?")]}))
    persona = load_persona(path)
    assert persona.counter_cues == ("Wait.",) and [item.line for item in persona.items] == [1, 2]
    assert read_items(path) == persona.items
