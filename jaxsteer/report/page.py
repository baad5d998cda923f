"""The page of a run, a study or an axis: one self-contained HTML file that needs no network and no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxsteer.display import decimals, ends, percent, visible
from jaxsteer.evals.attribution import Attribution
from jaxsteer.files import make_directory, write_text
from jaxsteer.report.axis_files import is_axis, read_axis
from jaxsteer.report.axis_page import axis_plots, render_axis
from jaxsteer.report.circuits_page import circuits_plots, is_circuits, render_circuits
from jaxsteer.report.explain_page import is_explained, render_explained
from jaxsteer.report.finding import finding_of
from jaxsteer.report.lens_page import is_lens, lens_plots, render_lens
from jaxsteer.report.plots import run_plots
from jaxsteer.report.replies import in_words
from jaxsteer.report.reproduce import command_of
from jaxsteer.report.run_files import RunFiles, read_run
from jaxsteer.report.study import is_study, read_study
from jaxsteer.report.study_page import render_study
from jaxsteer.report.study_plots import study_plots
from jaxsteer.report.templates import embedded, flat, shaded, template
from jaxsteer.study.latent_explanation import LatentExplanation, LatentNames
from jaxsteer.study.results import Prompt, SearchRun
from jaxsteer.study.run_table import rule_of


def write_report(directory: str | Path) -> Path:
    """Write ``report.html`` into the directory of a run, a study, an axis run, of circuits, a lens or explanations;
    return its path.

    Reads files only, so that it can be made again at any time. The page of a study links to the pages of its runs that
    are there. Raises ``UserError`` as ``read_run``, ``read_study`` and ``read_axis`` do. The file appears whole or not
    at all.
    """
    if is_axis(directory):
        page = render_axis(read_axis(directory))
    elif is_circuits(directory):
        page = render_circuits(directory)
    elif is_lens(directory):
        page = render_lens(directory)
    elif is_explained(directory):
        page = render_explained(directory)
    else:
        page = render_study(read_study(directory)) if is_study(directory) else render_page(read_run(directory))
    target = Path(directory) / "report.html"
    write_text(target, page)
    return target


def write_plots(directory: str | Path, out: Path | None = None) -> list[Path]:
    """Write all plots of such a directory as SVG, PNG and CSV to ``out`` (default: ``plots`` in it), and return the
    paths."""
    if is_axis(directory):
        made = axis_plots(read_axis(directory))
    elif is_circuits(directory):
        made = circuits_plots(directory)
    elif is_lens(directory):
        made = lens_plots(directory)
    elif is_explained(directory):
        made = {}
    else:
        made = study_plots(read_study(directory)) if is_study(directory) else run_plots(read_run(directory))
    out = Path(directory) / "plots" if out is None else out
    make_directory(out)
    return [path for plot in made.values() for path in plot.write(out)]


def render_page(run: RunFiles) -> str:
    """The whole page as text. Everything that comes from the run's files is escaped by the template."""
    result = run.result
    plots = {name: Markup(plot.svg(themed=True)) for name, plot in run_plots(run).items()}
    metrics = result.to_json()
    return template("page").render(
        title=finding_of(result),
        what=_what(result),
        prompt=result.best,
        tiles=_tiles(result),
        warnings=run.warnings,
        rows=result.prompts,
        words=in_words(run),
        answers=run.answers,
        selected_by=rule_of(result),
        unit=visible(result.target_units),
        controls=result.controls,
        probe=result.probe,
        site=result.site,
        signature=_signature(result.signature, result.latent_names),
        names=result.latent_names,
        attribution=_attribution(result.attribution),
        plots=plots,
        settings=flat(run.config),
        environment=flat(result.environment),
        numbers=flat({name: metrics.get(name) or {} for name in ("splits", "timing")}),
        command=command_of(run.config),
        data=embedded(
            {"metrics": metrics, "config": run.config, "pareto": [prompt.to_json() for prompt in run.pareto]}
            | {"progress": run.progress}
        ),
    )


