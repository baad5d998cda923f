"""Questions and answers on the page of a run: who flipped, who was kept, who moved the wrong way."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.report import write_report
from jaxsteer.report.answers import read_answers
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE, metrics, write_run

BEFORE, AFTER = (0.9, 0.8, 0.7, 0.2, 0.6), (0.1, 0.85, 0.6, 0.4, 0.5)
"""Probabilities of the persona's answer: a flip, one that got worse, one that was kept, one that rose, and a tie."""


def choices(prompt: str) -> dict:
    """choices.json of five questions in both orders, the swapped copy a little off, so that the mean matters."""

    def log_probs(values: tuple[float, ...]) -> list[list[float]]:
        both = [p for value in values for p in (value + 0.05, value - 0.05)]
        pairs = [(np.log(p), np.log(1 - p)) for p in both]
        return [[float(a), float(b)] if i % 2 == 0 else [float(b), float(a)] for i, (a, b) in enumerate(pairs)]

    ids = [f"q{i}{copy}" for i in (3, 1, 2, 0, 4) for copy in ("", "~swapped")]
    asked = [{"question": f"Question {i}? {HOSTILE}", "persona": " (A)", "other": " (B)"} for i in range(5)]
    return {
        "test": {
            "style": "chat", "slot": "suffix", "ids": ids, "groups": ids, "both_orders": True, "per_token": False,
            "persona_first": [i % 2 == 0 for i in range(10)], "asked": asked,
            "prompts": [
                {"prompt": text, "log_probs": log_probs(values)} for text, values in (("", BEFORE), (prompt, AFTER))
            ],
        }
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, str]:
    """A run with its selected prompt."""
    path = write_run(tmp_path / "run")
    numbers = metrics()
    prompt = numbers["prompts"][numbers.get("selected") or 0]["text"]
    (path / "choices.json").write_text(json.dumps(choices(prompt)))
    return path, prompt


def test_each_question_is_told_by_the_mean_of_both_orders(run: tuple[Path, str]) -> None:
    found = read_answers(*run, elicit=False)
    assert found is not None and found.split == "test"
    np.testing.assert_allclose([one.before for one in found.every], BEFORE, atol=1e-6)
    np.testing.assert_allclose([one.after for one in found.every], AFTER, atol=1e-6)
    flipped, kept, worse = found.kinds
    at = lambda part: [found.every.index(one) for one in part[2]]  # noqa: E731
    assert at(flipped) == [0, 4] and at(kept) == [1, 2] and at(worse) == [3, 1]
    sought = read_answers(*run, elicit=True)
    wrong = [found.every.index(one) for one in sought.kinds[2][2]]
    assert wrong[0] == 0 and set(wrong) == {0, 2, 4}, "sought, falls are the wrong way"
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(found.csv.split(",")[1]).decode())))
    assert len(rows) == 5 and float(rows[0]["after"]) == pytest.approx(0.1) and rows[0]["persona"] == " (A)"


def test_they_stand_on_the_page(run: tuple[Path, str]) -> None:
    text = write_report(run[0]).read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    assert "Flipped: 2" in words and "Moved the wrong way: 2" in words and "0.90 → 0.10" in words
    assert HOSTILE not in text and "answers.csv" in text and page.seen.count("script") == 1


def test_files_without_words_are_left_out_and_damaged_ones_named(run: tuple[Path, str]) -> None:
    path, prompt = run
    assert read_answers(path, " another", elicit=False) is None and read_answers(path, None, elicit=False) is None
    whole = choices(prompt)
    (path / "choices.json").write_text(json.dumps({"test": {k: v for k, v in whole["test"].items() if k != "asked"}}))
    assert read_answers(path, prompt, elicit=False) is None
    for change, said in (("asked", "4 questions in words and 5"), ("persona_first", "damaged"), ("ids", "damaged")):
        cut = json.loads(json.dumps(whole))
        cut["test"][change].pop()
        (path / "choices.json").write_text(json.dumps(cut))
        with pytest.raises(UserError, match=said):
            read_answers(path, prompt, elicit=False)
