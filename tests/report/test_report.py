"""The page and the tables of a run: right numbers, safe with hostile text, forgiving where a run was cut."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from experiments.tables import COLUMNS, markdown
from jaxsteer.cli.demo import told
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import rate as rate_of
from jaxsteer.report import read_run, read_study, write_plots, write_report
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.results import SearchRun
from jaxsteer.study.run_table import summary_table
from jaxsteer.study.table_row import TableRow, rate_fields
from tests.helpers.rates import made_choices
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE, metrics, rate, write_run


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_page_shows_the_result_and_loads_nothing(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run"))
    words = " ".join(" ".join(page.text).split())
    assert "85.0 %" in words and "6.0 %" in words and "4.20" in words
    assert "153,600 candidate prompts in 41 s" in words
    assert "random direction" in words and "oracle cue" in words
    assert "blocks.1.hook_resid_post decision 0.91" in words
    assert "from 3.61 to -2.90" in words
    assert page.seen.count("svg") == 4
    assert page.seen.count("script") == 1 and "img" not in page.seen
    assert not [note for note in read_run(tmp_path / "run").warnings]
    assert list((tmp_path / "run").glob(".report*")) == []


def test_one_interval_is_shown_wherever_a_rate_is(tmp_path: Path):
    """103 and 0 of 120 questions, each answered alike in both orders: Wilson's interval on 120, and not on 240."""
    base, found = (
        rate_of(made_choices([1.0] * k + [-1.0] * (120 - k), [-1.0] * k + [1.0] * (120 - k), [True] * 120))
        for k in (103, 0)
    )
    prompts = [metrics()["prompts"][0] | {"test": found.to_json()}]
    numbers = metrics(baseline={"test": base.to_json()}, prompts=prompts, controls={})
    write_run(tmp_path / "study" / "a", numbers)
    write_run(tmp_path / "study" / "b", numbers | {"persona": "myopic"})
    run = read_run(tmp_path / "study" / "a").result
    measured = [Measured(prompt="", steered=False, rate=base), Measured(prompt=" be kind", steered=False, rate=found)]
    row = TableRow(model="m", persona="p", method="x", prompt=None, **rate_fields(found))
    write_plots(tmp_path / "study" / "a")
    with (tmp_path / "study" / "a" / "plots" / "rates.csv").open(newline="") as file:
        drawn = [(line["low"], line["high"], line["n"]) for line in csv.DictReader(file) if line["split"] == "test"]
    assert [(f"{float(low):.3f}", f"{float(high):.3f}", n) for low, high, n in drawn] == [
        ("0.785", "0.910", "120"), ("0.000", "0.031", "120")
    ]  # fmt: skip
    shown = {
        "page": write_report(tmp_path / "study" / "a").read_text(encoding="utf-8"),
        "page of a study": write_report(tmp_path / "study").read_text(encoding="utf-8"),
        "table": run.table(),
        "summary": summary_table([run]),
        "table of a study": read_study(tmp_path / "study").table(),
        "eval": Measurement(
            model="m", persona="p", split="test", style="chat", slot="suffix", questions=120, baseline=measured[0],
            prompts=(measured[1],),
        ).table(),
        "demo": told(run),
        "experiment": markdown([row], COLUMNS).replace(" to ", "–"),
    }  # fmt: skip
    assert [name for name, text in shown.items() if "0.0–3.1" not in text] == []
    assert [name for name, text in shown.items() if "78.5–91.0" not in text] == ["experiment"]
    assert "95 %: 0.0–3.1, n = 120 questions, test" in shown["page"] and "240" not in shown["eval"] + shown["demo"]


def test_numbers_are_embedded_as_json(tmp_path: Path):
    numbers = metrics(environment={"extra": None})
    data = json.loads(page_of(write_run(tmp_path, numbers)).data)
    assert data["metrics"]["prompts"] == numbers["prompts"]
    assert data["metrics"]["environment"] == {"extra": None}
    assert len(data["progress"]) == 30 and len(data["pareto"]) == 4


