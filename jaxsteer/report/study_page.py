"""The page of a study: one self-contained HTML file beside the pages of its runs, to which it links."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from jaxsteer.display import number
from jaxsteer.report.problems import summarised
from jaxsteer.report.reproduce import command_of
from jaxsteer.report.study import StudyFiles
from jaxsteer.report.study_plots import FIGURES, PLACES, study_plots
from jaxsteer.report.table_rows import Place
from jaxsteer.report.templates import embedded, flat, shaded, template
from jaxsteer.study.table_row import TableRow

SHOWN, FOLDED = 8, 40
"""Prompts of a persona in sight, and behind a click; those after them stand in the runs' own files."""
MEMBERS = 24
"""Searches of one row that the page embeds as JSON."""
WARNINGS = 8
"""Warnings in sight."""


def render_study(study: StudyFiles) -> str:
    """The whole page as text. Everything that comes from the study's files is escaped by the template."""
    plots = study_plots(study)
    return template("study").render(
        title=study.title,
        what=_what(study),
        tiles=_tiles(study),
        warnings=study.warnings[:WARNINGS],
        more_warnings=study.warnings[WARNINGS:],
        verdicts=[found for found in study.verdicts if not _cell_that_holds(found)],
        held=[found for found in study.verdicts if _cell_that_holds(found)],
        models=[(model, len(list(group))) for model, group in groupby(study.places, key=lambda place: place[0])],
        places=study.places,
        table=_table(study),
        by_place={place: study.of(place) for place in study.places},
        words=any(row.goal for row in study.rows),
        judged=any(row.judged is not None for row in study.rows),
        letters=not all(row.goal for row in study.rows),
        several=any(row.each for row in study.rows),
        intervals=study.intervals,
        selected_by=study.selected_by,
        tables=study.tables,
        replies=study.replies,
        ratios=any(row.perplexity_ratio is not None for row in study.rows),
        prompts=[(place, *_prompts(study, place)) for place in study.places[:PLACES]],
        untold=max(0, len(study.places) - PLACES),
        unit=study.unit,
        problems=summarised(study.problems),
        plots={
            kind: [Markup(plot.svg(themed=True)) for name, plot in plots.items() if name.startswith(kind)]
            for kind in ("rates", "ablation", "pareto", "curves")
        },
        figure_titles={
            kind: [plot.title for name, plot in plots.items() if name.startswith(kind)]
            for kind in ("rates", "pareto", "curves")
        },
        undrawn=max(0, len(study.places) - FIGURES),
        settings=flat(study.config),
        environment=flat(study.environment),
        numbers=flat(study.numbers),
        command=study.command or command_of(study.config),
        data=embedded({"rows": [_kept(row) for row in study.rows], "config": study.config, "numbers": study.numbers}),
    )


def _cell_that_holds(verdict: Mapping[str, Any]) -> bool:
    return verdict.get("claim") == "cell" and bool(verdict.get("holds"))


def _what(study: StudyFiles) -> str:
    searches = sum(len(row.members) for row in study.rows if row.kind == "search")
    methods = len({row.method for row in study.rows if row.kind == "search"})
    parts = [f"{searches} reported searches of {methods} kind{'' if methods == 1 else 's'}"]
    if study.problems:
        parts.append(f"from {len(study.problems):,} problems")
    return f"{' '.join(parts)}, measured on questions that no search has seen."


def _tiles(study: StudyFiles) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the headline."""
    candidates, seconds = number(study.numbers.get("candidates")), number(study.numbers.get("search_s"))
    beaten = [place for place in study.places if _beats(study.of(place))]
    known = [place for place in study.places if any(row.unprompted for row in study.of(place))]
    tiles = []
    if known and study.complete:
        words = any(row.goal for row in study.rows)
        note = f"some search's interval lies {'beyond' if words else 'below'} that of the model without a prompt"
        tiles.append(
            ("persona moved as wanted" if words else "persona reduced", f"{len(beaten)} of {len(known)}", note)
        )
    tiles.append(("runs", f"{len(study.runs):,}", f"{len(study.methods)} rows in the main table"))
    if candidates is not None:
        note = "scored" if seconds is None else f"scored in {seconds:,.0f} s"
        tiles.append(("candidate prompts", f"{candidates:,.0f}", note))
    collapsed = sum(bool(one.letter_collapse) for row in study.rows for one in row.members)
    if collapsed:
        tiles.append(("letter collapse", str(collapsed), "prompts for which one letter wins whatever is asked"))
    return tiles


def _beats(rows: Sequence[TableRow]) -> bool:
    """Whether the interval of a search without letter collapse lies below that of the baseline, or above it where more
    of the persona was wanted."""
    base = next((row.ci95 for row in rows if row.unprompted and row.ci95), None)
    searched = [row.ci95 for row in rows if row.kind == "search" and row.ci95 and not row.letter_collapse]
    return base is not None and any(
        base[1] < ci95[0] if rows[0].goal == "elicit" else ci95[1] < base[0] for ci95 in searched
    )


def _table(study: StudyFiles) -> list[tuple[str, str, list[TableRow | None]]]:
    """(method, kind, its row at every place)."""
    found = {(row.method, row.model, row.persona): row for row in study.rows}
    kinds = {row.method: row.kind for row in study.rows}
    return [
        (method, kinds[method], [found.get((method, *place)) for place in study.places]) for method in study.methods
    ]


def _prompts(study: StudyFiles, place: Place) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Prompts in sight, prompts behind a click, and how many are left out; the first of every search comes first."""
    columns = []
    for row in sorted(study.of(place), key=lambda row: row.kind != "search"):
        columns.append([_prompt(study.path, one, row) for one in row.members if one.prompt])
    found = [prompt for line in zip_longest(*columns) for prompt in line if prompt is not None]
    return found[:SHOWN], found[SHOWN : SHOWN + FOLDED], max(0, len(found) - SHOWN - FOLDED)


def _prompt(path: Path, one: TableRow, row: TableRow) -> dict[str, Any]:
    """One prompt with its tokens in shades, where attribution has measured this very prompt."""
    tokens = None
    for found in (one.attribution, row.attribution):
        if found is not None and "".join(found.tokens).strip() == str(one.prompt).strip():
            tokens = list(zip(found.tokens, found.replacement, shaded(found.replacement), strict=True))
    run = one.run or row.run
    return {
        "text": one.prompt,
        "tokens": tokens,
        "method": row.method,
        "seed": one.seed if row.each else None,
        "rate": one,
        "collapse": bool(one.letter_collapse),
        "note": one.note,
        "link": quote(f"{run}/report.html") if run and (path / run / "report.html").is_file() else None,
    }


def _kept(row: TableRow) -> dict[str, Any]:
    """What the page embeds of a row."""
    each = tuple(dataclasses.replace(one, attribution=None) for one in row.each[:MEMBERS])
    return dataclasses.replace(row, each=each).to_json()
