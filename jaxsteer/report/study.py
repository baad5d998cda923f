"""A study, that is many searches in one directory, read for one page: its main table and what stands behind it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.display import aligned, interval, number, short, visible, wrapped
from jaxsteer.errors import UserError
from jaxsteer.evals.free_answers import ILLUSION
from jaxsteer.files import read_text
from jaxsteer.files.paths import user_path
from jaxsteer.report.problems import problem_lines, read_problems
from jaxsteer.report.run_files import is_run, read_lines, read_object, read_result
from jaxsteer.report.said import ShownTable, SideBySide
from jaxsteer.report.table_rows import Place, persona_of, rows_of_runs
from jaxsteer.runs.files import TABLE_FORMAT
from jaxsteer.study.results import SearchRun
from jaxsteer.study.run_table import rule_of
from jaxsteer.study.study_result import Study
from jaxsteer.study.table_row import TableRow, not_complete

PARETO, PROGRESS = "pareto.jsonl", "progress.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What one search found or how it went: rows of numbers under one name."""

    place: Place
    method: str
    name: str
    rows: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyFiles:
    """A directory of many searches in memory."""

    path: Path
    title: str
    rows: tuple[TableRow, ...]
    """Of the main table, one per (model, persona, method)."""
    runs: tuple[str, ...]
    """Folders of finished runs, relative to ``path``."""
    problems: tuple[Mapping[str, Any], ...] = ()
    """Lines of problems.csv."""
    frontiers: tuple[Line, ...] = ()
    """``target`` and ``cross_entropy`` of every prompt of a Pareto frontier."""
    curves: tuple[Line, ...] = ()
    """``best_target`` against ``candidates`` and ``seconds`` of every search."""
    verdicts: tuple[Mapping[str, Any], ...] = ()
    complete: bool = True
    """Whether nothing that was asked for is missing; else ``warnings`` say what is."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str | None = None
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unit: str = "sd"
    intervals: str = ""
    """What the interval of a row of several searches is."""
    selected_by: str = ""
    """The rule that chose the prompts of searches, in words."""
    tables: tuple[ShownTable, ...] = ()
    """Further tables of results.json."""
    replies: tuple[SideBySide, ...] = ()
    """What the model wrote, of results.json."""
    warnings: tuple[str, ...] = ()

    @property
    def places(self) -> list[Place]:
        """(model, persona), in the order of the study."""
        return list(dict.fromkeys((row.model, row.persona) for row in self.rows))

    @property
    def methods(self) -> list[str]:
        """In the order of the study."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def of(self, place: Place) -> list[TableRow]:
        """The rows of one model and persona."""
        return [row for row in self.rows if (row.model, row.persona) == place]

    def table(self, *, width: int = 40) -> str:
        """A line per method, a column per persona (and model), rates with their intervals, for the terminal."""
        several = len({model for model, _ in self.places}) > 1
        lines = [["", *(visible(f"{persona} ({model})" if several else persona) for model, persona in self.places)]]
        for method in self.methods:
            cells = {(row.model, row.persona): row for row in self.rows if row.method == method}
            rows = [cells.get(place) for place in self.places]
            marks = ("!" * bool(r and r.letter_collapse) + "~" * bool(r and r.note) for r in rows)
            lines.append([short(method, width), *(interval(r) + mark for r, mark in zip(rows, marks, strict=True))])
        letters = "; ! one letter wins whatever is asked" if not all(row.goal for row in self.rows) else ""
        parts = [f"persona rate with 95 % interval over questions{letters}"]
        if any(row.goal for row in self.rows):
            parts.append(f"of personas in words, marked (reduce) or (elicit), free replies in character; ~ {ILLUSION}")
        parts += [f"prompts selected by {visible(self.selected_by)}"] * bool(self.selected_by)
        head = f"{wrapped(visible(self.title))}\n\n{aligned(lines)}\n"
        return "\n".join([head, *map(wrapped, [*parts, *(f"warning: {visible(note)}" for note in self.warnings)])])


def is_study(directory: str | Path) -> bool:
    """Whether a directory holds many runs instead of one."""
    path = user_path(directory)
    if not path.is_dir() or is_run(path):
        return False
    return any(_folders(path)) or _table(path) is not None


def run_folders(directory: str | Path) -> list[Path]:
    """The finished runs of a study, or the run itself. Raises ``UserError`` where there is none."""
    path = user_path(directory)
    if path.is_dir() and is_run(path):
        return [path]
    folders = [path / name for name in _folders(path)] if path.is_dir() else []
    if not folders:
        raise UserError(
            f"{path} holds no finished run (a folder with metrics.json): give the output directory of a search, or a "
            "directory of such"
        )
    return folders