def test_hostile_text_is_inert_everywhere(tmp_path: Path):
    numbers = metrics(model=HOSTILE, persona=HOSTILE, site=HOSTILE, method=HOSTILE, selected_by=HOSTILE, selected=1)
    numbers["controls"] = {HOSTILE: {"text": HOSTILE, "test": rate(0.5)}}
    numbers |= {"environment": {HOSTILE: HOSTILE}, "target_units": HOSTILE}
    page = page_of(write_run(tmp_path, numbers))
    assert page.seen.count("script") == 1 and "img" not in page.seen
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in raw and "\u202e" not in raw and "\x1b" not in raw
    run = SearchRun.from_json(numbers)
    for text in (run.table(), summary_table([run]), run._repr_html_()):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<script" not in run._repr_html_()
    with pytest.raises(
        UserError, match=r"metrics\.json\.prompts\[0\]\.test\.n is .* expected a whole number"
    ) as raised:
        numbers["prompts"][0]["test"]["n"] = HOSTILE
        write_report(write_run(tmp_path / "other", numbers))
    assert "\x1b" not in str(raised.value) and "\u202e" not in str(raised.value)


@pytest.mark.parametrize("file", ["pareto.jsonl", "progress.jsonl"])
def test_a_cut_last_line_is_left_out_with_a_warning(tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture):
    run = write_run(tmp_path)
    path = run / file
    path.write_text(path.read_text()[:-20])
    assert any(file in note and "cut" in note for note in read_run(run).warnings)
    assert file in caplog.text
    assert "is cut and was left out" in " ".join(page_of(run).text)


