"""The page of a run or a study: one self-contained HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxsteer.files import make_directory, write_text
from jaxsteer.report.plots import run_plots
from jaxsteer.report.reproduce import command_of
from jaxsteer.report.run_files import (
    Run,
    controls,
    decimals,
    interval,
    named,
    number,
    percent,
    read_run,
    selected,
    split_rate,
    visible,
)
from jaxsteer.report.study import is_study, read_study
from jaxsteer.report.study_page import render_study
from jaxsteer.report.study_plots import study_plots
from jaxsteer.report.templates import embedded, flat, shaded, template


def write_report(directory: str | Path) -> Path:
    """Write ``report.html`` into the directory of a run or of a study from the files there, and return its path.

    Reads files only, so that it can be made again at any time. The page of a study links to the pages of its runs that
    are there. Raises ``UserError`` as ``read_run`` and ``read_study`` do. The file appears whole or not at all.
    """
    page = render_study(read_study(directory)) if is_study(directory) else render_page(read_run(directory))
    target = Path(directory) / "report.html"
    write_text(target, page)
    return target


def write_plots(directory: str | Path, out: Path | None = None) -> list[Path]:
    """Write all plots of a run or study as SVG, PNG and CSV to ``out`` (default: ``plots`` in it); return the paths."""
    made = study_plots(read_study(directory)) if is_study(directory) else run_plots(read_run(directory))
    out = Path(directory) / "plots" if out is None else out
    make_directory(out)
    return [path for plot in made.values() for path in plot.write(out)]


def render_page(run: Run) -> str:
    """The whole page as text. Everything that comes from the run's files is escaped by the template."""
    metrics = run.metrics
    plots = {name: Markup(plot.svg(themed=True)) for name, plot in run_plots(run).items()}
    return template("page").render(
        title=f"{named(metrics.get('persona'))} on {named(metrics.get('model'))}",
        what=_what(metrics),
        prompt=selected(metrics),
        tiles=_tiles(metrics),
        warnings=run.warnings,
        rows=_rows(metrics),
        unit=visible(metrics.get("target_units", "sd")),
        controls=controls(metrics),
        probe=_probe(metrics),
        signature=_signature(metrics),
        attribution=_attribution(metrics),
        plots=plots,
        settings=flat(run.config),
        environment=flat(metrics.get("environment") or {}),
        numbers=flat({name: metrics.get(name) or {} for name in ("splits", "timing")}),
        command=command_of(run.config),
        data=embedded({"metrics": metrics, "config": run.config, "pareto": run.pareto, "progress": run.progress}),
    )


def _what(metrics: Mapping[str, Any]) -> str:
    """One sentence: what was searched, where, and how long it took."""
    timing = metrics.get("timing") or {}
    parts = [f"{named(metrics.get('method')).upper()} searched"]
    count, seconds = number(timing.get("candidates")), number(timing.get("search_s"))
    parts.append(f"{count:,.0f} candidate prompts" if count is not None else "candidate prompts")
    if seconds is not None:
        parts.append(f"in {seconds:,.0f} s")
    parts.append(f"with an objective at {visible(metrics.get('site', 'an unnamed site'))}")
    parts.append(f"(read position {visible(metrics.get('read_position', 'unknown'))},")
    parts.append(f"seed {visible(metrics.get('seed', 'unknown'))}).")
    return " ".join(parts)


def _tiles(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the headline."""
    base, chosen = metrics.get("baseline"), selected(metrics)
    tiles = []
    for label, entry in (("without a prompt", base), ("with the prompt", chosen)):
        split = "test" if split_rate(entry, "test") else "validation"
        rate = split_rate(entry, split)
        if rate is not None:
            low_high = interval(rate).partition(" (")[2].rstrip(")")
            note = f"95 %: {low_high}, n = {visible(rate.get('n', '?'))}, {split}" if low_high else split
            tiles.append((label, percent(rate["rate"]), note))
    rate = split_rate(chosen, "test") or split_rate(chosen, "validation")
    if rate is not None:
        before = split_rate(base, "test") or split_rate(base, "validation") or {}
        tiles.append(("answers (A)", percent(rate.get("a_rate")), f"without a prompt {percent(before.get('a_rate'))}"))
        tiles.append(("same when swapped", percent(rate.get("swapped_rate")), "choices exchanged, content kept"))
    if number(metrics.get("probe_correlation")) is not None:
        tiles.append(("probe correlation", decimals(metrics["probe_correlation"]), "objective against behaviour"))
    speed = number((metrics.get("timing") or {}).get("candidates_per_s"))
    if speed is not None:
        tiles.append(("candidates per second", f"{speed:,.0f}", "scored in the search"))
    return tiles


def _rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompts with what the table needs; A-rate and swapped rate of the test, else of the validation questions."""
    rows = []
    for index, prompt in enumerate(metrics.get("prompts") or ()):
        test, validation = split_rate(prompt, "test"), split_rate(prompt, "validation")
        rate = test or validation or {}
        rows.append(
            {
                "text": prompt.get("text", ""),
                "target": prompt.get("target"),
                "cross_entropy": prompt.get("cross_entropy"),
                "retokenises": prompt.get("retokenises"),
                "validation": validation,
                "test": test,
                "a_rate": rate.get("a_rate"),
                "swapped_rate": rate.get("swapped_rate"),
                "selected": index == metrics.get("selected"),
            }
        )
    return rows


def _probe(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the probe, best first as they were written, with the one that was searched marked."""
    probe = metrics.get("probe")
    rows = [row for row in (probe.get("rows") or ()) if isinstance(row, Mapping)] if isinstance(probe, Mapping) else []
    return [
        {
            "site": row.get("site", "?"),
            "read_position": row.get("read_position", "?"),
            "correlation": row.get("correlation"),
            "turned": (number(row.get("sign")) or 1) < 0,
            "used": row.get("site") == metrics.get("site"),
        }
        for row in rows[:12]
    ]


def _signature(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The latents of a SAEGA run, with the strength of every token's colour in percent; None for other runs."""
    found = metrics.get("signature")
    if not isinstance(found, Mapping):
        return None
    rows = found["rows"]
    largest = max((abs(value) for row in rows for value in row["by_token"]), default=0.0) or 1.0
    shaded = [
        {**row, "tokens": [(value, round(60 * abs(value) / largest)) for value in row["by_token"]]} for row in rows
    ]
    return {**found, "before": found["objective_before"], "rows": shaded}


def _attribution(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The selected prompt's tokens with their effects, and the strength of each one's colour in percent."""
    found = metrics.get("attribution")
    if not isinstance(found, Mapping):
        return None
    columns = zip(found["tokens"], found["leave_one_out"], found["replacement"], found["replacement_sd"], strict=True)
    tokens = [
        {"token": token, "leave_one_out": left_out, "replacement": replaced, "sd": sd, "strength": strength}
        for (token, left_out, replaced, sd), strength in zip(columns, shaded(found["replacement"]), strict=True)
    ]
    return {**found, "tokens": tokens}
