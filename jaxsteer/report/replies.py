"""What the page says of a persona in words: what was wanted, what the model writes freely, and which side moved."""

from __future__ import annotations

from typing import Any

from jaxsteer.display import interval, points
from jaxsteer.evals.free_answers import ILLUSION, OTHER, PERSONA, WrittenRates
from jaxsteer.report.run_files import RunFiles
from jaxsteer.report.said import Said, SideBySide
from jaxsteer.study.results import SearchRun

READ = {PERSONA: True, OTHER: False}
"""Whether a choice is in character."""


def in_words(run: RunFiles) -> dict[str, Any] | None:
    """What the template shows; None where answers are no replies."""
    result = run.result
    if not result.in_words:
        return None
    rows = [("no prompt", result.baseline)]
    rows += [("", prompt) for prompt in result.prompts]
    rows += [(name, control) for name, control in result.controls.items()]
    return {
        "split": result.split,
        "finding": finding(result),
        "illusion": ILLUSION,
        "rows": rows,
        "sides": [
            (name, prompt, prompt.rate.sides)
            for name, prompt in rows
            if prompt and prompt.rate and (prompt.test or result.split != "test")
        ],
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


def side_by_side(run: RunFiles) -> SideBySide | None:
    """What the model writes without a prompt, with a sentence that asks for what is wanted, and with the selected
    prompt."""
    if run.said is None:
        return None
    result, written = run.result, {one.prompt: one for one in run.said.prompts}
    asked = [(name, result.controls[name]) for name in ("oracle", "instruction") if name in result.controls]
    named = [("no prompt", result.baseline), *asked, ("selected prompt", result.best)]
    return SideBySide(
        questions=run.said.questions,
        split=result.split,
        columns=tuple(
            Said(name=name, texts=one.texts, in_character=tuple(READ.get(choice) for choice in one.chose))
            for name, prompt in named
            if prompt is not None and (one := written.get(prompt.text)) is not None
        ),
    )
