"""The study of characters: its arms, resumed, on an organism that stands for a chat model."""

import dataclasses
import json

import pytest

from experiments import real_characters
from jaxsteer.organisms.world import JUSTIFICATIONS
from jaxsteer.personas import load_persona, save_persona

pytestmark = pytest.mark.slow


def words(name):
    """Sycophancy, of a character in words, which the organism can show."""
    persona = load_persona("sycophancy", n=60)
    if name == "sycophancy":
        return persona
    yes, no = JUSTIFICATIONS["sycophancy"]
    items = tuple(
        dataclasses.replace(item, question=f"{item.question} So?", matching=yes[n % 3], not_matching=no[n % 3])
        for n, item in enumerate(persona.items)
    )
    return dataclasses.replace(persona, name="words", items=items, fractions=(0.4, 0.3, 0.3), reasons=((), ()))


def test_all_arms_are_measured_in_one_table_and_nothing_is_done_twice(tmp_path, monkeypatch):
    def ready(model, persona, goal, folder, say, *, quiet):
        found = dataclasses.replace(persona, goal=goal)
        save_persona(found, folder / "persona.json")
        return found

    monkeypatch.setattr(real_characters, "load_persona", words)
    monkeypatch.setattr(real_characters, "ready", ready)
    gcg = "GCG on the replies"
    dictionary = {**real_characters.DICTIONARY, "k": 8, "tokens": 4096, "batch": 256, "pool": 2048, "rows": 8}
    monkeypatch.setattr(real_characters, "DICTIONARY", dictionary)
    monkeypatch.setattr(real_characters, "PROBE_PROMPTS", 31)
    argv = ["--model", "organism:llama", "--out", str(tmp_path), "--characters", "pirate", "--goals", "elicit"]
    argv += [
        "--seeds",
        "1",
        "--methods",
        "RESGA, decision",
        "RESGA, random direction",
        "SAEGA",
        gcg,
        "prefix tuning",
        "--steps",
        "3",
        "--site",
        "blocks.2.hook_resid_post",
        "--read-at",
        "blocks.3.hook_resid_post",
    ]
    assert real_characters.main([*argv, "--letters", "sycophancy"]) == 0
    whole = json.loads((tmp_path / "results.json").read_text())
    (block,) = whole["blocks"]
    methods = [row["method"] for row in block["rows"]]
    assert {"RESGA, decision", "RESGA, random direction", "SAEGA", gcg} <= set(methods) and methods[0] == "none"
    tables = {table["title"]: table["rows"] for table in whole["tables"]}
    assert len(tables["pirate (elicit): probe"]) == 4 and len(tables["sycophancy: lettered choices"]) == 7
    assert {"instruction", "random prompt", "prefix tuning"} <= set(methods)
    for row in block["rows"]:
        assert 0 <= row["quality"]["relevant"] <= 1 and row["written"]["n"] == len(set(block["questions"]))
    assert len({row["candidates"] for row in block["rows"] if "candidates" in row and "GCG" not in row["method"]}) == 1
    before = (tmp_path / "pirate-elicit/block.json").stat().st_mtime_ns
    monkeypatch.setattr(real_characters, "search", None)
    assert real_characters.main(argv) == 0
    assert (tmp_path / "pirate-elicit/block.json").stat().st_mtime_ns == before
    assert "free replies" in (tmp_path / "table.md").read_text()
