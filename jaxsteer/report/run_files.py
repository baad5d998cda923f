"""The files of a run directory, read forgivingly where a run may have been cut and strictly everywhere else."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from jaxsteer.display import visible
from jaxsteer.errors import UserError
from jaxsteer.files import read_json, read_log
from jaxsteer.files.paths import user_path
from jaxsteer.report.answers import Answers, read_answers
from jaxsteer.runs import files
from jaxsteer.study.free_replies import SaidFreely
from jaxsteer.study.results import Prompt, SearchRun

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run directory in memory."""

    path: Path
    result: SearchRun
    """metrics.json."""
    config: dict[str, Any]
    """config.json: the options."""
    pareto: tuple[Prompt, ...]
    """pareto.jsonl: the whole frontier."""
    progress: list[dict[str, Any]]
    """Rows of progress.jsonl."""
    answers: Answers | None = None
    """choices.json: what the selected prompt did to every question; None where it is not told in words."""
    said: SaidFreely | None = None
    """replies.json: of a persona in words, the free replies to the test questions."""
    warnings: tuple[str, ...]
    """What a reader must know before believing the numbers, in words."""


def read_run(directory: str | Path) -> RunFiles:
    """Read config.json, metrics.json, pareto.jsonl and progress.jsonl of ``directory``; choices.json must be whole.

    metrics.json must be there and whole; the others may be missing, and the last line of a .jsonl file may be cut:
    both become warnings. Raises ``UserError`` otherwise.
    """
    path = user_path(directory)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give the output directory of a search")
    notes: list[str] = []
    if not (path / files.METRICS).is_file():
        raise UserError(f"{path} has no metrics.json: a report needs a finished run (or one that was ended by Ctrl-C)")
    if not is_run(path):
        kinds = [(read_object(path / name) or {}).get("kind") for name in (files.METRICS, files.CONFIG)]
        kind = visible(next(filter(None, kinds), "something else"))
        raise UserError(
            f"{path / files.METRICS} is not of a search but of {kind}, of which there is no page: give the output "
            "directory of jaxsteer search, or of an experiment. A sweep has its own sweep.csv and heatmap.png; "
            "drift and caps stand on the page of the axis run whose directory they lie in."
        )
    result = read_result(path)
    config = read_object(path / files.CONFIG)
    if not config:
        what = "is missing" if config is None else "holds nothing"
        notes.append(f"config.json {what}: the settings of this run are not known")
    if read_object(path / files.CHOICES) == {}:
        notes.append("choices.json holds nothing: answers to single questions are not known")
    rows = read_lines(path / files.PARETO, notes)
    pareto = [Prompt.from_json(row, f"{path / files.PARETO}, row {i}") for i, row in enumerate(rows)]
    pooled = config is not None and "pooled" in config  # the progress of many searches stands beside all of their runs
    progress = [] if pooled else read_lines(path / files.PROGRESS, notes)
    said = _said(path / files.REPLIES, notes) if result.in_words else None
    for note in notes:
        logger.warning("%s: %s", path, note)
    return RunFiles(
        path=path,
        result=result,
        config=config or {},
        pareto=tuple(pareto),
        progress=progress,
        answers=read_answers(path, result.best.text if result.best else None, elicit=result.goal == "elicit"),
        said=said,
        warnings=(*result.doubts, *notes),
    )


def read_result(path: Path) -> SearchRun:
    """What the metrics.json of a run's directory holds."""
    return SearchRun.from_json(read_json(path / files.METRICS, nan=True), str(path / files.METRICS))


def _said(path: Path, notes: list[str]) -> SaidFreely | None:
    """The free replies to the test questions, or where no test was run to the validation questions.

    Raises ``UserError`` where texts and questions do not go together.
    """
    whole = read_object(path)
    if whole is None:
        notes.append(f"{path.name} is missing: what the model wrote freely is not shown")
        return None
    split = "test" if "test" in whole else "validation"
    said = SaidFreely.from_json(whole.get(split), f"{path}.{split}")
    for at, one in enumerate(said.prompts):
        if {len(one.texts), len(one.chose)} != {len(said.questions)}:
            raise UserError(
                f"{path}.{split}.prompts[{at}] holds {len(one.texts)} texts and {len(one.chose)} choices, expected one "
                f"for each of {len(said.questions)} questions"
            )
    return said


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is no file. Raises ``UserError`` for a damaged one."""
    return read_json(path, nan=True) if path.exists() else None


def is_run(directory: Path) -> bool:
    """Whether a directory holds a finished run."""
    return "prompts" in (read_object(directory / files.METRICS) or {})


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; a last line that does not parse is left out with a note."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return []
    rows, cut = read_log(path)
    if cut:
        notes.append(f"the last line of {path.name} is cut and was left out: the run was ended while writing")
    return rows