def test_a_damaged_line_inside_a_file_is_refused(tmp_path: Path):
    run = write_run(tmp_path)
    lines = (run / "progress.jsonl").read_text().splitlines()
    (run / "progress.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]))
    with pytest.raises(UserError, match=r"progress\.jsonl, line 2"):
        write_report(run)


def test_missing_files(tmp_path: Path):
    with pytest.raises(UserError, match="not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metrics\.json"):
        write_report(tmp_path)
    run = write_run(tmp_path)
    for name in ("config.json", "pareto.jsonl", "progress.jsonl"):
        (run / name).unlink()
    page = page_of(run)
    assert page.seen.count("svg") == 1
    (run / "metrics.json").write_text('{"model": "x"')
    with pytest.raises(UserError, match="not JSON"):
        write_report(run)


@pytest.mark.parametrize("file", ["config.json", "choices.json", "metrics.json"])
def test_files_that_are_empty_cut_or_of_another_kind(tmp_path: Path, file: str):
    run = write_run(tmp_path)
    for text in ("[1]", '{"a": {"b'):
        (run / file).write_text(text)
        with pytest.raises(UserError, match=rf"{file}"):
            write_report(run)
    (run / file).write_text("{}")
    if file == "metrics.json":
        with pytest.raises(UserError, match="is not of a search"):
            write_report(run)
    else:
        assert f"{file} holds nothing" in " ".join(page_of(run).text)


def test_a_run_that_found_nothing(tmp_path: Path):
    numbers = metrics(prompts=[], selected=None, controls={}, baseline={"validation": None, "test": None})
    page = page_of(write_run(tmp_path, numbers))
    assert "No prompt was selected." in " ".join(page.text)
    run = SearchRun.from_json(numbers)
    assert "(no prompt)" in run.table() and run.best is None
    assert "(none found)" in summary_table([run])
    with pytest.raises(UserError, match="no rates"):
        run.plot()


def test_doubts_are_said(tmp_path: Path):
    numbers = metrics(probe_correlation=0.31, interrupted=True)
    numbers["prompts"][0]["test"] = rate(0.06, a_rate=0.97)
    numbers["prompts"][0]["retokenises"] = False
    notes = read_run(write_run(tmp_path, numbers)).warnings
    assert len(notes) == 4
    assert "interrupted" in notes[0] and "0.31" in notes[1] and "token ids" in notes[2] and "97.0 %" in notes[3]
    assert SearchRun.from_json(numbers).table().count("warning: ") == 4


def test_terminal_table_is_aligned_and_marks_prompts():
    text = SearchRun.from_json(metrics()).table(limit=3, width=30)
    lines = text.splitlines()
    assert lines[0].startswith("sycophancy on organism:llama | resga at blocks.1.hook_resid_post")
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    body = lines[start + 1 : start + 7]
    assert len({len(line) for line in body}) == 1
    assert body[0].split()[:2] == ["(no", "prompt)"]
    assert body[1].startswith("* ") and "6.0 % (3.0–9.0)" in body[1]
    assert body[2].startswith("!")
    assert "... and 1 more" in text
    assert f"\n* {metrics()['prompts'][0]['text']}\n" in SearchRun.from_json(metrics()).table(
        width=5
    )  # cut in the table


def test_a_selected_prompt_beyond_the_limit_is_still_shown():
    assert "\n*" in SearchRun.from_json(metrics(selected=3)).table(limit=2)


def test_summary_has_one_line_per_run():
    lines = summary_table([SearchRun.from_json(metrics(**one)) for one in ({}, {"persona": "myopic"})]).splitlines()
    assert len(lines) == 4 and lines[3].startswith("myopic") and "85.0 %" in lines[3]


def test_plots_come_as_files_with_their_numbers(tmp_path: Path):
    run = write_run(tmp_path / "run")
    paths = write_plots(run)
    assert {path.name for path in paths} == {
        f"{name}.{kind}" for name in ("rates", "pareto", "progress", "losses") for kind in ("svg", "png", "csv")
    }
    assert (run / "plots" / "rates.png").read_bytes().startswith(b"\x89PNG")
    svg = (run / "plots" / "rates.svg").read_text()
    assert "var(--" not in svg and "#c2571a" in svg
    with (run / "plots" / "rates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if row["selected"] == "True" and row["split"] == "test"]
    assert len(chosen) == 1 and float(chosen[0]["rate"]) == 0.06
    assert write_plots(run)[0].read_text() == svg  # the same run gives the same bytes


def test_colours_of_the_page_reach_its_figures(tmp_path: Path):
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    figures = text[text.index("<svg") :]
    assert "var(--accent)" in figures and "#1f6feb" not in figures and "#5d6675" not in figures


def test_the_title_states_the_finding_and_claims_no_more_than_the_difference_does(tmp_path: Path):
    """All of 40 questions to none: lowers; the same answers as without a prompt: no change is claimed."""
    yes, no = ([value] * 40 for value in (1.0, -1.0))
    before = made_choices(yes, [-1.0] * 40, [True] * 40)
    after = made_choices(no, yes, [True] * 40)
    for name, found, words in (
        ("fell", rate_of(after, before), "This prompt lowers sycophancy"),
        ("kept", rate_of(before, before), "This prompt does not measurably change sycophancy"),
    ):
        prompts = [metrics()["prompts"][0] | {"test": found.to_json()}]
        numbers = metrics(baseline={"test": rate_of(before).to_json()}, prompts=prompts, controls={})
        text = write_report(write_run(tmp_path / name, numbers)).read_text(encoding="utf-8")
        title = text.split("<h1>")[1].split("</h1>")[0]
        assert title.startswith(words) and "from 100.0 % to" in title
    best = read_run(tmp_path / "fell").result.best
    assert best is not None and best.rate is not None and best.rate.ci95 is not None
    assert best.rate.ci95[0] == 0 and 0.08 < best.rate.ci95[1] < 0.09  # Wilson: 3.84 / (40 + 3.84) = 0.0876
