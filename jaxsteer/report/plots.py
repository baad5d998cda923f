"""The plots of one run. Each gives None where the run holds no numbers for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.report.figures import ACCENT, BAND, INK, MUTED, OTHER, PAGE, Plot, in_style, panels
from jaxsteer.report.run_files import Run, controls, interval, named, number, split_rate, visible

LABEL = 44
"""Letters of a prompt beside its rates."""


def run_plots(run: Run) -> dict[str, Plot]:
    """All plots that this run has numbers for, by name."""
    unit = visible(run.metrics.get("target_units", "sd"))
    made = (rate_plot(run.metrics), pareto_plot(run.metrics, run.pareto), *progress_plots(run.progress, unit))
    return {plot.name: plot for plot in made if plot is not None}


@in_style
def rate_plot(metrics: Mapping[str, Any], *, limit: int = 24) -> Plot | None:
    """Persona rates with 95 % intervals: the baseline also as a band, then prompts and controls."""
    baseline, index = metrics.get("baseline"), metrics.get("selected")
    rows = [("no prompt", "baseline", baseline, INK)]
    for i, prompt in enumerate((metrics.get("prompts") or [])[:limit]):
        rows.append((prompt.get("text", ""), "prompt", prompt, OTHER if i == index else ACCENT))
    for row in controls(metrics):
        rows.append((f"[{named(row)}] {row.get('text') or ''}".rstrip(), "control", row, MUTED))
    rows = [row for row in rows if split_rate(row[2], "test") or split_rate(row[2], "validation")]
    if not rows:
        return None
    figure, (axis,) = panels(width=9.2, height=0.6 + 0.29 * len(rows))
    band = split_rate(baseline, "test") or split_rate(baseline, "validation")
    if band is not None:
        axis.axvspan(*_ends(band), color=BAND, zorder=0)
    table, tips = [], {}
    for place, (label, kind, entry, colour) in enumerate(rows):
        for split in ("validation", "test"):
            rate = split_rate(entry, split)
            if rate is None:
                continue
            low, high = _ends(rate)
            if split == "test":
                axis.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
            fill = colour if split == "test" else PAGE
            gid = f"rate-{place}-{split}"
            axis.plot(
                100 * rate["rate"], place, "o", markersize=6, markerfacecolor=fill, markeredgecolor=colour, gid=gid
            )
            tips[gid] = f"{label}: {split} {interval(rate)}, n = {rate.get('n', '?')}"
            table.append(
                {"prompt": visible(label), "kind": kind, "selected": colour == OTHER, "split": split,
                 "rate": rate["rate"], "low": low / 100, "high": high / 100, "n": number(rate.get("n"))}
            )  # fmt: skip
    axis.set_yticks(range(len(rows)), [_short(label) for label, *_ in rows])
    for tick, (_, _, _, colour) in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(OTHER if colour == OTHER else INK)
    axis.set_xlim(-2, 102)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("persona answers (%), 95 % intervals; filled: test, hollow: validation")
    return Plot(name="rates", title="Persona rates with 95 % intervals", figure=figure, rows=tuple(table), tips=tips)


@in_style
def pareto_plot(metrics: Mapping[str, Any], pareto: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Target against cross-entropy of every prompt of the frontier."""
    points = [(number(row.get("cross_entropy")), number(row.get("target")), row) for row in pareto]
    known = [(x, y, row) for x, y, row in points if x is not None and y is not None]
    if not known:
        return None
    unit = visible(metrics.get("target_units", "sd"))
    prompts, index = metrics.get("prompts") or [], metrics.get("selected")
    chosen = prompts[index].get("text") if isinstance(index, int) and 0 <= index < len(prompts) else None
    figure, (axis,) = panels(width=6.4, height=3.6)
    good = sorted((x, y) for x, y, row in known if row.get("retokenises") is not False)
    axis.plot([x for x, _ in good], [y for _, y in good], color=ACCENT, linewidth=1.2, alpha=0.45)
    table, tips = [], {}
    for i, (x, y, row) in enumerate(known):
        text, usable = row.get("text", ""), row.get("retokenises") is not False
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
    """Best target against candidates and against seconds, and J of every fluency slot against the step."""
    plots = []
    best = [(row, max(values)) for row in progress if (values := _numbers(row.get("best_target")))]
    axes_of = {"candidates": "candidates scored", "seconds": "seconds", "step": "step"}
    known = [key for key in axes_of if all(number(row.get(key)) is not None for row, _ in best)]
    if len(best) > 1 and known:
        shown = [key for key in known if key != "step"] or ["step"]
        figure, panes = panels(len(shown), width=4.4 * len(shown), height=2.7)
        for axis, key in zip(panes, shown, strict=True):
            axis.plot([float(row[key]) for row, _ in best], [value for _, value in best], color=ACCENT, linewidth=2)
            axis.set_xlabel(axes_of[key])
            axis.set_ylabel(f"best target ({unit})")
        rows = tuple({**{key: row[key] for key in known}, "best_target": value} for row, value in best)
        plots.append(Plot(name="progress", title="Best target of the search", figure=figure, rows=rows))
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


def _ends(rate: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a rate in percent; the rate itself where there is none."""
    ends = [number(end) for end in (rate.get("ci95") or ())]
    low, high = ends if len(ends) == 2 else (None, None)
    return 100 * (rate["rate"] if low is None else low), 100 * (rate["rate"] if high is None else high)


def _short(label: Any) -> str:
    shown = visible(label)
    return shown if len(shown) <= LABEL else shown[: LABEL - 1] + "…"


def _of_slots(value: Any) -> list[float]:
    """The least loss of every slot over populations (a list of slots for each); empty without numbers."""
    rows = [_numbers(row) for row in value] if isinstance(value, list) else []
    return [min(slot) for slot in zip(*rows, strict=True)] if rows and all(rows) else []


def _numbers(value: Any) -> list[float]:
    """A number or nested lists of them, flat; empty when anything else is among them."""
    given = value if isinstance(value, list) else [value]
    flat = [number(v) for entry in given for v in (entry if isinstance(entry, list) else [entry])]
    return [v for v in flat if v is not None] if all(v is not None for v in flat) else []
