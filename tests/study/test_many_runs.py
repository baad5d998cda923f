"""Many searches in one run: the product, tables from files, every problem in the files, resumption."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.report import write_report
from jaxsteer.study import SearchOptions, run
from jaxsteer.study.options import ProblemOptions
from jaxsteer.study.problem_table import rows_of
from tests.helpers.tiny import tiny_model

Make = Callable[..., SearchOptions]
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


def model() -> Model:
    return Model(**vars(tiny_model()))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_problem_of_a_product_is_in_the_files(options: Make, compile_counter) -> None:  # noqa: ANN001
    vary = (f"site={','.join(SITES)}", "fluency=strict,loose", "seed=3:5")
    with compile_counter() as count:
        metrics = run(options(vary=vary), model=model())
        assert count["advance"] == 2, "one program per site"
    out = options().run.out
    assert metrics.problems == metrics.searched == 8 and len(metrics.runs) == 2
    rows = table(out / "problems.csv")
    assert [row["problem"] for row in rows] == [str(i) for i in range(8)]
    assert {(row["site"], row["fluency"], row["seed"]) for row in rows} == {
        (site, fluency, seed) for site in SITES for fluency in ("strict", "loose") for seed in "34"
    }
    frontiers = lines(out / "frontiers.jsonl")
    for row in rows:
        mine = [f for f in frontiers if f["problem"] == int(row["problem"]) and f["retokenises"]]
        assert len(mine) == int(row["prompts"])
        targets, entropies = [f["target"] for f in mine], [f["cross_entropy"] for f in mine]
        assert targets == sorted(targets, reverse=True) and entropies == sorted(entropies, reverse=True)
        assert not mine or (mine[0]["text"] == row["text"] and mine[0]["target"] == float(row["target"]))
    for name, brief in metrics.runs.items():
        assert brief.problems == 4
        found = json.loads((out / name / "metrics.json").read_text())
        assert found["prompts"][0]["target"] >= max(float(r["target"] or -9) for r in rows if r["run"] == name) - 1e-3
        assert "<html" in write_report(out / name).read_text()
    assert not (out / "search-state").exists()
    assert run(options(vary=vary)) == metrics, "a finished run is not repeated"
    with pytest.raises(UserError, match="another run"):
        run(options(vary=vary[:2]))


@pytest.mark.slow
def test_a_problem_finds_the_same_alone_and_among_others(options: Make, tmp_path: Path) -> None:
    site = f"site={SITES[1]}"
    run(options(vary=(site, "fluency=strict,loose", "seed=3:6")), model=model())
    run(options(out=tmp_path / "alone", vary=(site, "fluency=loose", "seed=4")), model=model())
    rows = table(options().run.out / "problems.csv")
    number = next(int(row["problem"]) for row in rows if (row["fluency"], row["seed"]) == ("loose", "4"))
    among = [f for f in lines(options().run.out / "frontiers.jsonl") if f.pop("problem") == number]
    alone = lines(tmp_path / "alone" / "frontiers.jsonl")
    assert among and among == [{k: v for k, v in f.items() if k != "problem"} for f in alone]


@pytest.mark.slow
def test_a_table_of_problems_with_directions_and_methods(options: Make, tmp_path: Path) -> None:
    file = tmp_path / "problems.csv"
    file.write_text(f"seed,site,direction\n0,{SITES[1]},random:1\n0,{SITES[1]},\n1,auto,\n")
    metrics = run(options(problems=file), model=model())
    assert len(metrics.runs) == 3 and metrics.searched == 3
    rows = table(options().run.out / "problems.csv")
    assert [row["direction"] for row in rows] == ["random:1", "", ""]
    again = options(
        out=tmp_path / "file",
        site=SITES[1],
        direction=str(options().run.out / rows[1]["run"] / "direction.safetensors"),
    )
    given = run(again, model=model())
    first = json.loads((options().run.out / rows[1]["run"] / "metrics.json").read_text())
    assert list(given.prompts[0].ids) == first["prompts"][0]["ids"], "the same direction, from its file"


@pytest.mark.slow
def test_what_was_cut_off_goes_on(options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxsteer.study.many_runs as module

    vary = (f"site={','.join(SITES)}", "seed=0:2")
    whole = run(options(out=tmp_path / "whole", vary=vary), model=model())
    searched = module.search

    def once(*args: object, group: int, **more: object) -> object:
        if group == 1:
            raise MemoryError("the machine is gone")
        return searched(*args, group=group, **more)

    monkeypatch.setattr(module, "search", once)
    with pytest.raises(MemoryError):
        run(options(vary=vary), model=model())
    monkeypatch.undo()

    def ended(*args: object, **more: object) -> object:  # as by Ctrl-C
        found = searched(*args, **more)
        stopped = dataclasses.replace(found[0].result, interrupted=True)
        return [dataclasses.replace(found[0], result=stopped), *found[1:]]

    monkeypatch.setattr(module, "search", ended)
    part = run(options(out=tmp_path / "part", vary=vary), model=model())
    assert part.interrupted and sum(part.missing.values()) == part.problems - part.searched == 2
    assert "2 of 4 problems were searched (missing: " in part.table() and not whole.missing
    monkeypatch.undo()
    metrics = run(options(vary=vary, resume=True), model=model())
    assert metrics.runs.keys() == whole.runs.keys()
    for name in ("problems.csv", "frontiers.jsonl"):
        assert (options().run.out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    progress = lines(options().run.out / "progress.jsonl")
    assert [row["group"] for row in progress] == [0, 1]


def test_the_function_of_the_package(options: Make, persona_file: Path) -> None:
    with pytest.raises(UserError, match="no option 'people'"):
        jaxsteer.search(out="x", people=3)
    with pytest.raises(UserError, match=r"fluency is 'brisk', but may be"):
        jaxsteer.search(out="x", persona=str(persona_file), vary={"fluency": ["brisk"], "seed": range(2)})


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        (("colour=red",), "there is no column colour"),
        (("seed=a",), "neither a number nor a range"),
        (("seed=3:3",), "neither a number nor a range"),
        (("seed",), "expects name=value"),
        (("seed=1", "seed=2"), "once per name"),
        (("seed=1,1",), "are the same"),
        (("method=magic",), "method is 'magic', but may be resga, saega"),
        (("seed=0:2000", "restart=0:2000"), "at most"),
    ],
)
def test_products_that_cannot_be(options: Make, vary: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        rows_of(ProblemOptions(vary=vary))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.csv", "seed,colour\n1,red\n", "there is no column colour"),
        ("p.csv", "seed\nx\n", "must be a whole number"),
        ("p.csv", "seed\n1,2\n", "more values than there are columns"),
        ("p.csv", "seed,seed\n1,2\n", "two columns 'seed'"),
        ("p.csv", "seed\n", "holds no problem"),
        ("p.jsonl", '{"seed": 1}\n{"seed"\n', "line 2: not JSON"),
        ("p.jsonl", "[1]\n", "line 1 is a list, not a JSON object"),
        ("p.txt", "x", "expects a .csv or .jsonl file"),
    ],
)
def test_tables_that_cannot_be(options: Make, tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        rows_of(ProblemOptions(problems=tmp_path / name))


def test_products_and_tables_are_read_as_they_stand(options: Make, tmp_path: Path) -> None:
    assert rows_of(ProblemOptions(vary=("seed=1,4:6", "fluency=strict"))) == [
        {"seed": seed, "fluency": "strict"} for seed in (1, 4, 5)
    ]
    (tmp_path / "p.jsonl").write_text('{"seed": 2, "persona": "myopic"}\n\n{"seed": 3, "site": ""}\n')
    assert rows_of(ProblemOptions(vary=("goal=reduce,elicit",))) == [{"goal": "reduce"}, {"goal": "elicit"}]
    assert rows_of(ProblemOptions(problems=tmp_path / "p.jsonl")) == [{"seed": 2, "persona": "myopic"}, {"seed": 3}]
