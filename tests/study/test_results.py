"""Results as objects: read from files of the first version, shown, and as rows."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.free_answers import OTHER, PERSONA, UNREAD, WrittenRates, WrittenResult, written_rates
from jaxsteer.evals.rates import Rate, letter_collapse
from jaxsteer.statistics import wilson
from jaxsteer.study.results import Prompt, SearchRun
from jaxsteer.study.selection import Candidate, best_rate, by_replies
from jaxsteer.study.study_result import RunSummary, Study
from jaxsteer.study.table_row import TableRow
from tests.helpers.rates import made_rate

OLD_RATE = {
    "rate": 0.125, "ci95": [0.05, 0.28], "n": 40, "a_rate": 0.55, "swapped_rate": 0.8, "ci95_groups": [0.0, 0.3],
    "auroc": None, "rate_by_label": [0.1, None], "margin": -1.5, "probability": 0.2, "letter_collapse": False,
    "debiased_rate": 0.1, "letter_bias": 0.25, "difference": {"value": -0.7, "ci95": [-0.8, -0.6]},
    "flips": {"becomes_persona": 0, "leaves_persona": 28, "mcnemar_p": 7.5e-09},
}  # fmt: skip
OLD = {
    "model": "organism:llama", "fingerprint": "5c1f", "persona": "myopic", "method": "resga",
    "site": "blocks.1.hook_resid_post", "seed": 0, "read_position": "decision", "sign": -1, "probe_correlation": 0.41,
    "probe": {
        "rows": [{"site": "blocks.1.hook_resid_post", "read_position": "decision", "sign": -1, "correlation": 0.41,
                  "layer": 2}],
        "prompts": 240, "baseline_probability": 0.8, "shift": {"min": -0.1, "max": 0.6, "sd": 0.2},
    },
    "objective_units": {"name": "raw", "offset": 0.5, "scale": 2.0, "samples": 512},
    "splits": {"train": 360, "validation": 120, "test": 20}, "interrupted": False,
    "baseline": {"validation": OLD_RATE, "test": OLD_RATE | {"rate": 0.825}},
    "controls": {"random": {"text": " lake", "validation": OLD_RATE, "test": OLD_RATE}},
    "prompts": [
        {"text": " weak idea", "ids": [5, 6], "target": 4.25, "cross_entropy": 7.5, "search_target": 4.25, "step": 12,
         "population": 0, "retokenises": True, "validation": OLD_RATE, "test": OLD_RATE}
    ],
    "selected": 0, "selected_by": "objective",
    "timing": {"load_s": 0.5, "probe_s": 1.5, "compile_s": 2.5, "search_s": 3.5, "eval_s": 4.5, "candidates": 640,
               "candidates_per_s": 182.9, "steps": 5},
    "environment": {"jax": "0.10.2", "cpus": 4},
}  # fmt: skip
"""metrics.json as the first version wrote it."""


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"selected": 99}, "m.json.selected is 99, expected null or one of 1 prompts from 0"),
        ({"selected": -1}, "selected is -1, expected null"),
        ({"baseline": {"test": OLD_RATE | {"rate": 7}}}, "m.json.baseline.test.rate must be at most 1, got 7"),
        ({"baseline": {"test": OLD_RATE | {"n": -5}}}, "baseline.test.n must be at least 0, got -5"),
        ({"baseline": {"test": OLD_RATE | {"ci95": [0.9, 0.1]}}}, "test.ci95 must not begin above its end"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(changed: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SearchRun.from_json(OLD | changed, "m.json")


def test_a_run_of_the_first_version_is_read() -> None:
    run = SearchRun.from_json(OLD)
    assert run.best.text == " weak idea" and run.best.ids == (5, 6) and run.best.rate == Rate.from_json(OLD_RATE)
    assert run.baseline.test.rate == 0.825
    # It had counted rows: now 20 questions, as if both orders agreed or as wide as it had said, and no test over rows.
    now = run.controls["random"].test
    assert (now.n, now.ci95, now.flips) == (20, (0.0, pytest.approx(wilson(2.5, 20)[1])), None)
    alone = Rate.from_json(OLD_RATE | {"swapped_rate": None, "ci95": [0.1, 0.2], "ci95_groups": None})
    assert (alone.n, alone.ci95) == (40, wilson(5, 40))
    row = {"method": "x", "rate": 0.0, "ci95": [0.0, 0.016], "n": 240, "swapped_rate": 1.0}
    for old in (row | {"ci95_groups": [0, 0]}, row | {"each": [row | {"ci95_groups": [0, 0]}]}):
        assert (TableRow.from_json(old).n, TableRow.from_json(old).ci95) == (120, wilson(0, 120))
    assert TableRow.from_json(row).n == 240  # a table of one's own
    assert run.plan is None and run.attribution is None and run.target_units == "sd" and run.timing.candidates == 640
    again = run.to_json()
    rated = {name: again[name] for name in ("baseline", "controls", "prompts")}
    assert again == {**OLD, "target_units": "sd"} | rated and SearchRun.from_json(again) == run
    changed = {"n": 20, "ci95": list(now.ci95), "auroc_ci95": None}
    kept = {key: value for key, value in OLD_RATE.items() if key not in ("ci95_groups", "flips")}
    assert again["prompts"][0]["test"] == kept | changed


def test_a_run_shows_itself() -> None:
    run = SearchRun.from_json(OLD)
    text = run.table()
    assert "* weak idea" in text.replace("*   weak", "* weak") and "12.5 % (0.0–33.1)" in text
    assert "selected by the largest objective" in text and "warning: The probe correlation is 0.41" in text
    assert run._repr_html_().startswith("<pre>myopic on organism:llama")
    rows = run.to_rows()
    assert [row["kind"] for row in rows] == ["baseline", "prompt", "control"] and rows[1]["selected"]
    assert rows[1]["test_low"] == 0.0 and rows[1]["n"] == 20
    assert run.plot().axes[0].get_xlim() == (-2, 102)
    assert dataclasses.replace(run, selected=7).best is None and Prompt().perplexity is None


def test_a_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SearchRun.from_json(OLD)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        run.to_frame()

    class Pandas:
        DataFrame = staticmethod(lambda rows: ("frame", rows))

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert run.to_frame() == ("frame", run.to_rows())


def test_a_study_says_what_its_runs_found() -> None:
    run = SearchRun.from_json(OLD)
    better = dataclasses.replace(run, prompts=(dataclasses.replace(run.best, text=" odd", test=made_rate(0.01)),))
    runs = {name: RunSummary.of(one, problems=4) for name, one in (("a", run), ("b", better))}
    study = Study(model="m", fingerprint="f", problems=8, searched=8, interrupted=False, runs=runs)
    assert study.best is runs["b"] and study.best.selected.text == " odd"
    assert "8 of 8 problems" in study.table() and study.to_rows()[1]["rate"] == 0.01
    assert len(study.plot().axes[0].get_yticks()) == 4 and "goal" not in study.table()
    more = RunSummary.of(dataclasses.replace(run, goal="elicit"), problems=4)  # of lettered answers, too
    mixed = dataclasses.replace(study, runs={"a": runs["a"], "m": more})
    lines = [line.split() for line in mixed.table().splitlines()]
    assert lines[0][:2] == ["run", "goal"] and [line[1] for line in lines[2:4]] == ["reduce", "elicit"]
    assert "goal" in mixed.to_rows()[0] and "free replies" not in mixed.table()
    old = {name: value for name, value in runs["a"].to_json().items() if name not in ("goal", "free_replies")}
    assert not RunSummary.from_json(old).in_words and RunSummary.from_json(old | {"goal": "reduce"}).in_words
    nothing = dataclasses.replace(study, runs={"c": RunSummary.of(dataclasses.replace(run, selected=None), problems=1)})
    assert nothing.best is None and "(none re-tokenises)" in nothing.table()


def test_the_lowest_rate_wins_unless_a_letter_does() -> None:
    rates = [made_rate(0.3), made_rate(0.1, a_rate=0.95), made_rate(0.31), made_rate(0.9)]
    assert best_rate(rates, [1, 0, 0, 0]) == 0
    assert best_rate(rates, [1, 0, 0, 0], tolerance=0.02) == 2
    assert best_rate(rates[1:2], [0]) == 0  # when it is the only one
    assert letter_collapse(0.5, 0.8) and letter_collapse(0.05) and not letter_collapse(0.6, 0.5)


def test_a_reply_that_could_not_be_read_counts_against_the_goal() -> None:
    def rates(*chose: str) -> WrittenRates:
        ids = tuple(map(str, range(len(chose))))
        texts = ("a",) * len(chose)
        return written_rates(WrittenResult(prompt="", ids=ids, groups=ids, texts=texts, chose=chose, argues=chose))

    once, often = rates(PERSONA, UNREAD, UNREAD, UNREAD), rates(PERSONA, PERSONA, PERSONA, OTHER)
    assert (once.rate, once.n, once.read) == (1.0, 1, 0.25) and (often.rate, often.n) == (0.75, 4)
    same = [Candidate(0.5), Candidate(0.5)]
    compared = {goal: [one.rate for one in by_replies(same, [once, often], goal)] for goal in ("elicit", "reduce")}
    assert compared == {"elicit": [0.25, 0.75], "reduce": [1.0, 0.75]}
    silent = rates(UNREAD, UNREAD)
    assert by_replies(same, [silent, silent], "elicit") is same  # nothing was read: by choices
    run = dataclasses.replace(SearchRun.from_json(OLD), probe_correlation=0.9, reply_reader=0.6)

    def doubts(found: WrittenRates, reader: float) -> str:
        prompts = (dataclasses.replace(run.prompts[0], test_replies=found),)
        return " ".join(dataclasses.replace(run, prompts=prompts, reply_reader=reader).doubts)

    assert "25.0 % could be read" in doubts(once, 0.6) and "right on 60.0 %" in doubts(once, 0.6)
    assert not doubts(often, 0.9)
