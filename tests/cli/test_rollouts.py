"""``jaxsteer direction rollouts`` and ``jaxsteer vector project``."""

import json
from pathlib import Path

import pytest

from jaxsteer.cli import main
from jaxsteer.personas.traits import Trait, save_trait
from tests.helpers.endpoint import endpoint


def test_from_a_trait_file_to_vectors_and_projections(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    trait = Trait(name="haste", instructions=(("Hurry.", "Wait."),), questions=("Now?", "When?"),
                  rubric="{question}|{answer}")  # fmt: skip
    path, out = save_trait(trait, tmp_path / "traits"), tmp_path / "out"

    def answer(body: dict) -> str:
        text = body["messages"][0]["content"]
        written = [json.loads(line)["answer"] for line in (out / "written.jsonl").read_text().splitlines()]
        return "90" if "coherent" in text or text.partition("|")[2] in written[:2] else "10"

    with endpoint(answer) as (url, _):
        argv = ["direction", "rollouts", path, "--model", model_dir, "--judge", url, "--out", out, "--least", 1]
        assert main([*map(str, [*argv, "--max-new-tokens", 4, "--json"])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == found["pairs"] == 2
    replies = out / "haste_pos_instruct.csv"
    argv = ["vector", "project", out / "haste_response_avg_diff.safetensors", "--replies", replies]
    argv += ["--model", model_dir, "--site", "blocks.0.hook_resid_post", "--out", tmp_path / "projected.csv"]
    assert main([*map(str, argv)]) == 0
    assert "2 replies, response_avg" in capsys.readouterr().out
    assert "response_avg blocks.0.hook_resid_post" in (tmp_path / "projected.csv").read_text().splitlines()[0]
