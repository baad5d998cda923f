"""The page of a study of circuits: one self-contained HTML file. A little script lets its graphs answer to the mouse;
without it everything is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxsteer.circuits.study_figures import figures
from jaxsteer.circuits.study_result import CircuitStudy, PushStudy, within
from jaxsteer.display import Plot, percent, visible
from jaxsteer.ranges import Interval
from jaxsteer.report.axis_files import cut, kind_of_run
from jaxsteer.report.circuits_graph import MOST, circuit_svg
from jaxsteer.report.run_files import read_object
from jaxsteer.report.templates import embedded, flat, template
from jaxsteer.runs.files import CONFIG, PROGRESS, read_lines

ASKED = 6
"""Questions whose replies are shown."""
STYLES = {"pushed": "persona", "as it is": "other", "random push": "other"}


def is_circuits(directory: str | Path) -> bool:
    """Whether the directory is that of ``jaxsteer circuits``."""
    return kind_of_run(Path(directory)) == "circuits"


def circuits_plots(directory: str | Path) -> dict[str, Plot]:
    """All figures of the study in a directory, by name."""
    return {plot.name: plot for plot in figures(CircuitStudy.read(directory))}


def render_circuits(directory: str | Path) -> str:
    """The whole page as text. Everything that comes from the files is escaped by the template."""
    path = Path(directory)
    result = CircuitStudy.read(path)
    seconds = {f"{row.get('push')}: {row.get('stage')}": row.get("seconds") for row in read_lines(path / PROGRESS)}
    return template("circuits").render(
        title=visible(f"How {' and '.join(one.name for one in result.pushes)} travels through {result.model}"),
        result=result,
        tiles=_tiles(result),
        warnings=_doubts(result),
        pushes=[_push(one, number, result) for number, one in enumerate(result.pushes)],
        most=MOST,
        within=within,
        plots={plot.name: Markup(plot.svg(themed=True)) for plot in figures(result)},
        settings=flat(read_object(path / CONFIG) or {}),
        environment=[],
        numbers=flat({"seconds": seconds}),
        command=None,
        data=embedded({"pushes": [one.name for one in result.pushes]}),
    )


def _push(one: PushStudy, number: int, result: CircuitStudy) -> dict[str, Any]:
    share, ends = one.circuits.needed_share, one.circuits.needed_ci95
    needed = "No circuit of these sizes keeps a faithfulness of 85 %."
    if share is not None and ends is not None:
        needed = (
            f"{one.circuits.needed:,} of {one.circuits.n_edges:,} edges ({percent(share)}; 95 %: {percent(ends[0])} to "
            f"{percent(ends[1])}) are the smallest circuit from which on faithfulness is at least 85 %."
        )
    each = len(one.generated[0].replies) // max(1, len(result.questions))  # both orders of choices, or one
    replies = [
        (
            question,
            [(said.condition, STYLES.get(said.condition, ""), cut(said.replies[i * each])) for said in one.generated],
        )
        for i, question in enumerate(result.questions[:ASKED])
    ]
    tables = [words for words in (one.words, one.control_words) if words is not None]
    return {
        "study": one, "number": number, "needed": needed, "graph": circuit_svg(one, number), "replies": replies,
        "words": [row for words in tables for row in words.to_rows()],
    }  # fmt: skip


def _tiles(result: CircuitStudy) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the headline: those of the first push."""
    one = result.pushes[0]
    control = max((abs(c.change) for c in one.controls), default=0.0) / abs(one.effect.change)
    patterns, values, largest = one.stays("patterns"), one.stays("values"), one.heads.cells()[0]
    return [
        ("effect", f"{one.effect.change:+.2f}", f"of {one.name}; the largest random push {percent(control)} of it"),
        ("edges for 85 %", percent(one.circuits.needed_share), f"of {one.circuits.n_edges:,}"),
        ("patterns frozen", percent(patterns.share), f"of the effect stays, 95 %: {_ends(patterns.ci95)}"),
        ("values frozen", percent(values.share), f"of the effect stays, 95 %: {_ends(values.ci95)}"),
        ("largest head", largest[0], f"{_part(largest[1])} of the effect, patched; random push {_part(largest[3])}"),
    ]  # fmt: skip


def _part(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ends(ci95: Interval) -> str:
    return f"{100 * ci95[0]:.0f} to {100 * ci95[1]:.0f} %"


def _doubts(result: CircuitStudy) -> list[str]:
    found = []
    for one in result.pushes:
        if one.effect.ci95[0] < 0 < one.effect.ci95[1]:
            found.append(f"{one.name}: the interval of the effect holds 0: shares of it say little")
        if any(abs(control.change) > 0.5 * abs(one.effect.change) for control in one.controls):
            found.append(f"{one.name}: a random push of equal size moves the metric more than half as much")
    return found
