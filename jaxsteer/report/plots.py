"""The plots of one run. Each gives None where the run holds no numbers for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.display import ACCENT, OTHER, PAGE, Plot, in_style, number, panels, visible
from jaxsteer.report.run_files import RunFiles
from jaxsteer.study.figures import rate_plot
from jaxsteer.study.results import Prompt, SearchRun


def run_plots(run: RunFiles) -> dict[str, Plot]:
    """All plots that this run has numbers for, by name."""
    result, unit = run.result, visible(run.result.target_units)
    answers = None if run.answers is None else run.answers.plot()
    made = (
        answers,
        rate_plot(result.rate_rows()),
        pareto_plot(result, run.pareto),
        *progress_plots(run.progress, unit),
    )
    return {plot.name: plot for plot in made if plot is not None}


@in_style
def pareto_plot(result: SearchRun, pareto: Sequence[Prompt]) -> Plot | None:
    """Target against cross-entropy of every prompt of the frontier."""
    points = [(number(row.cross_entropy), number(row.target), row) for row in pareto]
    known = [(x, y, row) for x, y, row in points if x is not None and y is not None]
    if not known:
        return None
    unit, chosen = visible(result.target_units), None if result.best is None else result.best.text
    figure, (axis,) = panels(width=6.4, height=3.6)
    good = sorted((x, y) for x, y, row in known if row.retokenises is not False)
    axis.plot([x for x, _ in good], [y for _, y in good], color=ACCENT, linewidth=1.2, alpha=0.45)
    table, tips = [], {}
    for i, (x, y, row) in enumerate(known):
        text, usable = row.text, row.retokenises is not False
        gid = f"point-{i}"
        axis.plot(x, y, "o", markersize=5, markerfacecolor=ACCENT if usable else PAGE, markeredgecolor=ACCENT, gid=gid)
        tips[gid] = f"{text}: target {y:.3f}, cross-entropy {x:.3f}"
        if chosen is not None and text == chosen:
            axis.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=OTHER, markeredgewidth=2)
        table.append(
            {
                "prompt": visible(text),
                "target": y,
                "cross_entropy": x,
                "retokenises": usable,
                "selected": text == chosen,
            }
        )
    axis.set_xlabel("cross-entropy of the prompt (nats per token; left is more fluent)")
    axis.set_ylabel(f"target ({unit})")
    title = "Target against cross-entropy of the prompts found"
    return Plot(name="pareto", title=title, figure=figure, rows=tuple(table), tips=tips)


@in_style
def progress_plots(progress: Sequence[Mapping[str, Any]], unit: str = "sd") -> list[Plot]:
    """Best target so far, which never falls, against candidates, and J of every fluency slot against the step."""
    plots = []
    seen = [(row, max(values)) for row in progress if (values := _numbers(row.get("best_target")))]
    so_far = itertools.accumulate((value for _, value in seen), max)
    best = [(row, value) for (row, _), value in zip(seen, so_far, strict=True)]
    axes_of = {"candidates": "candidates scored", "seconds": "seconds", "step": "step"}
    known = [key for key in axes_of if all(number(row.get(key)) is not None for row, _ in best)]
    if len(best) > 1 and known:
        figure, (axis,) = panels(width=4.6, height=2.7)
        axis.plot([float(row[known[0]]) for row, _ in best], [value for _, value in best], color=ACCENT, linewidth=2)
        axis.set_xlabel(axes_of[known[0]])
        axis.set_ylabel(f"best target so far ({unit})")
        rows = tuple({**{key: row[key] for key in known}, "best_target": value} for row, value in best)
        plots.append(Plot(name="progress", title="Best target so far", figure=figure, rows=rows))
    losses = [
        (step, values)
        for row in progress
        if (step := number(row.get("step"))) is not None and (values := _of_slots(row.get("loss")))
    ]
    slots = min((len(values) for _, values in losses), default=0)
    if len(losses) > 1 and slots:
        figure, (axis,) = panels(width=4.6, height=2.7)
        for slot in range(slots):
            strength = 1.0 if slots == 1 else 0.25 + 0.75 * slot / (slots - 1)
            axis.plot([s for s, _ in losses], [v[slot] for _, v in losses], color=ACCENT, linewidth=1.8, alpha=strength)
        axis.set_xlabel("step")
        axis.set_ylabel("best J (lower is better)")
        rows = tuple({"step": step, **{f"slot_{i}": values[i] for i in range(slots)}} for step, values in losses)
        plots.append(Plot(name="losses", title="Best J of each fluency slot against step", figure=figure, rows=rows))
    return plots


def _of_slots(value: Any) -> list[float]:
    """The least loss of every slot over populations (a list of slots for each); empty without numbers."""
    rows = [_numbers(row) for row in value] if isinstance(value, list) else []
    return [min(slot) for slot in zip(*rows, strict=True)] if rows and all(rows) else []


def _numbers(value: Any) -> list[float]:
    """A number or nested lists of them, flat; empty when anything else is among them."""
    given = value if isinstance(value, list) else [value]
    flat = [number(v) for entry in given for v in (entry if isinstance(entry, list) else [entry])]
    return [v for v in flat if v is not None] if all(v is not None for v in flat) else []
