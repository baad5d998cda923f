"""The page of the study of characters, from its results alone."""

from types import SimpleNamespace

from experiments import character_tables
from jaxsteer.report import read_study, write_report
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE, replied

QUALITY = {"position": 0.4, "position_ci95": [0.3, 0.5], "score": -1.0, "relevant": 0.9, "relevant_ci95": [0.8, 1.0]}
SETTINGS = {"characters": ["pirate"], "goals": ["elicit"], "seeds": 2, "site": "s", "quick": True}


def block():
    def row(method, prompt, free, change=None, **more):
        measured = replied(0.7, free, change)
        shown = {"prompt": prompt, "steered": False, **measured["test"], "written": measured["test_replies"]}
        return {
            "method": method,
            **shown,
            "answers": [f"{method} {HOSTILE}"] * 12,
            "quality": QUALITY,
            "note": "",
            **more,
        }

    rows = [row("none", "", 0.1), row("instruction", "Be a pirate.", 0.9, 0.8)]
    found = {"candidates": 96, "note": "the rate moved, the replies did not"}
    rows += [row("RESGA, decision", HOSTILE, 0.25 + seed / 2, 0.02, seed=seed, **found) for seed in range(2)]
    return {"character": "pirate", "goal": "elicit", "questions": [f"Question {n}?" for n in range(12)], "rows": rows}


def test_jaxsteer_report_shows_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(character_tables, "environment", lambda model: {"jax": "x"})
    character_tables.write_results(tmp_path, SimpleNamespace(name="a model"), SETTINGS, [block()], {})
    rows = {row.method: row for row in read_study(tmp_path).rows}
    assert (
        rows["RESGA, decision"].note and rows["RESGA, decision"].rate == 0.5 and len(rows["RESGA, decision"].each) == 2
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.text).split())
    assert "zero-shot 10.0 %" in words and "RESGA, decision 50.0 %" in words and "a quick run" in words.lower()
    assert "pirate (elicit), n = 12 test questions" in words and "0.40 (0.30 to 0.50)" in words
    assert words.count("instruction instruction <script>") == 10 and "Question 10?" not in words
    assert page.seen.count("script") == 1 and "img" not in page.seen
