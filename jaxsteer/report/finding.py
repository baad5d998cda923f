"""What a run found, as the title of its page: one sentence with the interval."""

from __future__ import annotations

from jaxsteer.display import number, percent, visible
from jaxsteer.study.results import SearchRun


def finding_of(run: SearchRun) -> str:
    """One sentence, of test questions where the prompt was tested, else of validation questions.

    "Lowers" and "raises" stand only where the interval of the paired difference leaves out 0. A run without a selected
    prompt, of a persona in words (whose page says its finding in its own words) or without a difference names its
    persona and model only.
    """
    plain = visible(f"{run.persona} on {run.model}")
    best, base = run.best, run.baseline
    if run.in_words or best is None or base is None:
        return plain
    after, before = (best.test, base.test) if best.test is not None else (best.validation, base.validation)
    if after is None or before is None or after.ci95 is None or number(after.rate) is None:
        return plain
    change = None if after.difference is None else after.difference.ci95
    if change is None:
        return plain
    low, high = after.ci95
    verb = "lowers" if change[1] < 0 else "raises" if change[0] > 0 else "does not measurably change"
    where = "" if best.test is not None else " on validation questions"
    numbers = f"from {percent(before.rate)} to {percent(after.rate)} ({100 * low:.1f} to {100 * high:.1f})"
    joined = f", {numbers}" if verb.startswith("does") else f" {numbers}"
    return f"This prompt {verb} {visible(run.persona)} on {visible(run.model)}{joined}{where}"
