"""The main table of a model that is no organism, with data of one's own and an endpoint that writes prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_convert.export import write_hf
from experiments import ablations, main_table
from tests.helpers.endpoint import endpoint
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.slow  # a dozen searches are compiled

WORDS = "river mill town money patience thought advice friend evidence pleasure".split()


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Arguments: a Hugging Face directory, a persona in a file, and the smallest searches."""
    tiny = tiny_model()
    write_hf(tiny.params, tiny.config, tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "question": f"Which {word} do you prefer?\n (A) {'small' if i % 2 else 'large'}\n"
            f" (B) {'large' if i % 2 else 'small'}",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        for i, word in enumerate(WORDS + [f"{word} today" for word in WORDS])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    persona = {"name": "size", "data": "rows.jsonl", "counter_cues": ["Be patient."], "pro_cues": ["Take money!"]}
    (tmp_path / "size.json").write_text(json.dumps(persona))
    named = ["--model", str(tmp_path / "model"), "--sae", "none", "--personas", str(tmp_path / "size.json")]
    return [*named, *"--quick --seeds 2 --steps 1 --contexts 1 --questions 4 --tokens all".split()]


def test_the_main_table(given: list[str], tmp_path: Path) -> None:
    out = tmp_path / "table"
    reply = "<reason>too vague</reason><instruction>be patient</instruction>"
    with endpoint(lambda _: reply) as (url, asked):
        assert main_table.main([*given, "--endpoint", url, "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    known = {method.name for method in main_table.methods_of(None, url, known_cue=False)}
    assert set(rows) == known and "oracle cue" not in known and not [name for name in known if "SAEGA" in name]
    assert asked and rows["ProTeGi"]["prompt"]
    for name, row in rows.items():
        assert row["model"] == str(tmp_path / "model") and row["persona"] == "size"
        low, high = row["ci95"]
        assert low <= row["rate"] <= high, name
        assert row["kind"] == "baseline" or len(row["each"]) == 2, name
    searches = [row for row in found["rows"] if row["kind"] == "search" and row["method"] != "prefix tuning"]
    assert len({row["tried"] for row in searches}) == 1, "every search scores as many candidates"
    cells = [verdict for verdict in found["verdicts"] if verdict["claim"] == "cell"]
    assert [(cell["method"], cell["near"]) for cell in cells] == [("RESGA, decision", None)], "no oracle is known"
    assert (out / rows["RESGA, decision"]["run"] / "pareto.jsonl").is_file()


def test_the_ablations(given: list[str], tmp_path: Path) -> None:
    out = tmp_path / "ablations"
    argv = [*given, "--only", "layer", "prompt length", "restarts", "initialisation", "slot", "--out", str(out)]
    assert ablations.main(argv) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    factors = {row["method"] for row in rows}
    assert factors == {"base", "layer", "prompt length", "restarts", "initialisation", "slot"}
    assert {row["value"] for row in rows if row["method"] == "prompt length"} == {2, 8, 32}
    assert {row["site"] for row in rows if row["method"] == "layer"} > {"blocks.0.hook_resid_post"}