def read_study(directory: str | Path) -> StudyFiles:
    """Read the directory of ``jaxsteer search --vary``, one with a table of results, or any folder of runs.

    Raises ``UserError`` where nothing is there, and for damaged files.
    """
    path, notes = Path(directory), list[str]()
    if not is_study(path):
        raise UserError(
            f"{path} holds neither a run nor many: give the output directory of a search or of an experiment"
        )
    names = list(dict.fromkeys(_folders(path)))
    runs = {name: read_result(path / name) for name in names}
    configs = {name: read_object(path / name / "config.json") or {} for name in names}
    places = {name: (visible(run.model), visible(persona_of(run))) for name, run in runs.items()}
    table, study = _table(path) or {}, _study(path)
    rows = _rows_of_table(table, runs, path) if table else rows_of_runs(runs, configs)
    problems = read_problems(path)
    if problems:
        found = problem_lines(path, problems, study, notes)
    else:
        found = [[(name, name, _lines(path / name / file, notes)) for name in names] for file in (PARETO, PROGRESS)]
        found[1] = [(run, name, _best_of_populations(progress)) for run, name, progress in found[1]]
    methods = {one.run: row.method for row in rows for one in (row, *row.each)}
    frontiers, curves = (
        [
            Line(place=places[run], method=methods.get(run, ""), name=name, rows=tuple(points))
            for run, name, points in lines
            if points
        ]
        for lines in found
    )
    cut = _cut_off(path, table, study)
    rules = () if table else dict.fromkeys(rule_of(run) for run in runs.values())
    units = {run.target_units for run in runs.values()}
    environments = [one.environment for one in (study, *runs.values()) if one is not None]
    return StudyFiles(
        path=path,
        title=str(table.get("title") or _title(rows, len(names))),
        rows=tuple(rows),
        runs=tuple(names),
        problems=tuple(problems),
        frontiers=tuple(frontiers),
        curves=tuple(curves),
        verdicts=() if _says_nothing_of_cells(table) else tuple(table.get("verdicts") or ()),
        complete=cut is None,
        config=table.get("settings") or read_object(path / "config.json") or _common(list(configs.values())),
        command=table.get("command"),
        numbers=_numbers(study, len(names)),
        environment=table.get("environment") or (environments[0] if environments else {}),
        unit=units.pop() if len(units) == 1 else "the units of each search",
        intervals="" if table else "their interval reaches from the lowest to the highest end of theirs",
        selected_by=str(table.get("selected_by") or "; ".join(rules)),
        tables=tuple(ShownTable.from_json(*one) for one in _listed(path, table, "tables")),
        replies=tuple(SideBySide.from_json(*one) for one in _listed(path, table, "replies")),
        warnings=(*(() if cut is None else (cut,)), *_warnings(table, runs, notes)),
    )


def envelope(lines: Iterable[Line]) -> list[tuple[float, float]]:
    """(cross-entropy, target) of the prompts that no other prompt of any line beats in both, most fluent first."""
    points = sorted(
        (x, -y)
        for line in lines
        for row in line.rows
        if (x := number(row.get("cross_entropy"))) is not None
        and (y := number(row.get("target"))) is not None
        and row.get("retokenises") is not False
    )
    kept: list[tuple[float, float]] = []
    best = -math.inf
    for x, negative in points:
        if -negative > best:
            best = -negative
            kept.append((x, best))
    return kept


def _table(path: Path) -> dict[str, Any] | None:
    """results.json, where it is the table of a study."""
    found = path / "results.json"
    if not found.exists() or not read_text(found).lstrip().startswith("{"):
        return None
    table = read_object(found)
    return table if table is not None and table.get("format") == TABLE_FORMAT else None


def _study(path: Path) -> Study | None:
    """metrics.json, where it is that of ``jaxsteer search --vary``."""
    found = read_object(path / "metrics.json")
    return None if found is None or "runs" not in found else Study.from_json(found, str(path / "metrics.json"))


def _folders(path: Path) -> Iterator[str]:
    """Names of the finished runs: those that a table or the metrics name, else every run up to four levels below."""
    table, study = _table(path), _study(path)
    if table is not None:
        given = [str(row["run"]) for row in table.get("rows") or () if row.get("run")]
    elif study is not None:
        given = list(study.runs)
    else:
        files = (f for depth in range(1, 5) for f in sorted(path.glob("*/" * depth + "metrics.json")))
        once = {f.parent.resolve(): f for f in reversed(list(files))}.values()  # links may lead there by several ways
        given = [f.parent.relative_to(path).as_posix() for f in reversed(once) if is_run(f.parent)]
    inside = (name for name in given if ".." not in Path(name).parts and not Path(name).is_absolute())
    yield from (name for name in inside if (path / name / "metrics.json").is_file())


