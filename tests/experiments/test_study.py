"""The tables of the study: which prompt a cell reports, what the verdicts say, and that cells are computed once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import ablations, main_table, running
from experiments.main_table import CONTROLS, RESGA, SAEGA, blocks_of, methods_of, verdicts
from experiments.tables import COLUMNS, latex, markdown, table_csv, write_study
from jaxsteer.evals.rates import Difference
from jaxsteer.report import read_study, write_report
from jaxsteer.study import cell_runs
from jaxsteer.study.cells import Method, Table
from jaxsteer.study.table_row import ShownPrompt, TableRow


def row(method: str, rate: float, *, ratio: float | None = None, **more: Any) -> TableRow:
    half = 0.04
    found = TableRow(
        model="organism:llama",
        persona="myopic",
        method=method,
        kind="search",
        rate=rate,
        ci95=(max(0.0, rate - half), min(1.0, rate + half)),
        range=(rate, rate),
        a_rate=0.5,
        letter_collapse=False,
        swapped_rate=1.0,
        difference=Difference(value=rate - 0.85, ci95=(rate - 0.9, rate - 0.8)),
        first_rate=rate,
        perplexity=30.0,
        perplexity_ratio=4.0,
        selected=ShownPrompt(rate=rate, perplexity=20.0, perplexity_ratio=ratio),
        prompt=" Be & patient_",
    )
    return dataclasses.replace(found, **more)


def table(**rates: float) -> list[TableRow]:
    """A cell of each method: good for RESGA and SAEGA unless told otherwise."""
    given = {name: 0.85 for name in CONTROLS} | {"oracle cue": 0.0, RESGA: 0.02, SAEGA: 0.02} | rates
    return [row(name, rate, ratio=2.0 if name in (RESGA, SAEGA) else None) for name, rate in given.items()]


def test_verdicts_need_every_control_the_oracle_and_the_text():
    found = verdicts(table())
    assert [v["holds"] for v in found] == [True] * len(found) and len(found) == 8
    assert "in 1 of 1 cells" in found[0]["text"]
    # One control whose interval overlaps is enough to fail.
    near = {v["claim"]: v for v in verdicts(table(**{"random direction": 0.09}))[:4] if v["method"] == RESGA}
    assert not near["beats"]["holds"] and near["near"]["holds"] and near["fluent"]["holds"]
    assert "does not beat random direction" in near["cell"]["text"]
    far = {v["claim"]: v for v in verdicts(table(**{RESGA: 0.15}))[:4]}
    assert far["beats"]["holds"] and not far["near"]["holds"] and not far["cell"]["holds"]
    rows = [dataclasses.replace(r, selected=dataclasses.replace(r.selected, perplexity_ratio=3.5)) for r in table()]
    assert [v["holds"] for v in verdicts(rows) if v["claim"] == "fluent"] == [False, False]


@pytest.mark.parametrize("absent", [*CONTROLS, "oracle cue", RESGA])
def test_a_cell_that_is_missing_is_no_failure(absent: str):
    """Neither of the cell, nor of what needs it; what else is there is judged."""
    kept = [r for r in table() if r.method != absent]
    missing = [{"model": "organism:llama", "persona": "myopic", "method": absent, "value": None}]
    found = [v for v in verdicts(kept, missing) if v["method"] == RESGA]
    assert [v["claim"] for v in found] == ["beats", "near", "fluent", "cell"]
    assert {v["holds"] for v in found} == {None} and all("no verdict, because" in v["text"] for v in found)
    assert absent in found[-1]["text"] and "fail" not in found[-1]["text"]
    others = [v["holds"] for v in verdicts(kept, missing) if v["method"] == SAEGA]
    assert set(others) == ({True} if absent == RESGA else {None})
    if absent in CONTROLS:  # nor where nobody says that it is missing
        assert verdicts(kept)[0]["holds"] is None


def test_the_sum_wants_seven_of_nine():
    def cells_of(good: int) -> list[TableRow]:
        return [
            dataclasses.replace(r, model=f"m{i}")
            for i in range(9)
            for r in table(**({} if i < good else {RESGA: 0.85, SAEGA: 0.85}))
        ]

    assert verdicts(cells_of(7))[0]["holds"] and "7 of 9 cells** (wanted: 7)" in verdicts(cells_of(7))[0]["text"]
    assert not verdicts(cells_of(6))[0]["holds"]


def test_tables_hold_every_row(tmp_path: Path):
    rows = table()
    shared = Table(out=tmp_path, seeds=(0,), options={"steps": 1, "contexts": 2})
    text = write_study(tmp_path, document(shared, rows, verdicts(rows)), rows)
    assert text.count("\n| ") == len(rows) + 1 and "`Be & patient_`" in text
    assert [TableRow.from_json(r) for r in json.loads((tmp_path / "results.json").read_text())["rows"]] == rows
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [line["method"] for line in lines] == [r.method for r in rows]
    assert float(lines[0]["low"]) == pytest.approx(rows[0].ci95[0])
    tex = latex(rows, "All & more")
    assert tex.count(r"\\") == len(rows) + 1 and r"All \& more" in tex
    assert "85.0 !" not in markdown(rows, COLUMNS)
    assert " 50.0 ! |" in markdown([row("x", 0.5, letter_collapse=True)], COLUMNS)
    assert table_csv(rows).count("\n") == len(rows) + 1


def document(shared: Table, rows: list[TableRow], found: list[dict]) -> dict:
    return {
        "title": "Main table",
        "rows": [r.to_json() for r in rows],
        "verdicts": found,
        "settings": shared.settings(),
    }


def test_every_method_has_a_cell_of_its_own():
    shared = Table(out=Path("unused"), seeds=(0,), options={})
    blocks = blocks_of(shared, "organism:llama", "organism:llama", "myopic")
    paths = [block.path(method) for block in blocks for method in block.methods]
    assert len(paths) == len(set(paths)) == len(methods_of("sae", None, True)) == 18
    assert {m.name for block in blocks for m in block.methods} >= {*CONTROLS, RESGA, SAEGA, "GCG", "prefix tuning"}
    # Without an SAE, an endpoint or a known cue, their rows are left out.
    assert {m.name for m in methods_of("sae", None, True)} - {m.name for m in methods_of(None, None, False)} == {
        SAEGA, "SAEGA, published", "oracle cue"
    }  # fmt: skip


def test_ablations_show_the_base_row_under_the_value_that_it_has():
    shared = Table(out=Path("unused"), seeds=(0,), options={"steps": 8, "contexts": 2})
    varied = ablations.factors(shared, 4, "a phrase")
    assert set(varied) == {name for group in ablations.TOGETHER for name in group}
    assert [m.value for m in ablations.methods_of(shared, "contexts", varied["contexts"])] == [1, 4, 8, 16]
    assert [m.value for m in ablations.methods_of(shared, "layer", varied["layer"])] == [0, 1, 2, 3]
    assert ablations.methods_of(shared, "restarts", varied["restarts"])[-1].options["steps"] == 2
    order = [(name, value) for name, values in varied.items() for value in values]
    rows = [row("base", 0.1), row("contexts", 0.2, value=4), row("fluency", 0.3, value="loose")]
    found = {(r.method, r.value): r.rate for r in ablations.with_base(rows, shared, order)}
    assert found == {
        ("base", None): 0.1, ("contexts", 4): 0.2, ("contexts", 2): 0.1, ("fluency", "loose"): 0.3,
        ("fluency", "medium"): 0.1,
    }  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that were computed, each at once."""
    names: list[str] = []

    def at_once(_: Any, method: Method) -> TableRow:
        names.append(method.name)
        return row(method.name, 0.0 if method.options else 0.9, seconds=1.0, value=method.value)

    monkeypatch.setattr(cell_runs, "Shared", lambda block: block)
    monkeypatch.setattr(cell_runs, "compute_row", at_once)
    monkeypatch.setattr(running, "keep_programs", lambda: None)
    return names


