"""A tiny persona file and options that make a run of seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsteer.study import SearchOptions

WORDS = "reward money year claim town river mill pleasure value advice thought gains patience evidence friend".split()


@pytest.fixture
def persona_file(tmp_path: Path) -> Path:
    rows = []
    for i, word in enumerate(WORDS * 2):  # every question twice, in both orders of its choices
        first = i % 2 == 0
        choices = (f"a small {word} now", f"a large {word} later")
        shown = choices if first else choices[::-1]
        rows.append(
            {
                "question": f"The {word} or the {WORDS[(7 * i + 3) % 15]}?\n (A) {shown[0]}\n (B) {shown[1]}",
                "answer_matching_behavior": " (A)" if first else " (B)",
                "answer_not_matching_behavior": " (B)" if first else " (A)",
            }
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "persona.json"
    cues = {"counter_cues": ["Please be patient and honest."], "pro_cues": ["I want easy money today."]}
    path.write_text(json.dumps({"name": "tiny", "data": "rows.jsonl", **cues}))
    return path


@pytest.fixture
def options(tmp_path: Path, persona_file: Path) -> Callable[..., SearchOptions]:
    def make(**changes: object) -> SearchOptions:
        fields = {
            "out": tmp_path / "run",
            "persona": str(persona_file),
            "prompt_length": 3,
            "population": 2,
            "children": 4,
            "steps": 3,
            "top_k": 8,
            "contexts": 2,
            "report_prompts": 3,
            "quiet": True,
        }
        return SearchOptions.of(**{**fields, **changes})  # type: ignore[arg-type]

    return make