def _rows_of_table(table: Mapping[str, Any], runs: Mapping[str, SearchRun], path: Path) -> list[TableRow]:
    """The table's rows, with the value of an ablation in the method's name and what attribution the run holds."""
    rows = []
    for at, given in enumerate(table.get("rows") or ()):
        if not isinstance(given, Mapping) or number(given.get("rate")) is None:
            continue
        row = TableRow.from_json(given, f"{path / 'results.json'}, row {at}")
        method = row.method + ("" if row.value is None else f" = {row.value}")
        attribution = runs[row.run].attribution if row.run is not None and row.run in runs else None
        rows.append(dataclasses.replace(row, method=method, attribution=attribution))
    order = {name: i for i, name in enumerate(table.get("methods") or ())}
    rows.sort(key=lambda row: order.get(row.method, order.get(row.method.partition(" = ")[0], len(order))))
    return rows


def _listed(path: Path, table: Mapping[str, Any], key: str) -> list[tuple[Any, str]]:
    """What results.json holds under a key, each with its place."""
    return [(one, f"{path / 'results.json'}, {key} {at}") for at, one in enumerate(table.get(key) or ())]


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    return read_lines(path, notes) if path.exists() else []


def _best_of_populations(progress: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in progress:
        best = [value for value in row.get("best_target") or () if number(value) is not None]
        if best and number(row.get("candidates")) is not None:
            rows.append({"candidates": row["candidates"], "seconds": row.get("seconds"), "best_target": max(best)})
    return rows


def _title(rows: Sequence[TableRow], runs: int) -> str:
    def few(what: str, names: Iterable[str]) -> str:
        several = list(dict.fromkeys(names))
        return ", ".join(several) if len(several) <= 4 else f"{len(several)} {what}s"

    places = f"{few('persona', (row.persona for row in rows))} on {few('model', (row.model for row in rows))}"
    return f"{places}: {runs} run{'' if runs == 1 else 's'}"


def _common(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all runs have."""
    first = configs[0] if configs else {}
    return {key: value for key, value in first.items() if all(config.get(key) == value for config in configs)}


def _numbers(study: Study | None, runs: int) -> dict[str, Any]:
    if study is None:
        return {"runs": runs}
    return {"runs": runs, "problems": study.problems, "searched": study.searched, **study.timing.to_json()}


def _says_nothing_of_cells(table: Mapping[str, Any]) -> bool:
    """Whether an earlier version wrote the table, whose verdicts took missing cells for failures."""
    return bool(table.get("experiment")) and "missing" not in table


def _cut_off(path: Path, table: Mapping[str, Any], study: Study | None) -> str | None:
    """What is missing of a study that was cut off; None where nothing is."""
    if absent := [cell for cell in table.get("missing") or () if isinstance(cell, Mapping)]:
        return not_complete(absent, len(table.get("rows") or ()))
    if study is not None and study.interrupted:
        missing = "; ".join(f"{kind} ({count})" for kind, count in study.missing.items())
        text = f"Interrupted: {study.searched} of {study.problems} problems were searched."
        return text + (f" Missing: {missing}." if missing else "")
    if study is None and not table and ((path / "config.json").is_file() or (path / "cells").is_dir()):
        return (
            "Cut off: there is neither metrics.json nor results.json, only the runs that were finished. Run the same "
            "command again (jaxsteer search with --resume)."
        )
    return None


def _warnings(table: Mapping[str, Any], runs: Mapping[str, SearchRun], notes: Sequence[str]) -> Iterator[str]:
    """Doubts about single runs, each kind once with the runs that it concerns."""
    if table.get("quick"):
        yield "A quick run of this experiment, to see that it works: its numbers are no results."
    if _says_nothing_of_cells(table):
        yield "results.json does not say whether cells are missing (an earlier version wrote it): no verdict is shown."
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, run in runs.items():
        for note in run.doubts:
            kinds.setdefault(re.sub(r"\d+", "", note), []).append((name, note))  # alike but for their numbers
    for alike in kinds.values():
        name, note = alike[0]
        count = f"{len(alike) - 1} other run{'s' if len(alike) > 2 else ''}"
        others = f" So it is in {count} of {len(runs)}." if len(alike) > 1 else ""
        yield f"{name}: {note}{others}"
    yield from notes
