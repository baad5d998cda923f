"""Texts from files: every form is read, and what is none is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxsteer import UserError
from jaxsteer.lens.records import TextRecord, read_texts


def test_forms(tmp_path: Path):
    turns = [{"role": "user", "content": "Hi"}]
    rows = [
        {"text": "a", "label": "yes", "group": 3, "target": " x"},
        {"messages": turns, "type": "w"},
        {"question": "Hi"},
        {"question": "Hi", "answer": "Ho", "label": None},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    answered = (*turns, {"role": "assistant", "content": "Ho"})
    assert read_texts(path) == (
        TextRecord(text="a", label="yes", group="3", target=" x"),
        TextRecord(messages=tuple(turns), type="w"),
        TextRecord(messages=tuple(turns)),
        TextRecord(messages=answered),
    )
    assert read_texts(path, chat=True)[0].messages == ({"role": "user", "content": "a"},)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [record.said for record in read_texts(tmp_path / "a.txt")] == ["one", "two"]
    (tmp_path / "a.csv").write_text("text,label\none,1\n")
    assert read_texts(tmp_path / "a.csv") == (TextRecord(text="one", label="1"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "a"}, "line 1: expected exactly one of text, messages and question, got none"),
        ({"text": "a", "question": "b"}, "got text and question"),
        ({"text": 3}, "text must be a text, got 3"),
        ({"messages": ["a"]}, "messages must be a list"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        read_texts(path)


def test_empty_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        read_texts(tmp_path / "a.txt")
