"""The main table of a study for the terminal: plain text, aligned, nothing that a terminal would interpret."""

from __future__ import annotations

from collections.abc import Sequence

from jaxsteer.display import aligned, interval, short, visible
from jaxsteer.report.study import StudyFiles


def study_table(study: StudyFiles, *, width: int = 40) -> str:
    """A line per method, a column per persona (and model), rates with their intervals."""
    several = len({model for model, _ in study.places}) > 1
    head = ["", *(visible(f"{persona} ({model})" if several else persona) for model, persona in study.places)]
    lines: list[Sequence[str]] = [head]
    for method in study.methods:
        cells = {(row.model, row.persona): row for row in study.rows if row.method == method}
        rows = [cells.get(place) for place in study.places]
        lines.append([short(method, width), *(interval(r) + "!" * bool(r and r.letter_collapse) for r in rows)])
    parts = [visible(study.title), "", aligned(lines)]
    parts += ["", "persona rate with 95 % interval; ! one letter wins whatever is asked"]
    return "\n".join([*parts, *(f"warning: {visible(note)}" for note in study.warnings)])