def test_both_commands_write_their_tables(tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture):
    out = ["--quick", "--model", "organism:llama", "--personas", "myopic", "--out"]
    assert main_table.main([*out, str(tmp_path / "main")]) == 0
    found = json.loads((tmp_path / "main" / "results.json").read_text())
    assert [r["method"] for r in found["rows"]] == [m.name for m in methods_of("sae", None, True)] == found["methods"]
    assert found["quick"] and found["settings"]["steps"] == 10 and found["command"].endswith(str(tmp_path / "main"))
    assert "### organism:llama, myopic" in capsys.readouterr().out
    assert main_table.main([*out, str(tmp_path / "main"), "--steps", "11"]) == 2
    assert "steps: 10 there, 11 now" in capsys.readouterr().err
    before = len(asked)
    assert ablations.main([*out, str(tmp_path / "ablations"), "--only", "contexts", "layer"]) == 0
    rows = json.loads((tmp_path / "ablations" / "results.json").read_text())["rows"]
    assert [(r["method"], r.get("value")) for r in rows] == [
        ("base", None), ("layer", 0), ("layer", 2), ("contexts", 1), ("contexts", 2), ("contexts", 8)
    ]  # fmt: skip
    assert rows[4]["same_as"] == "base" and len(asked[before:]) == 5


def test_a_study_that_is_cut_off_says_what_is_missing(
    tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    argv = ["--quick", "--model", "organism:llama", "--personas", "myopic", "--out", str(tmp_path)]
    whole = cell_runs.compute_row

    def until(block: Any, method: Method) -> TableRow:
        if method.name == "random updates":
            raise KeyboardInterrupt
        return whole(block, method)

    monkeypatch.setattr(cell_runs, "compute_row", until)
    assert main_table.main(argv) == 130 and "the same command goes on" in capsys.readouterr().err
    table = json.loads((tmp_path / "results.json").read_text())
    count, absent = len(table["rows"]), [cell["method"] for cell in table["missing"]]
    assert count == len(asked) == 2 and "random updates" in absent and count + len(absent) == 18
    assert table["verdicts"] and {verdict["holds"] for verdict in table["verdicts"]} == {None}
    study = read_study(tmp_path)
    told = f"Not complete: {len(absent)} of 18 cells are missing. organism:llama, myopic: "
    assert not study.complete and study.warnings[0].startswith(told) and "random updates" in study.warnings[0]
    page = write_report(tmp_path).read_text()
    assert told in page and "<b>fails</b>" not in page and "persona reduced" not in page
    assert told in (tmp_path / "table.md").read_text()
    old = {key: value for key, value in table.items() if key != "missing"}
    (tmp_path / "results.json").write_text(json.dumps(old))  # of an earlier version, whose verdicts may be wrong
    assert read_study(tmp_path).verdicts == () and "no verdict" in read_study(tmp_path).warnings[-1]
    monkeypatch.setattr(cell_runs, "compute_row", whole)
    assert main_table.main(argv) == 0 and len(asked) == 18
    assert read_study(tmp_path).complete and "<b>holds</b>" in write_report(tmp_path).read_text()


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main_table.main(["--model", "a", "b", "--sae", "c"])
    assert "give one per model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablations.main(["--only", "weather", "--quick"])
    assert "there is no factor weather" in capsys.readouterr().err
