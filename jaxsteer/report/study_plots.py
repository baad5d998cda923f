"""The plots of a study: rates by method, frontiers and search curves, one figure per model or persona."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from jaxsteer.display import (
    ACCENT,
    BAND,
    INK,
    MUTED,
    OTHER,
    PAGE,
    Plot,
    in_style,
    interval,
    number,
    panels,
    short,
    visible,
)
from jaxsteer.report.study import Line, StudyFiles, envelope
from jaxsteer.report.table_rows import Place
from jaxsteer.study.table_row import TableRow

LABEL = 40
"""Letters of a method's name."""
PANELS = 3
"""Personas side by side in one figure."""
LINES = 24
"""Searches drawn one by one; of more than that, the best, the worst and those in between at equal steps."""
TICKS = 12
"""Values that are written below an ablation, as long as there are no more."""
STYLES = [(colour, dashes) for dashes in ("-", (0, (3, 1.2))) for colour in (ACCENT, OTHER, INK, MUTED)]
"""Colour and dashes of methods in frontiers and curves."""
PLACES, FIGURES = 24, 12
"""Personas (times models) whose rates are drawn, and those that get figures of frontiers and curves."""


def study_plots(study: StudyFiles) -> dict[str, Plot]:
    """All plots that this study has numbers for, by name."""
    made: list[Plot | None] = []
    models = list(dict.fromkeys(model for model, _ in study.places))
    for model in models:
        places = [place for place in study.places[:PLACES] if place[0] == model]
        for start in range(0, len(places), PANELS):
            made.append(rates_plot(study, places[start : start + PANELS], part=start // PANELS))
    made += [ablation_plot(study, name) for name in _ablations(study)[:FIGURES]]
    for place in study.places[:FIGURES]:
        made.append(frontier_plot([line for line in study.frontiers if line.place == place], place, study.unit))
        made.append(curves_plot([line for line in study.curves if line.place == place], place, study.unit))
    return {plot.name: plot for plot in made if plot is not None}


@in_style
def rates_plot(study: StudyFiles, places: Sequence[Place], *, part: int = 0) -> Plot | None:
    """Test rates with 95 % intervals, a line per method and a panel per persona; every seed as a hollow dot."""
    rows = [row for place in places for row in study.of(place)]
    methods = [name for name in study.methods if any(row.method == name for row in rows)]
    if not methods:
        return None
    figure, axes = panels(len(places), width=3.3 + 2.6 * len(places), height=0.9 + 0.27 * len(methods), share_y=True)
    table: list[dict[str, Any]] = []
    tips: dict[str, str] = {}
    for panel, (axis, place) in enumerate(zip(axes, places, strict=True)):
        here = {row.method: row for row in study.of(place)}
        base = next((row for row in here.values() if row.unprompted), None)
        if base is not None and base.ci95:
            axis.axvspan(*(100 * end for end in base.ci95), color=BAND, zorder=0)
        for at, method in enumerate(methods):
            if method in here:
                gid = f"rate-{panel}-{at}"
                tips[gid] = f"{method}, {place[1]}: {interval(here[method])}"
                _draw_rate(axis, at, here[method], gid)
                table.append(_rate_record(here[method]))
        axis.set_title(visible(place[1]), fontsize=10, color=INK, loc="left")
        axis.set_xlim(-3, 103)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(
            "free replies in character (%)" if any(r.goal for r in here.values()) else "persona answers (%)"
        )
    axes[0].set_yticks(range(len(methods)), [short(name, LABEL) for name in methods], color=INK)
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    name = f"rates-{_slug(places[0][0])}" + (f"-{part + 1}" if part else "")
    return Plot(name=name, title=f"Persona rates on {places[0][0]}", figure=figure, rows=tuple(table), tips=tips)


def _draw_rate(axis: Any, at: int, row: TableRow, gid: str) -> None:
    colour = ACCENT if row.kind == "search" else INK if row.unprompted else MUTED
    if row.ci95:
        axis.plot([100 * end for end in row.ci95], [at, at], color=colour, linewidth=2.2, solid_capstyle="butt")
    for one in row.each[:LINES]:
        axis.plot(100 * one.rate, at, "o", markersize=4, markerfacecolor=PAGE, markeredgecolor=colour, alpha=0.7)
    collapsed = bool(row.letter_collapse)
    axis.plot(
        100 * row.rate, at, "X" if collapsed else "o", markersize=7 if collapsed else 6,
        markerfacecolor=OTHER if collapsed else colour, markeredgecolor=OTHER if collapsed else colour, gid=gid,
    )  # fmt: skip


def _rate_record(row: TableRow) -> dict[str, Any]:
    low, high = row.ci95 or (None, None)
    return {
        **{key: visible(getattr(row, key)) for key in ("model", "persona", "method", "kind")},
        **{"rate": row.rate, "low": low, "high": high, "searches": len(row.members)},
        **{key: getattr(row, key) for key in ("a_rate", "swapped_rate", "letter_collapse", "n")},
    }


def _ablations(study: StudyFiles) -> list[str]:
    """What was varied over at least three numbers."""
    values: dict[str, set[float]] = {}
    for row in study.rows:
        if (value := number(row.value)) is not None:
            values.setdefault(row.method.rpartition(" = ")[0], set()).add(value)
    return [name for name, found in values.items() if len(found) > 2]


@in_style
def ablation_plot(study: StudyFiles, name: str) -> Plot:
    """Rate with its interval against the number that was varied, a line per persona."""
    figure, (axis,) = panels(width=6.4, height=3.0)
    table: list[dict[str, Any]] = []
    values: list[float] = []
    for place, (colour, dashes) in zip(study.places, STYLES):
        found = [row for row in study.of(place) if row.method.rpartition(" = ")[0] == name]
        rows = [(x, row) for row in found if (x := number(row.value)) is not None]
        rows.sort(key=lambda pair: pair[0])
        xs, rates = [x for x, _ in rows], [100 * row.rate for _, row in rows]
        ends = [[100 * end for end in row.ci95 or (row.rate,) * 2] for _, row in rows]
        axis.plot(
            xs,
            rates,
            marker="o",
            markersize=4,
            color=colour,
            linestyle=dashes,
            label=short(" on ".join(place[::-1]), LABEL),
        )
        axis.vlines(xs, [low for low, _ in ends], [high for _, high in ends], color=colour, linewidth=1.5, alpha=0.5)
        values += xs
        table += [{"value": x, **_rate_record(row)} for x, row in rows]
    ticks = sorted(set(values))
    if ticks and ticks[0] > 0 and ticks[-1] / ticks[0] > 8:
        axis.set_xscale("log", base=2)
    if len(ticks) <= TICKS:
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    axis.set_ylim(-3, 103)
    axis.set_xlabel(visible(name))
    axis.set_ylabel("persona answers (%)")
    _legend(axis)
    return Plot(name=f"ablation-{_slug(name)}", title=f"Rate against {name}", figure=figure, rows=tuple(table))


@in_style
def frontier_plot(lines: Sequence[Line], place: Place, unit: str) -> Plot | None:
    """Target against cross-entropy: every search's frontier, and stronger what no search of its method beats."""
    if not any(number(row.get("target")) is not None for line in lines for row in line.rows):
        return None
    figure, (axis,) = panels(width=6.4, height=3.3)
    table: list[dict[str, Any]] = []
    for method, (colour, dashes), found in _styled(lines):
        for line in _some(found, lambda line: max(number(row.get("target")) or 0.0 for row in line.rows)):
            points = sorted(
                (x, y, str(row.get("text", "")))
                for row in line.rows
                if (x := number(row.get("cross_entropy"))) is not None and (y := number(row.get("target"))) is not None
            )
            xs, ys, texts = zip(*points, strict=True) if points else ((), (), ())
            axis.plot(xs, ys, "o-", color=colour, linewidth=0.7, markersize=2.2, alpha=0.4)
            for x, y, text in zip(xs, ys, texts, strict=True):
                table.append(_record(line, {"cross_entropy": x, "target": y, "prompt": visible(text)}))
        best = envelope(found)
        axis.plot([x for x, _ in best], [y for _, y in best], drawstyle="steps-post", color=colour, linestyle=dashes,
                  linewidth=1.7, label=short(method, LABEL))  # fmt: skip
    axis.set_xlabel("cross-entropy of the prompt (nats per token; left is more fluent)")
    axis.set_ylabel(f"target ({visible(unit)})")
    _legend(axis)
    title = f"Pareto frontiers: {place[1]} on {place[0]}"
    return Plot(name=f"pareto-{_slug(*place)}", title=title, figure=figure, rows=tuple(table))


@in_style
def curves_plot(lines: Sequence[Line], place: Place, unit: str) -> Plot | None:
    """Best target of every search against its candidates and against seconds, and stronger the median of a method."""
    axes_of = {"candidates": "candidates scored", "seconds": "seconds"}
    known = [key for key in axes_of if all(number(row.get(key)) is not None for line in lines for row in line.rows)]
    if not lines or not known:
        return None
    figure, panes = panels(len(known), width=4.4 * len(known), height=2.7)
    table: list[dict[str, Any]] = []
    for method, (colour, dashes), found in _styled(lines):
        shown = _some(found, lambda line: float(line.rows[-1]["best_target"]))
        for axis, key in zip(panes, known, strict=True):
            for line in shown:
                values = [float(row["best_target"]) for row in line.rows]
                axis.plot([float(row[key]) for row in line.rows], values, "o-" if len(values) == 1 else "-",
                          color=colour, linewidth=0.8, markersize=3, alpha=0.4)  # fmt: skip
            middle = _median(found, key)
            axis.plot([x for x, _ in middle], [y for _, y in middle], color=colour, linestyle=dashes, linewidth=2,
                      label=short(method, LABEL), marker="o" if len(middle) == 1 else None, markersize=4)  # fmt: skip
            axis.set_xlabel(axes_of[key])
            axis.set_ylabel(f"best target ({visible(unit)})")
        for line in shown:
            table += [_record(line, {key: row.get(key) for key in (*known, "best_target")}) for row in line.rows]
    _legend(panes[0])
    title = f"Best target of the searches: {place[1]} on {place[0]}"
    return Plot(name=f"curves-{_slug(*place)}", title=title, figure=figure, rows=tuple(table))


def _record(line: Line, numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": visible(line.method), "search": visible(line.name), **numbers}


def _styled(lines: Sequence[Line]) -> list[tuple[str, tuple[str, Any], list[Line]]]:
    """Lines by method with a style each; the last style has all methods for which there is none."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.method, []).append(line)
    names = list(groups)
    kept = names if len(names) <= len(STYLES) else names[: len(STYLES) - 1]
    found = [(name, style, groups[name]) for name, style in zip(kept, STYLES)]
    if others := [line for name in names[len(kept) :] for line in groups[name]]:
        found.append((f"{len(names) - len(kept)} other methods", STYLES[-1], others))
    return found


def _legend(axis: Any) -> None:
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(frameon=False, fontsize=8, loc="lower right")


def _median(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """The median over searches, look by look, as far as all of them go."""
    looks = range(min(len(line.rows) for line in lines))
    columns = [[(float(line.rows[i][key]), float(line.rows[i]["best_target"])) for line in lines] for i in looks]
    return [(median(x for x, _ in column), median(y for _, y in column)) for column in columns]


def _some(lines: Sequence[Line], value: Any) -> list[Line]:
    """At most ``LINES`` of them: from the worst to the best at equal steps."""
    if len(lines) <= LINES:
        return list(lines)
    order = sorted(lines, key=value)
    return [order[round(i * (len(order) - 1) / (LINES - 1))] for i in range(LINES)]


def _slug(*names: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(names).lower()).strip("-")[:80] or "unnamed"
