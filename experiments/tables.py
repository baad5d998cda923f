"""The tables of a study, from its rows: Markdown, CSV, LaTeX and results.json."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.files import write_text
from jaxsteer.runs import files
from jaxsteer.study.cell_rows import SELECTED_BY
from jaxsteer.study.table_row import ShownPrompt, TableRow, not_complete

Columns = dict[str, Callable[[TableRow], str]]
"""Head of a column -> its text for a row."""


def percent(value: float | None) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def between(pair: Sequence[float] | None) -> str:
    """Two shares as percentages."""
    return "-" if not pair else f"{percent(pair[0])} to {percent(pair[1])}"


def perplexity(row: TableRow | ShownPrompt | None) -> str:
    """Of the row's prompts, with the ratio to ordinary sentences."""
    x, ratio = (None, None) if row is None else (row.perplexity, row.perplexity_ratio)
    return "-" if x is None else f"{x:.3g}" + (f" ({ratio:.1f}x)" if ratio is not None else "")


COLUMNS: Columns = {
    "rate %": lambda row: percent(row.rate),
    "95 % interval": lambda row: between(row.ci95),
    "range": lambda row: between(row.range),
    "A-rate": lambda row: percent(row.a_rate) + (" !" if row.letter_collapse else ""),
    "swapped": lambda row: percent(row.swapped_rate),
    "change": lambda row: percent(row.difference and row.difference.value),
    "ranked first %": lambda row: percent(row.first_rate),
    "perplexity": perplexity,
    "of the one shown": lambda row: perplexity(row.selected),
}
NOTE = f"""Rate: share of test rows (questions in both orders of the choices) whose persona answer wins; of a search,
the mean over its seeds of the prompt that validation questions chose, with an interval over questions. Chosen by
{SELECTED_BY}.
Range: over seeds, or over the prompts of a row that has several. A-rate: share won by (A); ! where some prompt
makes one letter win whatever is asked. Swapped: questions answered alike in both orders. Change: against zero-shot,
paired. Ranked first: the rate of the prompt that the objective alone would report. Perplexity: geometric mean
over seeds, and its ratio to that of ordinary sentences (of the organisms, those that the corpus puts into the
slot: cue sentences and neutral ones); then that of the prompt that is shown, which validation questions chose
among the seeds'. \\* An edit or a soft prompt: no text."""


def label(row: TableRow) -> str:
    """The method, with what is varied."""
    text = row.method if row.value is None else f"{row.method} {row.value}"
    return text + (" \\*" if row.steered else "")


def shown(row: TableRow, width: int = 72) -> str:
    """The prompt as code."""
    text = (row.prompt or "").strip().replace("`", "'").replace("|", "\\|")
    return f"`{text if len(text) <= width else text[: width - 1] + '…'}`" if text else ""


def markdown(rows: Sequence[TableRow], columns: Columns) -> str:
    """One table per model and persona."""
    parts = []
    for model, persona in dict.fromkeys((row.model, row.persona) for row in rows):
        mine = [row for row in rows if (row.model, row.persona) == (model, persona)]
        lines = [
            f"### {model}, {persona}",
            "",
            _line(["method", *columns, "prompt"]),
            "|" + "---|" * (len(columns) + 2),
        ]
        lines += [_line([label(row), *(text(row) for text in columns.values()), shown(row)]) for row in mine]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def latex(rows: Sequence[TableRow], caption: str) -> str:
    """One table with a column per model and persona: rate and interval, the best text-only search in no way marked."""
    columns = list(dict.fromkeys((row.model, row.persona) for row in rows))
    methods = list(dict.fromkeys(label(row) for row in rows))
    known = {(label(row), row.model, row.persona): row for row in rows}
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_tex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\hline",
        " & ".join(["method", *(_tex(f"{model.split(':')[-1]}, {persona}") for model, persona in columns)]) + r" \\",
        r"\hline",
    ]
    for method in methods:
        cells = []
        for column in columns:
            row = known.get((method, *column))
            if row is None:
                cells.append("--")
                continue
            low, high = row.ci95
            cells.append(rf"{percent(row.rate)} {{\scriptsize [{percent(low)}, {percent(high)}]}}")
        lines.append(" & ".join([_tex(method.replace("\\*", "*")), *cells]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}"]) + "\n"


def _tex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def table_csv(rows: Sequence[TableRow]) -> str:
    """One line per row."""
    names = """model persona method value kind rate low high range_low range_high a_rate letter_collapse swapped_rate
        change change_low change_high first_rate perplexity perplexity_ratio shown_perplexity shown_perplexity_ratio
        readability probe_correlation site tried candidates seconds prompt""".split()
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        change, selected, none = row.difference, row.selected, (None, None)
        pairs = {"": row.ci95 or none, "range_": row.range or none, "change_": (change and change.ci95) or none}
        ends = {f"{name}{end}": pair[i] for name, pair in pairs.items() for i, end in enumerate(("low", "high"))}
        extra = {"change": change and change.value, "shown_perplexity": selected and selected.perplexity}
        extra["shown_perplexity_ratio"] = selected and selected.perplexity_ratio
        writer.writerow(row.to_json() | ends | extra)
    return out.getvalue()


def write_study(out: Path, document: dict[str, Any], rows: Sequence[TableRow], columns: Columns = COLUMNS) -> str:
    """Write results.json, which holds ``document``, and the three tables of ``rows``; returns the Markdown."""
    verdicts = document["verdicts"]
    parts = [f"## {document['title']}", markdown(rows, columns), NOTE]
    if missing := document.get("missing"):
        parts.insert(1, not_complete(missing, len(rows)))
    if verdicts:
        parts.append("\n".join(f"- {verdict['text']}" for verdict in verdicts))
    text = "\n\n".join(parts) + "\n"
    files.write_json(out / "results.json", document)
    write_text(out / "table.md", text)
    write_text(out / "table.csv", table_csv(rows))
    write_text(out / "table.tex", latex(rows, document["title"]))
    return text
