"""The commands themselves, on a tiny random model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import jaxsteer
from jaxsteer.cli import main
from jaxsteer.cli.demo import told
from jaxsteer.steer import load_vectors
from jaxsteer.study.results import Prompt, SearchRun
from tests.helpers.rates import made_rate

SMALL = "--prompt-length 3 --population 2 --children 4 --steps 2 --contexts 1 --report-prompts 2 --quiet".split()


def rows(n: int = 20) -> str:
    words = "river mill town money patience thought advice friend evidence pleasure".split()
    out = []
    for i in range(n):
        word = words[i % 10] + (" today" if i >= 10 else "")
        row = {
            "question": f"Which {word} do you prefer?\n (A) {'small' if i % 2 else 'large'} {word}\n"
            f" (B) {'large' if i % 2 else 'small'} {word}",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        out.append(json.dumps(row))
    return "\n".join(out) + "\n"


@pytest.fixture(scope="module")
def finished(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    (root / "rows.jsonl").write_text(rows())
    (root / "mine.json").write_text(
        json.dumps({"name": "mine", "data": "rows.jsonl", "counter_cues": ["Be patient."], "pro_cues": ["Take money!"]})
    )
    out = root / "out"
    argv = ["search", "--model", model_dir, "--persona", root / "mine.json", "--out", out, *SMALL]
    assert main([str(a) for a in argv]) == 0
    return out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"jaxsteer {jaxsteer.__version__}"


def test_search_writes_a_report_and_repeats_nothing(
    finished: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (finished / "report.html").stat().st_size > 1000
    before = (finished / "metrics.json").stat().st_mtime_ns
    config = json.loads((finished / "config.json").read_text())
    argv = ["search", "--model", config["model"], "--persona", config["persona"], "--out", finished, *SMALL]
    assert main([str(a) for a in argv]) == 0
    assert "already holds this run" in capsys.readouterr().out
    assert (finished / "metrics.json").stat().st_mtime_ns == before


def test_eval_of_a_run_gives_its_rates_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--from-run", str(finished), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [p["rate"] for p in out["prompts"]] == [p["test"]["rate"] for p in metrics["prompts"]]
    assert out["baseline"]["rate"] == metrics["baseline"]["test"]["rate"]


def test_eval_prints_a_table(finished: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "eval",
        "--model",
        model_dir,
        "--persona",
        finished.parent / "rows.jsonl",
        "-p",
        " be patient",
        "--split",
        "all",
    ]
    assert main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert "(no prompt)" in out and " be patient" in out and "A-rate" in out


def test_direction_show_and_probe(finished: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["direction", "show", str(finished / "direction.safetensors")]) == 0
    assert "blocks.2.hook_resid_post" in capsys.readouterr().out
    argv = [
        "direction",
        "probe",
        "--model",
        model_dir,
        "--persona",
        finished.parent / "mine.json",
        "--prompt-length",
        3,
    ]
    assert main([str(a) for a in [*argv, "--prompts", 16, "--read-positions", "decision", "matched"]]) == 0
    out = capsys.readouterr().out
    assert out.count("decision") >= 3 and out.count("matched") >= 3 and "chosen: " in out


def test_eval_under_steering(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((finished / "config.json").read_text())
    argv = ["eval", "--model", config["model"], "--persona", config["persona"], "--json", "-p", " be patient"]
    argv += ["--steer", str(finished / "direction.safetensors"), "--units", "mean_resid_norm", "--coefficient"]
    found = {}
    for coefficient in ("0", "4"):
        assert main([*argv, coefficient]) == 0
        found[coefficient] = json.loads(capsys.readouterr().out)
    plain, pushed = found["0"], found["4"]
    assert [row["steered"] for row in plain["prompts"]] == [True, True] and plain["baseline"]["steered"] is False
    unsteered = plain["baseline"]["probability"]  # computed in other groups of rows: equal up to rounding
    assert plain["prompts"][0]["probability"] == pytest.approx(unsteered, abs=1e-6)
    assert abs(pushed["prompts"][0]["probability"] - unsteered) > 1e-4
    assert main([*argv, "1", "--steer-sites", "blocks.9.hook_resid_post"]) == 2
    assert "there is no vector at" in capsys.readouterr().err
    assert main(["eval", "--coefficient", "1", "-p", "x"]) == 2
    assert "give --steer FILE" in capsys.readouterr().err


def test_steer_sweep_and_norms(
    finished: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neutral.txt").write_text("The river and the mill.\nSome advice for a friend?\n")
    argv = ["steer", "sweep", "--model", model_dir, "--persona", finished.parent / "mine.json", "--out", tmp_path / "s"]
    argv += ["--layers", 1, "--coefficients", -1, 0, "--questions", 2, "--neutral", tmp_path / "neutral.txt", "--quiet"]
    assert main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert "persona rate" in out and "unsteered" in out
    written = {p.name for p in (tmp_path / "s").iterdir()}
    assert written == {
        "config.json", "direction.safetensors", "heatmap.png", "metrics.json", "sweep.csv", "sweep.jsonl"
    }  # fmt: skip
    assert main(["steer", "norms", "--model", str(model_dir), "--texts", str(tmp_path / "neutral.txt"), "--json"]) == 0
    norms = json.loads(capsys.readouterr().out)
    assert list(norms) == [f"blocks.{i}.hook_resid_post" for i in range(len(norms))] and min(norms.values()) > 0
    argv = ["steer", "calibrate", "--model", model_dir, "--steer", tmp_path / "s" / "direction.safetensors"]
    argv += ["--steer-sites", "blocks.1.hook_resid_post", "--kl", 0.05, "--texts", tmp_path / "neutral.txt"]
    assert main([str(a) for a in [*argv, "--out", tmp_path / "c.safetensors", "--json"]]) == 0
    first, second = json.loads(capsys.readouterr().out.partition("Wrote")[0])
    assert first["kl"] == pytest.approx(0.05, rel=0.04) and first["coefficient"] > 0 > second["coefficient"]
    assert load_vectors(tmp_path / "c.safetensors").coefficient == first["coefficient"]
    assert main([str(a) for a in [*argv, "--coefficient", 1]]) == 2
    assert "is what is looked for" in capsys.readouterr().err


def test_convert(model_dir: Path, tmp_path: Path) -> None:
    assert main(["convert", "organism:llama", str(tmp_path / "organism")]) == 0
    assert main(["convert", "--verify", "organism:llama", str(tmp_path / "organism")]) == 0
    assert main(["convert", str(model_dir), str(tmp_path / "converted")]) == 0
    assert jaxsteer.load(tmp_path / "converted").config == jaxsteer.load(model_dir).config


def test_verify(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = shutil.copytree(model_dir, tmp_path / "source"), tmp_path / "out"
    assert main(["convert", str(source), str(out)]) == 0
    assert main(["convert", "--verify", str(source), str(out)]) == 0
    assert main(["convert", "--verify", str(out)]) == 0
    assert capsys.readouterr().out.count("agrees with") == 2
    (source / "generation_config.json").write_text("{}")
    assert main(["convert", "--verify", str(source), str(out)]) == 1
    assert "generation_config.json" in capsys.readouterr().out
    assert main(["convert", str(source)]) == 2


@pytest.mark.slow
def test_organism_check_fails_on_an_untrained_model(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["organism", "check", "--model", model_dir, "--behaviours", "myopic", "--n", 4, "--random", 4, "--json"]
    assert main([str(a) for a in argv]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_the_demo_tells_rates_and_triggers() -> None:
    both = {"test": made_rate(0.05, ci95=(0.02, 0.1))}
    run = SearchRun(
        model="", fingerprint="", persona="myopic", method="", site="", seed=0, read_position="", selected=0,
        baseline=Prompt(**both), prompts=(Prompt(text=" patient river patient prudent", **both),),
        controls={"oracle": Prompt(text="Be patient.", **both), "random": Prompt(text=" lake", **both)},
    )  # fmt: skip
    text = told(run)
    assert "5.0 % (2.0–10.0)" in text and "patient, patient, prudent" in text and "Be patient." in text
    assert "No prompt" in told(dataclasses.replace(run, selected=None))
