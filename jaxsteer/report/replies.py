"""What the page says of a persona in words: what was wanted, what the model writes freely, and which side moved."""

from __future__ import annotations

from typing import Any

from jaxsteer.display import interval, points
from jaxsteer.evals.free_answers import ILLUSION, OTHER, PERSONA, WrittenRates
from jaxsteer.report.run_files import RunFiles
from jaxsteer.study.results import SearchRun

SHOWN = 10
"""Test questions whose replies are shown side by side."""
READ = {PERSONA: ("persona", "in character"), OTHER: ("other", "not in character")}
"""Style and words of what the rule read; unread otherwise."""


def in_words(run: RunFiles) -> dict[str, Any] | None:
    """What the template shows; None where answers are no replies."""
    result = run.result
    if not result.in_words:
        return None
    rows = [("no prompt", result.baseline)]
    rows += [("", prompt) for prompt in result.prompts]
    rows += [(name, control) for name, control in result.controls.items()]
    return {
        "finding": finding(result),
        "illusion": ILLUSION,
        "rows": rows,
        "sides": [(name, prompt, prompt.rate.sides) for name, prompt in rows if prompt and prompt.rate],
        "reader": result.reply_reader,
        "said": side_by_side(run),
    }


def finding(run: SearchRun) -> str:
    """One sentence: what was wanted, and what was found by free replies."""
    wanted = "more" if run.goal == "elicit" else "less"
    before = None if run.baseline is None else run.baseline.replies
    after = None if run.best is None else run.best.replies
    if before is None or after is None or after.difference is None:
        return f"Wanted: {wanted} of the persona. Found: no prompt whose free replies could be read."
    return (
        f"Wanted: {wanted} of the persona. Found: {interval(after)} of free replies in its character, against "
        f"{interval(before)} without a prompt; {points(after.difference)} points: {_verdict(after, wanted)}."
    )


def _verdict(after: WrittenRates, wanted: str) -> str:
    low, high = (after.difference and after.difference.ci95) or (0.0, 0.0)
    if low <= 0 <= high:
        return "the interval includes no change"
    moved = "more" if low > 0 else "less"
    return f"{moved} of it, as was wanted" if moved == wanted else f"{moved} of it, the opposite of what was wanted"


def side_by_side(run: RunFiles) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """(question, [(prompt's name, style, whose character was read, text)]) of the first test questions: without a
    prompt, with a sentence that asks for what is wanted, and with the selected prompt."""
    if run.said is None:
        return []
    result, written = run.result, {one.prompt: one for one in run.said.prompts}
    asked = next((name for name in ("oracle", "instruction") if name in result.controls), None)
    columns = [("no prompt", "")]
    columns += [(asked, result.controls[asked].text)] if asked else []
    columns += [("selected prompt", result.best.text)] if result.best else []
    return [
        (
            question,
            [
                (name, *READ.get(written[text].chose[at], ("", "unread")), written[text].texts[at])
                for name, text in columns
                if text in written
            ],
        )
        for at, question in enumerate(run.said.questions[:SHOWN])
    ]
