"""Tables for the terminal: plain text, aligned, nothing that a terminal would interpret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.report.run_files import (
    controls,
    decimals,
    doubts,
    interval,
    named,
    number,
    percent,
    selected,
    split_rate,
    visible,
)
from jaxsteer.report.study import Study

HEAD = ("", "prompt", "target", "x-ent", "validation", "test", "A-rate", "swapped")


def table(metrics: Mapping[str, Any], *, limit: int = 10, width: int = 48) -> str:
    """The prompts of one run beside its baseline and controls, at most ``limit`` of them and ``width`` letters each.

    ``*`` marks the selected prompt and ``!`` one whose text re-tokenises differently. Rates are persona rates with
    their 95 % interval; A-rate and swapped (share of questions answered alike when the choices are exchanged) belong
    to the test questions, or to the validation questions where no test was run.
    """
    prompts = list(metrics.get("prompts") or ())
    shown = list(enumerate(prompts[:limit]))
    chosen = metrics.get("selected")
    if isinstance(chosen, int) and limit <= chosen < len(prompts):
        shown.append((chosen, prompts[chosen]))
    rows = [_row("", "(no prompt)", metrics.get("baseline"), width)]
    for index, prompt in shown:
        mark = ("*" if index == chosen else "") + ("!" if prompt.get("retokenises") is False else "")
        rows.append(_row(mark, prompt.get("text", ""), prompt, width))
    for control in controls(metrics):
        rows.append(_row("", f"[{named(control)}] {control.get('text') or ''}".rstrip(), control, width))
    unit = visible(metrics.get("target_units", "sd"))
    lines = [_title(metrics), "", *_aligned([HEAD, *rows])]
    if len(prompts) > limit:
        lines.append(f"... and {len(prompts) - len(shown)} more")
    lines += ["", f"persona rate with 95 % interval; target in {unit}; * selected, ! re-tokenises differently"]
    lines += [f"warning: {visible(note)}" for note in doubts(metrics)]
    return "\n".join(lines)


def summary_table(runs: Sequence[Mapping[str, Any]], *, width: int = 60) -> str:
    """One line per run: persona, baseline, and the selected prompt with its test rate."""
    rows: list[tuple[str, ...]] = [("persona", "baseline", "with prompt", "A-rate", "probe", "prompt")]
    for metrics in runs:
        prompt = selected(metrics) or {}
        after = split_rate(prompt, "test")
        rows.append(
            (
                named(metrics.get("persona")),
                interval(split_rate(metrics.get("baseline"), "test")),
                interval(after),
                percent((after or {}).get("a_rate")),
                decimals(metrics.get("probe_correlation")),
                _short(prompt.get("text", "(none found)"), width),
            )
        )
    return "\n".join(_aligned(rows, left=(0, 5)))


def study_table(study: Study, *, width: int = 40) -> str:
    """The main table of a study: a line per method, a column per persona (and model), rates with their intervals."""
    several = len({model for model, _ in study.places}) > 1
    head = ["", *(visible(f"{persona} ({model})" if several else persona) for model, persona in study.places)]
    rows: list[Sequence[str]] = [head]
    for method in study.methods:
        cells = {(row["model"], row["persona"]): row for row in study.rows if row["method"] == method}
        marks = ["!" if cells.get(place, {}).get("letter_collapse") else "" for place in study.places]
        rates = [interval(cells.get(place)) for place in study.places]
        rows.append([_short(method, width), *(rate + mark for rate, mark in zip(rates, marks, strict=True))])
    lines = [visible(study.title), "", *_aligned(rows, left=(0,))]
    lines += ["", "persona rate with 95 % interval; ! one letter wins whatever is asked"]
    return "\n".join([*lines, *(f"warning: {visible(note)}" for note in study.warnings)])


def _title(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"{named(metrics.get('persona'))} on {named(metrics.get('model'))}",
        f"{named(metrics.get('method'))} at {visible(metrics.get('site', '?'))}",
        f"read {visible(metrics.get('read_position', '?'))}",
    ]
    if number(metrics.get("probe_correlation")) is not None:
        parts.append(f"probe {decimals(metrics['probe_correlation'])}")
    return " | ".join([*parts, f"seed {visible(metrics.get('seed', '?'))}"])


def _row(mark: str, text: str, entry: Any, width: int) -> tuple[str, ...]:
    test, validation = split_rate(entry, "test"), split_rate(entry, "validation")
    rate = test or validation or {}
    scores = entry if isinstance(entry, Mapping) else {}
    return (
        mark,
        _short(text, width),
        decimals(scores.get("target")),
        decimals(scores.get("cross_entropy")),
        interval(validation),
        interval(test),
        percent(rate.get("a_rate")),
        percent(rate.get("swapped_rate")),
    )


def _short(text: Any, width: int) -> str:
    shown = visible(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0, 1)) -> list[str]:
    """Columns padded to their widest cell: ``left`` ones start at the left; a rule below row 0."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(size) if i in left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
