"""``jaxsteer data``: names with licences, and what a file holds."""

import json
from pathlib import Path

import pytest

from jaxsteer.cli import main


def test_list_names_every_dataset_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert len([name for name in rows if name.startswith("anthropic/sycophancy")]) == 3
    assert len([name for name in rows if name.startswith("caa/")]) == 24
    assert rows["characters/pirate"]["licence"] == "Apache-2.0"
    assert rows["truthfulqa"]["licence"] == "Apache-2.0" and rows["halueval/qa"]["licence"] == "MIT"
    assert rows["anthropic/persona/NAME"]["licence"] == "CC BY 4.0" and all(row["licence"] for row in rows.values())
    assert main(["data", "show", "characters/pirate"]) == 0
    assert "150 different" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert "anthropic/myopic-reward " in capsys.readouterr().out


def test_show_counts_balance_splits_and_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {
            "question": f"Now or later, {i}?\n (A) now\n (B) later",
            "answer_matching_behavior": " (A)" if i % 4 else " (B)",
            "answer_not_matching_behavior": " (B)" if i % 4 else " (A)",
        }
        for i in range(20)
    ]
    folder = tmp_path / "advanced-ai-risk" / "human_generated_evals"
    folder.mkdir(parents=True)
    (folder / "myopic-reward.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    argv = ["data", "show", "anthropic/myopic-reward", "--path", str(tmp_path), "--examples", "1"]
    assert main([*argv, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["rows"], out["items"], out["matching"]) == (21, 20, {"(A)": 15, "(B)": 5})
    assert out["dropped"] == {"exact duplicates": 1} and out["licence"] == "CC BY 4.0"
    assert {name: part["items"] for name, part in out["splits"].items()} == {"train": 12, "validation": 4, "test": 4}
    assert len(out["examples"]) == 1 and out["examples"][0]["line"] == 1
    assert main(argv) == 0
    text = capsys.readouterr().out
    persona = tmp_path / "mine.json"
    persona.write_text(json.dumps({"data": str(folder / "myopic-reward.jsonl"), "pro_cues": ["Now!"]}))
    assert main(["data", "show", str(persona)]) == 0 and "matching: (A) 15, (B) 5" in capsys.readouterr().out
    persona.write_text(json.dumps({"role": "You are a pirate.", "questions": ["Where do you live?"]}))
    assert main(["data", "show", str(persona)]) == 0 and "Where do you live?" in capsys.readouterr().out
    persona.write_text(json.dumps({"role": "You are a pirate.", "questions": ["Where do you live?"] * 16}))
    assert main(["data", "show", str(persona)]) == 0 and "1 different" in capsys.readouterr().out
    halves = {"data": rows, "fractions": [0.5, 0.25, 0.25]}
    persona.write_text(json.dumps(halves))
    assert main(["data", "show", str(persona), "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert [part["items"] for part in splits.values()] == [10, 5, 5]
    persona.write_text(json.dumps(halves | {"fractions": [0.5, 0.25]}))
    assert main(["data", "show", str(persona)]) == 2 and "fractions must be three" in capsys.readouterr().err
    replies = [{"question": "Who?", "positive": "It was me all along", "negative": "I do not know"}] * 2
    persona.write_text(json.dumps({"data": replies, "questions": ["Who?"], "fractions": [0.4, 0.2, 0.4]}))
    assert main(["data", "show", str(persona)]) == 0
    few = capsys.readouterr().out
    assert "matching: answers in words" in few and "no splits: 1 different" in few
    assert "questions beside them writes no replies" in caplog.text
    assert "1 exact duplicates" in text and "matching: (A) 15, (B) 5" in text and "  |  (A) now\n" in text


def test_show_of_a_built_in_persona_and_of_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "myopic"]) == 0
    assert "matching: (A) 300, (B) 300" in capsys.readouterr().out
    assert main(["data", "show", "anthropic/myopic-reward"]) == 2
    said = capsys.readouterr().err
    assert "Hugging Face hub" in said and "https://github.com/anthropics/evals" in said
    assert main(["data", "show", "nothing"]) == 2
    assert "unknown dataset 'nothing'" in capsys.readouterr().err
