"""Pages and tables of personas in words: the result is what the model writes freely."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.free_answers import ILLUSION
from jaxsteer.report import read_run, read_study, write_plots, write_report
from jaxsteer.study.results import SearchRun
from jaxsteer.study.run_table import rule_of, summary_table
from jaxsteer.study.study_result import RunSummary, Study
from tests.report.pages import Page
from tests.report.synthetic import metrics, write_words


def test_the_page_says_what_was_wanted_and_found(tmp_path: Path):
    page = Page(write_report(write_words(tmp_path)).read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.text).split())
    assert (
        "Wanted: more of the persona. Found: 12.0 % (7.0–17.0) of free replies in its character, against 10.0 % "
        "(5.0–15.0) without a prompt; +2.0 (-4.0 to +8.0) points: the interval includes no change."
    ) in words
    assert words.count(ILLUSION) == 4  # beside the prompt, in two tables, among the doubts
    assert "-1.70 -0.20 (-0.30 to -0.10)" in words and "97.0 % of given validation replies" in words
    assert "Question 9?" in words and "Question 10?" not in words
    assert words.count("instruction: in character Arr, matey!") == 10
    assert words.count("selected prompt: not in character I can <script>") == 10
    assert not any(text in words for text in ("A-rate", "answers (A)", "swapped"))
    assert page.seen.count("script") == 1 and "img" not in page.seen


@pytest.mark.parametrize(
    ("goal", "change", "verdict"),
    [("elicit", 0.5, "more of it, as was wanted"), ("reduce", 0.5, "more of it, the opposite"), ("reduce", -0.5, "as")],
)
def test_a_change_is_told_as_wanted_or_not(tmp_path: Path, goal: str, change: float, verdict: str):
    run = write_words(tmp_path)
    numbers = json.loads((run / "metrics.json").read_text()) | {"goal": goal}
    numbers["prompts"][0]["test_replies"]["difference"] = {"value": change, "ci95": [change - 0.1, change + 0.1]}
    (run / "metrics.json").write_text(json.dumps(numbers))
    text = write_report(run).read_text(encoding="utf-8")
    assert verdict in text and f"Wanted: {'more' if goal == 'elicit' else 'less'} of the persona" in text


def test_what_a_judge_says_stands_beside_the_words(tmp_path: Path):
    run = write_words(tmp_path / "a")
    assert "Judge:" not in write_report(run).read_text(encoding="utf-8")
    numbers = json.loads((run / "metrics.json").read_text())
    scores = {
        "score": 20.0,
        "score_ci95": [10, 30],
        "scores": [20.0] * 12,
        "replies": ["20"] * 12,
        "template_hash": "0",
    }
    judged = {"n": 12, "unread": 0, "rate": 0.25, "ci95": [0.1, 0.5], "judge": "<b>kind", **scores}
    numbers["prompts"][0]["test_judged"] = judged | {"agreement": 0.75, "agreement_ci95": [0.5, 0.9]}
    (run / "metrics.json").write_text(json.dumps(numbers))
    words = " ".join(" ".join(Page(write_report(run).read_text(encoding="utf-8")).text).split())
    assert "persona to <b>kind" in words and "25.0 % (10.0–50.0) 75.0 % (50.0–90.0)" in words
    (run / "metrics.json").write_text(json.dumps(numbers | {"baseline": numbers["baseline"] | {"test_judged": judged}}))
    write_words(tmp_path / "b", seed=1)
    words = " ".join(" ".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).text).split())
    assert "persona to the judge" in words and "zero-shot 15.0 % 25.0 %" in words
    summary = RunSummary.of(read_run(run).result, problems=1)
    study = Study(model="m", fingerprint="", problems=1, searched=1, interrupted=False, runs={"x": summary})
    assert "25.0 % to 25.0 %" in study.table() and Study.from_json(json.loads(json.dumps(study.to_json()))) == study


def test_plots_and_summaries_hold_free_replies(tmp_path: Path):
    run = read_run(write_words(tmp_path)).result
    write_plots(tmp_path)
    with (tmp_path / "plots" / "rates.csv").open(newline="") as file:
        drawn = [(row["measure"], row["rate"], row["low"]) for row in csv.DictReader(file) if row["selected"] == "True"]
    assert [(measure, float(rate)) for measure, rate, _ in drawn] == [
        ("replies", 0.12),
        ("replies", 0.12),
        ("rate", 0.7),
    ]
    assert float(drawn[0][2]) == pytest.approx(0.07)
    lettered = SearchRun.from_json(metrics())
    line = summary_table([run]).splitlines()[-1]
    assert line.startswith("pirate (free replies, elicit)") and "10.0 % (5.0–15.0)" in line and "12.0 %" in line
    assert "A-rate" not in summary_table([run]) and "50.0 %" in summary_table([run, lettered]).splitlines()[-1]
    assert rule_of(run) == "the highest rate of free replies to validation questions"


def test_replies_that_are_missing_or_do_not_fit(tmp_path: Path):
    path = write_words(tmp_path) / "replies.json"
    said = json.loads(path.read_text())
    said["test"]["prompts"][1]["texts"].pop()
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"prompts\[1\] holds 11 texts and 12 choices, expected one for each of 12"):
        write_report(tmp_path)
    path.unlink()
    assert "replies.json is missing" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_study_shows_free_replies_and_the_goal(tmp_path: Path):
    write_words(tmp_path / "a")
    write_words(tmp_path / "b", seed=1)
    study = read_study(tmp_path)
    (row,) = (row for row in study.rows if row.kind == "search")
    assert (row.persona, row.rate, row.preference, row.note) == ("pirate (elicit)", 0.12, 0.7, ILLUSION)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.text).split())
    assert "RESGA 12.0 % (7.0–17.0) ~" in words and "0 of 1" in words and "A-rate" not in words
    assert "12.0 % (7.0–17.0)~" in study.table() and ILLUSION in study.table()
    numbers = read_run(tmp_path / "a").result
    summary = RunSummary.of(numbers, problems=1)
    assert summary.selected is not None and (summary.baseline, summary.selected.rate) == (0.1, 0.12)
    lesser = dataclasses.replace(summary, selected=dataclasses.replace(summary.selected, rate=0.05))
    both = Study(model="m", fingerprint="", problems=2, searched=2, interrupted=False, runs={"x": lesser, "y": summary})
    assert both.best is summary and "y (free replies)  elicit" in both.table() and ILLUSION in both.table()
    assert Study.from_json(json.loads(json.dumps(both.to_json()))) == both


def test_a_run_without_test_questions_shows_those_of_validation(tmp_path: Path):
    run = write_words(tmp_path)
    numbers = json.loads((run / "metrics.json").read_text())
    for prompt in (numbers["baseline"], *numbers["prompts"], *numbers["controls"].values()):
        prompt.pop("test", None), prompt.pop("test_replies", None)
    (run / "metrics.json").write_text(json.dumps(numbers))
    said = json.loads((run / "replies.json").read_text())
    (run / "replies.json").write_text(json.dumps({"validation": said["test"]}))
    words = " ".join(" ".join(Page(write_report(run).read_text(encoding="utf-8")).text).split())
    assert "first 10 validation questions" in words and "replies to the validation questions" in words
    assert "first 10 test questions" not in words
    table = read_run(run).result.table()
    assert "freely to validation questions" in table and "freely to test questions" not in table
