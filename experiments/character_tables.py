"""The tables of the study of characters: results.json, of which ``jaxsteer report`` makes the page, and table.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.display import decimals, ends, interval, percent, points
from jaxsteer.files import write_text
from jaxsteer.models.model import Model
from jaxsteer.report.table_rows import merged
from jaxsteer.runs.files import TABLE_FORMAT, document
from jaxsteer.study.measurement import Measured
from jaxsteer.study.outcome import environment
from jaxsteer.study.results import Prompt, SearchRun
from jaxsteer.study.table_row import TableRow

SIDE_BY_SIDE = ("none", "instruction", "RESGA, decision", "activation steering")
"""Methods whose replies the page shows."""
HEAD = (
    "method", "free replies", "position", "word odds", "answers the question", "distinct 3-grams", "rate",
    "relative rate", "KL", "nats per token", "judge", "prompt",
)  # fmt: skip


LETTERS_HEAD = ("method", "rate", "change, points", "A-rate", "same when swapped", "AUROC", "probe", "prompt")
PROBE_HEAD = ("site", "decision", "matched", "published")


def write_results(
    out: Path,
    model: Model,
    settings: Mapping[str, Any],
    blocks: Sequence[dict[str, Any]],
    letters: Mapping[str, SearchRun],
) -> None:
    """results.json and table.md of all characters and goals, and of the searches along lettered choices."""
    shown = page(model.name, blocks, letters)
    whole = {
        "format": TABLE_FORMAT,
        "title": f"Characters of {model.name}",
        "quick": settings["quick"],
        "settings": dict(settings),
        "model": model.name,
        "site": settings["site"],
        **shown,
        "environment": environment(model),
        "blocks": list(blocks),
    }
    write_text(out / "results.json", document(whole))
    lines = [f"# Characters of {model.name}", ""]
    for table in shown["tables"]:
        lines += [
            f"## {table['title']}",
            "",
            "| " + " | ".join(table["head"]) + " |",
            "|---" * len(table["head"]) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in table["rows"]] + [""]
    write_text(out / "table.md", "\n".join(lines))


def folder_of(method: str, seed: int) -> str:
    """Where the files of one search are."""
    return f"{method.replace(', ', '-').replace(' ', '_')}-{seed}"


def page(model: str, blocks: Sequence[dict[str, Any]], letters: Mapping[str, SearchRun]) -> dict[str, Any]:
    """What the page shows (docs/report.md): rates of free replies, the table, and replies side by side."""
    rows, tables, replies = [], [], []
    for block in blocks:
        name, several = f"{block['character']} ({block['goal']})", dict[str, list[TableRow]]()
        for row in block["rows"]:
            several.setdefault(row["method"], []).append(table_row(model, name, block, row))
        rows += [merged(alike).to_json() | {"run": alike[0].run} for alike in several.values()]
        title = f"{name}, n = {len(block['questions'])} test questions"
        tables.append({"title": title, "head": HEAD, "rows": [cells(row) for row in block["rows"]]})
        if block.get("probe"):
            tables.append({"title": f"{name}: probe", "head": PROBE_HEAD, "rows": probe_rows(block["probe"])})
        first = {row["method"]: row for row in reversed(block["rows"])}
        columns = [
            {"name": method, "texts": first[method]["answers"], "in_character": first[method].get("in_character", ())}
            for method in SIDE_BY_SIDE
            if method in first
        ]
        replies.append({"title": f"{name}: what the model writes", "questions": block["questions"], "columns": columns})
    if letters:
        title = f"{next(iter(letters.values())).persona}: lettered choices"
        tables.append({"title": title, "head": LETTERS_HEAD, "rows": letter_rows(letters)})
    return {"rows": rows, "tables": tables, "replies": replies}


def probe_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rank correlations with their intervals: a line for each site, a column for each read position."""
    found = {(row["site"], row["read_position"]): row for row in rows}
    sites = list(dict.fromkeys(row["site"] for row in rows))

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        low, high = row["ci95"]
        return f"{decimals(row['correlation'])} ({decimals(low)} to {decimals(high)})"

    return [[site, *(cell(found.get((site, position))) for position in PROBE_HEAD[1:])] for site in sites]


def letter_rows(runs: Mapping[str, SearchRun]) -> list[list[str]]:
    """Test rates of lettered choices with their controls: no prompt, what was not searched, what every search found."""
    first = next(iter(runs.values()))
    given: list[tuple[str, Prompt | None, SearchRun | None]] = [("none", first.baseline, None)]
    given += [(name, prompt, None) for name, prompt in first.controls.items()]
    given += [(name, run.best, run) for name, run in runs.items()]
    lines = []
    for method, prompt, run in given:
        if prompt is None or (rate := prompt.test) is None:
            continue
        change = points(rate.difference) if rate.difference else ""
        shares = percent(rate.a_rate) + (" letter collapse" if rate.letter_collapse else ""), percent(rate.swapped_rate)
        probe = decimals(run and run.probe_correlation)
        lines.append([method, interval(rate), change, *shares, decimals(rate.auroc), probe, prompt.text])
    return lines


def table_row(model: str, persona: str, block: dict[str, Any], row: dict[str, Any]) -> TableRow:
    """One prompt, by its free replies, as a row of the page's main table."""
    one, bare, seed = Measured.from_json(row), row["method"] == "none", row.get("seed")
    searched = "candidates" in row
    free = one.written
    return TableRow(
        model=model,
        persona=persona,
        goal=block["goal"],
        method="zero-shot" if bare else row["method"],
        kind="baseline" if bare else "search" if searched else "control",
        seed=seed,
        run=f"{block['character']}-{block['goal']}/{folder_of(row['method'], row['seed'])}" if searched else None,
        prompt=None if one.steered else one.prompt,
        steered=one.steered,
        rate=math.nan if free is None or free.rate is None else free.rate,
        ci95=None if free is None else free.ci95,
        n=None if free is None else free.n,
        difference=None if free is None else free.difference,
        preference=None if one.rate is None else one.rate.rate,
        perplexity=None if one.side_effects is None else one.side_effects.prompt_perplexity,
        note=row["note"] or None,
    )


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    free, quality, sides, effects = (row.get(name) or {} for name in ("written", "quality", "sides", "side_effects"))
    note, judged = " ~" if row["note"] else "", row.get("judged")
    return [
        row["method"] + (f", seed {row['seed']}" if "seed" in row else ""),
        f"{percent(free.get('rate'))} ({ends(free.get('ci95'))})",
        f"{decimals(quality['position'])} ({' to '.join(decimals(end) for end in quality['position_ci95'])})",
        decimals(quality["score"]),
        f"{percent(quality['relevant'])} ({ends(quality['relevant_ci95'])})",
        percent(free.get("distinct_3")),
        f"{percent(row.get('rate'))}{note}",
        percent(sides.get("relative_rate")),
        decimals(effects.get("kl")),
        decimals(row.get("cross_entropy"), 1),
        "" if judged is None else decimals(judged["score"]),
        row["prompt"],
    ]