def _what(result: SearchRun) -> str:
    """One sentence: what was searched, where, and how long it took."""
    count, seconds = result.timing.candidates, result.timing.search_s
    parts = [f"{visible(result.method).upper()} searched"]
    parts.append(f"{count:,} candidate prompts" if count is not None else "candidate prompts")
    if seconds is not None:
        parts.append(f"in {seconds:,.0f} s")
    parts.append(f"with an objective at {visible(result.site)}")
    parts.append(f"(read position {visible(result.read_position)}, seed {result.seed}).")
    return " ".join(parts)


def _tiles(result: SearchRun) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the headline."""
    base = result.baseline or Prompt()
    tiles = _reply_tiles(result) if result.in_words else _rate_tiles(base, result.best)
    if result.probe_correlation is not None:
        ci95, probe = result.probe_ci95, result.probe
        known = "" if ci95 is None or probe is None else f"95 %: {ci95[0]:.2f}–{ci95[1]:.2f}, {probe.prompts} prompts, "
        tiles.append(("probe correlation", decimals(result.probe_correlation), f"{known}objective against behaviour"))
    if result.timing.candidates_per_s is not None:
        tiles.append(("candidates per second", f"{result.timing.candidates_per_s:,.0f}", "scored in the search"))
    return tiles


def _rate_tiles(base: Prompt, best: Prompt | None) -> list[tuple[str, str, str]]:
    tiles = []
    for label, entry in (("without a prompt", base), ("with the prompt", best)):
        if entry is not None and (rate := entry.rate) is not None:
            split = "test" if entry.test is not None else "validation"
            tiles.append((label, percent(rate.rate), f"95 %: {ends(rate.ci95)}, n = {rate.n} questions, {split}"))
    if best is not None and (rate := best.rate) is not None:
        before = None if base.rate is None else base.rate.a_rate
        tiles.append(("answers (A)", percent(rate.a_rate), f"without a prompt {percent(before)}"))
        tiles.append(("same when swapped", percent(rate.swapped_rate), "choices exchanged, content kept"))
    return tiles


def _reply_tiles(result: SearchRun) -> list[tuple[str, str, str]]:
    tiles = []
    for label, entry in (("without a prompt", result.baseline), ("with the prompt", result.best)):
        if entry is not None and (free := entry.replies) is not None:
            split = "test" if entry.test_replies is not None else "validation"
            known = f"95 %: {ends(free.ci95)}, n = {free.n} {split} questions with a reply that was read"
            tiles.append((label, percent(free.rate), known))
    best, base = result.best or Prompt(), result.baseline or Prompt()
    if best.rate is not None and best.replies is not None:
        split = "test" if best.test is not None else "validation"
        before = f"{split}, without a prompt {percent(base.rate and base.rate.rate)}"
        tiles.append(("preference", percent(best.rate.rate), f"95 %: {ends(best.rate.ci95)}, {before}"))
        note = f"95 %: {ends(best.replies.agreement_ci95)}, preference and free replies, {split}"
        tiles.append(("agreement", percent(best.replies.agreement), note))
    if result.reply_reader is not None:
        tiles.append(("replies read right", percent(result.reply_reader), "given ones, by their words"))
    return tiles


def _signature(found: LatentExplanation | None, names: LatentNames | None) -> dict[str, Any] | None:
    """The latents of a SAEGA run, with the strength of every token's colour in percent; None for other runs."""
    if found is None:
        return None
    largest = max((abs(value) for row in found.rows for value in row.by_token), default=0.0) or 1.0
    rows = [
        {
            **row.to_json(),
            "tokens": [(value, round(60 * abs(value) / largest)) for value in row.by_token],
            "named": None if names is None else names.of(row.latent),
        }
        for row in found.rows
    ]
    return {**found.to_json(), "before": found.objective_before, "rows": rows}


def _attribution(found: Attribution | None) -> dict[str, Any] | None:
    """The selected prompt's tokens with their effects, and the strength of each one's colour in percent."""
    if found is None:
        return None
    columns = zip(found.tokens, found.leave_one_out, found.replacement, found.replacement_sd, strict=True)
    tokens = [
        {"token": token, "leave_one_out": left_out, "replacement": replaced, "sd": sd, "strength": strength}
        for (token, left_out, replaced, sd), strength in zip(columns, shaded(found.replacement), strict=True)
    ]
    return {**found.to_json(), "tokens": tokens}
