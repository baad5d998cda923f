"""The problems of ``jaxsteer search --vary``: their table, frontiers and progress, told apart by run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jaxsteer.display import number
from jaxsteer.errors import UserError
from jaxsteer.files import read_text
from jaxsteer.report.run_files import read_lines
from jaxsteer.study.study_result import Study

Lines = list[tuple[str, str, list[Any]]]
"""(run, name, rows)"""
GROUPED = ("persona", "goal", "method", "direction", "site", "fluency")
"""Columns that set problems apart; seeds and restarts repeat them."""


def read_problems(path: Path) -> list[dict[str, str]]:
    """The lines of problems.csv; none where there is no such file. Raises ``UserError`` for what is no table."""
    found = path / "problems.csv"
    if not found.exists():
        return []
    lines = csv.DictReader(io.StringIO(read_text(found), newline=""))
    try:
        rows = [row for row in lines if row.get("run") and row.get("problem")]
        for row in rows:
            float(row.get("target") or 0)
        return rows
    except (csv.Error, ValueError) as error:
        raise UserError(f"{found}, line {lines.line_num}: {error}") from None


def summarised(problems: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of problem: how many there are, and the best target of the best, the middle and the worst."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in problems:
        groups.setdefault(tuple(row.get(key) or "" for key in GROUPED), []).append(row)
    out = []
    for key, rows in groups.items():
        known = [(float(row["target"]), row) for row in rows if row.get("target")]
        targets = sorted(target for target, _ in known)
        best = max(known, key=lambda pair: pair[0])[1] if known else {}
        made = dict(zip(GROUPED, key, strict=True)) | {"problems": len(rows), "without": len(rows) - len(known)}
        if targets:
            made |= {"best": targets[-1], "median": median(targets), "worst": targets[0]}
        out.append(made | {"text": best.get("text", ""), "run": rows[0]["run"]})
    return out


def problem_lines(
    path: Path, problems: Sequence[Mapping[str, Any]], study: Study | None, notes: list[str]
) -> list[Lines]:
    """Frontiers and curves, one of each per problem, of the runs that were finished."""
    runs = {} if study is None else study.runs
    finished = {name for name in runs if (path / name / "metrics.json").is_file()}
    points: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_lines(path / "frontiers.jsonl", notes):
        points.setdefault(str(row.get("problem")), []).append(row)
    frontiers = [
        (str(row["run"]), f"problem {row['problem']}", points[str(row["problem"])])
        for row in problems
        if row["run"] in finished and str(row["problem"]) in points
    ]
    members = [name for name, run in runs.items() for _ in range(run.problems)]
    curves = [line for line in _curves(read_lines(path / "progress.jsonl", notes), members) if line[0] in finished]
    return [frontiers, curves]


def _curves(progress: Sequence[Mapping[str, Any]], members: Sequence[str]) -> Iterator[tuple[str, str, list[Any]]]:
    """One curve per problem, against its own candidates and the seconds of its wave, which the problems share.

    ``members`` names the run of every problem in the order in which they were searched.
    """
    waves: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in progress:
        if isinstance(row.get("best_target"), list) and row["best_target"]:
            waves.setdefault((int(number(row.get("group")) or 0), int(number(row.get("first")) or 0)), []).append(row)
    start, before, last = 0, (0.0, 0.0), None
    for (group, first), rows in sorted(waves.items()):
        if group != last:
            before, last = (0.0, 0.0), group
        size = len(rows[0]["best_target"])
        for at, run in enumerate(members[start : start + size]):
            yield run, f"group {group}, problem {first + at}", list(_points(rows, at, size, before))
        start += size
        before = (number(rows[-1].get("candidates")) or 0.0, number(rows[-1].get("seconds")) or 0.0)


def _points(
    rows: Sequence[Mapping[str, Any]], at: int, size: int, before: tuple[float, float]
) -> Iterator[dict[str, float]]:
    for row in rows:
        spent, elapsed = number(row.get("candidates")), number(row.get("seconds"))
        best = number(row["best_target"][at]) if at < len(row["best_target"]) else None
        if spent is not None and elapsed is not None and best is not None:
            yield {"candidates": (spent - before[0]) / size, "seconds": elapsed - before[1], "best_target": best}
