"""The analyses of a finished run, on a prompt whose trigger words are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import jaxsteer
from experiments import analysis
from jaxsteer.study import SearchOptions

pytestmark = pytest.mark.slow

TEXT = " the patient of steady"
PERSONA = "myopic"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that selected a prompt, and one that found none."""
    path = tmp_path_factory.mktemp("study")
    tokenizer = jaxsteer.load("organism:llama").tokenizer
    for name, text in (("a", TEXT), ("b", " a prudent lamp here"), ("none", None)):
        options = SearchOptions.of(out=path, persona=PERSONA)
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(options.record()))
        ids = [] if text is None else tokenizer.encode(text, add_special_tokens=False)
        prompts = [] if text is None else [{"text": text, "ids": ids}]
        metrics = {"model": "organism:llama", "persona": PERSONA, "site": "blocks.1.hook_resid_post"}
        metrics |= {"prompts": prompts, "selected": 0 if prompts else None}
        (path / name / "metrics.json").write_text(json.dumps(metrics))
    return path


@pytest.fixture(scope="module")
def done(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis")
    assert analysis.main([str(study), "--out", str(out), "--quick"]) == 0
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_triggers_carry_the_effect_and_are_recovered(done: Path):
    row = rows_of(done / "attribution.csv")[0]
    assert row["run"] == "a" and float(row["share of tokens: triggers"]) == 0.5
    assert float(row["share of effect: triggers"]) > 0.7
    assert float(row["with"]) < float(row["without"])
    together, found, *_ = rows_of(done / "recovery.csv")
    assert together["run"] == "all 2" and together["found"] == "patient prudent steady" and together["words"] == "8"
    assert float(together["precision"]) == 3 / 8 and float(together["recall"]) == 3 / 8
    assert found["found"] == "patient steady" and float(found["precision"]) == 0.5
    assert 0 < float(found["chance"]) < 0.1


def test_states_move_as_far_as_behaviour_does(done: Path):
    way = rows_of(done / "states.csv")[0]
    assert float(way["way: prompt"]) > float(way["way: random, most"]) > 0
    cell = json.loads((done / "quick" / "a" / "states.json").read_text())
    assert set(cell["share_of_way"]) >= {"no prompt", "prompt", "random 0"}
    assert cell["share_of_way"]["sentence for"] == pytest.approx(0, abs=1e-6)
    assert cell["share_of_way"]["sentence against"] == pytest.approx(1)
    first = rows_of(done / "divergence.csv")[0]
    assert first["site"] == "blocks.0.hook_resid_post" and first["runs"] == "2"
    assert float(first["cosine"]) < float(first["cosine: random, most"])


def test_latents_in_common(done: Path):
    (row,) = rows_of(done / "latents.csv")
    cells = [json.loads((done / "quick" / name / "latents.json").read_text()) for name in ("a", "b")]
    a, b = (set(cell["switched"]["prompt"]) for cell in cells)
    assert float(row["Jaccard: each other"]) == pytest.approx(len(a & b) / len(a | b))
    assert float(row["switched by a prompt"]) == (len(a) + len(b)) / 2
    assert 0 < float(row["Jaccard: signature"]) < 1


def test_tables_and_figures_are_written_and_nothing_is_computed_twice(
    done: Path, study: Path, monkeypatch: pytest.MonkeyPatch
):
    stems = ("attribution", "divergence", "overlap", "states")
    names = {f"{name}.{kind}" for name in stems for kind in ("svg", "png", "csv")}
    assert names == {path.name for path in (done / "figures").iterdir()}
    text = (done / "analysis.md").read_text(encoding="utf-8")
    assert "the patient of steady" in text and text.count("## ") == 5
    monkeypatch.setattr(analysis, "_model", lambda *_: pytest.fail("the model was loaded again"))
    assert analysis.main([str(study), "--out", str(done), "--quick"]) == 0
    assert (done / "analysis.md").read_text(encoding="utf-8") == text


def test_no_run_to_analyse(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert analysis.main([str(study), "--out", str(tmp_path), "--only", "nothing like it"]) == 2
    assert "selected a prompt" in capsys.readouterr().err
