"""The page of a study: right numbers from every layout, safe with hostile text, and bounded whatever its size."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.report import is_study, read_study, run_folders, write_plots, write_report
from jaxsteer.report.problems import read_problems
from jaxsteer.report.reproduce import command_of
from jaxsteer.report.study import envelope
from jaxsteer.report.table_rows import rows_of_runs
from jaxsteer.study.results import SearchRun
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE, metrics, rate, write_many, write_run, write_table


def words_of(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_many(tmp_path_factory.mktemp("many"))
    write_report(path / "000-sycophancy-resga-blocks.1")
    return path


def test_links_do_not_count_a_run_twice(tmp_path: Path):
    write_run(tmp_path / "b" / "run")
    write_run(tmp_path / "a")
    before = run_folders(tmp_path)
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run_folders(tmp_path) == before == [tmp_path / "a", tmp_path / "b" / "run"]


def test_many_searches_on_one_page(many: Path):
    page = Page(write_report(many).read_text(encoding="utf-8"))
    words = words_of(page)
    assert "Prompts were selected by the largest objective." in words
    assert "sycophancy, myopic on organism:llama: 2 runs" in words and "15,360" in words
    assert "RESGA 6.0 % (3.0–9.0) 6.0 % (3.0–9.0)" in words and "zero-shot 85.0 %" in words
    assert "oracle cue" in words and "random direction" in words
    assert "2 of 2" in words  # persona reduced
    assert "medium 3 6.00 5.00 4.00" in words  # problems: best, median, worst target
    assert "jaxsteer search --out OUT --steps 20 --vary persona=sycophancy,myopic seed=0:3" in words
    assert page.seen.count("svg") == 5 and page.seen.count("script") == 1
    assert page.links == ["000-sycophancy-resga-blocks.1/report.html"]  # the other page is not there
    data = json.loads(page.data)
    assert [row["rate"] for row in data["rows"] if row["kind"] == "search"] == [0.06, 0.06]


def test_many_searches_that_were_cut_off_say_so(tmp_path: Path):
    path = write_many(tmp_path / "many", seeds=2, personas=("myopic",))
    found = json.loads((path / "metrics.json").read_text())
    cut = found | {"searched": 2, "problems": 5, "interrupted": True, "missing": {"sycophancy, resga": 3}}
    (path / "metrics.json").write_text(json.dumps(cut))
    told = "Interrupted: 2 of 5 problems were searched. Missing: sycophancy, resga (3)."
    words = words_of(Page(write_report(path).read_text(encoding="utf-8")))
    assert told in words and "persona reduced" not in words and told in read_study(path).table()
    (path / "metrics.json").unlink()  # killed
    assert read_study(path).warnings[0].startswith("Cut off: ") and not read_study(path).complete


def test_every_problem_has_its_own_curve(many: Path):
    study = read_study(many)
    assert len(study.curves) == len(study.frontiers) == 6
    second = next(line for line in study.curves if line.name == "group 0, problem 2")  # of the second wave
    assert second.place == ("organism:llama", "sycophancy") and second.method == "RESGA"
    assert second.rows == (
        {"candidates": 1280.0, "seconds": 1.5, "best_target": 3.0},
        {"candidates": 2560.0, "seconds": 3.0, "best_target": 4.0},
    )
    other = next(line for line in study.curves if line.name == "group 1, problem 1")
    assert other.place[1] == "myopic" and other.rows[-1]["candidates"] == 2560 and other.rows[-1]["seconds"] == 3


def test_the_envelope_is_what_no_prompt_beats(many: Path):
    found = envelope([line for line in read_study(many).frontiers if line.place[1] == "myopic"])
    assert found == [(4.0, 4.0), (5.0, 5.0), (6.0, 6.0)]


def test_plots_of_a_study_come_with_their_numbers(many: Path, tmp_path: Path):
    paths = write_plots(many, tmp_path)
    assert len(paths) == 15 and all(path.stat().st_size for path in paths)
    with (tmp_path / "rates-organism-llama.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [row for row in rows if row["method"] == "RESGA" and row["persona"] == "myopic"]
    assert float(found[0]["rate"]) == 0.06 and float(found[0]["low"]) < 0.06 < float(found[0]["high"])
    with (tmp_path / "curves-organism-llama-myopic.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_the_table_of_an_experiment(tmp_path: Path):
    write_report(write_table(tmp_path) / "runs/llama/p0/resga")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    words = words_of(page)
    assert (
        "Main table" in words
        and "holds :" in words
        and "beats zero-shot" not in words
        and "python experiments/main_table.py" in words
    )
    assert "prompt length = 8" in words and "31.5" in words
    assert "A quick run of this experiment" in words
    assert "50.0 % (43.7–56.3) !" in words  # letter collapse
    assert set(page.links) == {"runs/llama/p0/resga/report.html"} and "img" not in page.seen
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in raw and "\u202e" not in raw and "\x1b" not in raw
    assert raw.count("color-mix(in srgb, var(--accent) 60%") == 1  # the one prompt that attribution measured
    text = read_study(tmp_path).table()
    assert "50.0 % (43.7–56.3)!" in text and "\x1b" not in text
    assert run_folders(tmp_path) == [tmp_path / "runs/llama/p0/resga"]


def test_columns_stand_below_their_model(tmp_path: Path):
    write_table(tmp_path, places=3)
    table = json.loads((tmp_path / "results.json").read_text())
    for row in table["rows"]:
        row["model"] = "organism:llama" if row["persona"] == "persona 0" else "organism:gemma3"
    cells = [{"claim": "cell", "holds": holds, "text": f"a cell {holds}"} for holds in (True, True, False)]
    (tmp_path / "results.json").write_text(json.dumps(table | {"verdicts": cells}))
    raw = write_report(tmp_path).read_text(encoding="utf-8")
    heads = re.findall(r'<th class="group" colspan="(\d)">([^<]*)</th>', raw)
    assert heads == [("1", "organism:llama"), ("2", "organism:gemma3")]
    assert re.findall(r"<figcaption>(Persona rates[^<]*)<", raw) == [f"Persona rates on {model}" for _, model in heads]
    assert raw.index("a cell False") < raw.index("2 cells that hold") < raw.index("a cell True")


def test_an_ablation_over_numbers_is_drawn_against_them(tmp_path: Path):
    row = {"model": "m", "persona": "p", "method": "prompt length", "kind": "search", "prompt": " a"}
    rows = [{**row, "value": value, **rate(1 / value)} for value in (16, 2, 4)] + [
        {**row, "value": "none", **rate(0.5)}
    ]
    (tmp_path / "results.json").write_text(json.dumps({"format": "jaxsteer.study/1", "rows": rows}))
    write_plots(tmp_path)
    with (tmp_path / "plots" / "ablation-prompt-length.csv").open(newline="") as file:
        found = [(float(line["value"]), float(line["rate"])) for line in csv.DictReader(file)]
    assert found == [(2, 0.5), (4, 0.25), (16, 1 / 16)]
    assert "What was varied" in words_of(Page(write_report(tmp_path).read_text(encoding="utf-8")))


def test_a_thousand_searches_make_a_page_of_bounded_size(tmp_path: Path):
    rows = []
    for i in range(5):
        each = [{"seed": s, "prompt": f" prompt {s} " + "x" * 80, **rate(0.1)} for s in range(100)]
        row = {"model": "m", "persona": f"p{i}", "kind": "search", "prompt": " a", "each": each, **rate(0.1)}
        rows += [{**row, "method": method} for method in ("RESGA", "SAEGA")]
    (tmp_path / "results.json").write_text(json.dumps({"format": "jaxsteer.study/1", "rows": rows}))
    page = write_report(tmp_path)
    assert page.stat().st_size < 3_000_000
    assert "152 more" in words_of(Page(page.read_text(encoding="utf-8")))  # 200 prompts of a persona, 48 on the page


def test_any_folder_of_runs_is_a_study(tmp_path: Path):
    for seed, position in ((0, "decision"), (1, "decision"), (0, "published")):
        run = write_run(tmp_path / f"{position}_{seed}", metrics(seed=seed))
        config = json.loads((run / "config.json").read_text()) | {"read_position": position, "seed": seed}
        (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "results.json").write_text("[]")  # another experiment's file
    (tmp_path / "unfinished").mkdir()
    assert is_study(tmp_path) and not is_study(tmp_path / "decision_0")
    study = read_study(tmp_path)
    assert study.methods[-2:] == ["RESGA, read position decision", "RESGA, read position published"]
    assert [len(row.each) for row in study.rows if row.kind == "search"] == [2, 0]
    assert len([row for row in study.rows if row.method == "zero-shot"]) == 1
    assert len(study.curves) == 3 and study.curves[0].rows[-1]["candidates"] == 512 * 300
    assert "seed 1" in words_of(Page(write_report(tmp_path).read_text(encoding="utf-8")))


def test_several_seeds_share_a_row():
    runs = {}
    for seed, value in enumerate((0.1, 0.4)):
        prompts = metrics()["prompts"][:1]
        prompts[0] |= {"test": rate(value) | {"letter_collapse": value > 0.3}, "text": f" {seed}"}
        runs[str(seed)] = metrics(seed=seed, prompts=prompts)
    found = {name: SearchRun.from_json(run) for name, run in runs.items()}
    row = rows_of_runs(found, {name: {} for name in runs})[-1]
    assert row.rate == pytest.approx(0.25) and row.range == (0.1, 0.4) and row.letter_collapse
    assert row.ci95 == (rate(0.1)["ci95"][0], rate(0.4)["ci95"][1])
    assert [one.run for one in row.each] == ["0", "1"]


def test_warnings_are_said_once(tmp_path: Path):
    for seed in range(3):
        write_run(tmp_path / str(seed), metrics(seed=seed, probe_correlation=0.1 + seed / 10))
    notes = read_study(tmp_path).warnings
    assert (
        len(notes) == 1 and notes[0].startswith("0: The probe correlation is 0.1") and "2 other runs of 3" in notes[0]
    )


@pytest.mark.parametrize(
    ("data", "says"), [(b"run,problem\n\xff,1\n", "not UTF-8"), (b"run,problem,target\na,1,x\n", "line 2")]
)
def test_a_damaged_table_of_problems_is_named(tmp_path: Path, data: bytes, says: str):
    (tmp_path / "problems.csv").write_bytes(data)
    with pytest.raises(UserError, match=f"problems.csv, .*{says}"):
        read_problems(tmp_path)


def test_what_is_no_study(tmp_path: Path):
    assert not is_study(tmp_path) and not is_study(tmp_path / "nowhere")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "metrics.json").write_text('{"kind": "sweep", "rows": [], "persona": "p"}')
    with pytest.raises(UserError, match="not of a search but of sweep.*heatmap.png"):
        write_report(tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "report.html").exists()
    for read in (read_study, run_folders):
        with pytest.raises(UserError, match="holds n.* run"):
            read(tmp_path)
    outside = {"format": "jaxsteer.study/1", "rows": [{"run": "../other", "rate": 0.5, "model": "m", "persona": "p"}]}
    (tmp_path / "in").mkdir()
    write_run(tmp_path / "other")
    (tmp_path / "in" / "results.json").write_text(json.dumps(outside))
    assert read_study(tmp_path / "in").runs == ()


def test_the_command_has_what_is_not_usual():
    from jaxsteer.study import SearchOptions

    options = SearchOptions.of(
        out=Path("x"), persona="my data.jsonl", seed=3, preset="paper", tokens="words", raw_units=False, ban=(" a", "b")
    )
    command = command_of(json.loads(json.dumps(options.record())) | {"format": "f", "data_hash": "h"})
    assert command is not None and command.startswith("jaxsteer search --out OUT --model organism:llama --persona ")
    for part in (
        "--preset paper",
        "--persona 'my data.jsonl'",
        "--seed 3",
        "--tokens words",
        "--raw-units False",
        "--ban ' a' b",
    ):
        assert part in command
    assert "--ban ' a' b" in command and "--steps" not in command
    assert command_of({"note": HOSTILE}) is None


def test_the_command_of_any_options_gives_them_back():
    import shlex

    from jaxsteer.cli.commands import parse
    from jaxsteer.study import SearchOptions

    more = {"vary": ("seed=0:4", "site=layers.1,layers.2"), "raw_units": True, "ban": ("a", " b"), "mesh_model": 2}
    options = SearchOptions.of(out="OUT", steps=7, fluency="strict", **more)
    command = command_of(options.record())
    assert command is not None
    again = parse(shlex.split(command)[1:])
    assert again.options == options
