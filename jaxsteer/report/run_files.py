"""The files of a run directory, read forgivingly where a run may have been cut and strictly everywhere else."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer import files
from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path

logger = logging.getLogger(__name__)

CORRELATION_WARNS = 0.5
"""Below this rank correlation an objective hardly ranks prompts as behaviour does."""
A_RATE_RANGE = (0.1, 0.9)
"""Outside of this range one answer letter wins whatever the question says."""
A_RATE_SHIFT = 0.25
"""An A-rate this far from the baseline's means the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory in memory; rows as they stand in the files."""

    path: Path
    metrics: dict[str, Any]
    config: dict[str, Any]
    pareto: list[dict[str, Any]]
    progress: list[dict[str, Any]]
    warnings: tuple[str, ...]
    """What a reader must know before believing the numbers, in words."""


def read_run(directory: str | Path) -> Run:
    """Read config.json, metrics.json, pareto.jsonl and progress.jsonl of ``directory``.

    metrics.json must be there and whole; the others may be missing, and the last line of a .jsonl file may be cut:
    both become warnings. Raises ``UserError`` otherwise.
    """
    path = user_path(directory)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give the output directory of a search")
    notes: list[str] = []
    metrics = read_json(path / "metrics.json")
    if metrics is None:
        raise UserError(f"{path} has no metrics.json: a report needs a finished run (or one that was ended by Ctrl-C)")
    config = read_json(path / "config.json")
    if config is None:
        notes.append("config.json is missing: the settings of this run are not known")
    pareto = read_lines(path / "pareto.jsonl", notes)
    pooled = config is not None and "pooled" in config  # the progress of many searches stands beside all of their runs
    progress = [] if pooled else read_lines(path / "progress.jsonl", notes)
    for note in notes:
        logger.warning("%s: %s", path, note)
    return Run(
        path=path,
        metrics=metrics,
        config=config or {},
        pareto=pareto,
        progress=progress,
        warnings=(*doubts(metrics), *notes),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is no file. Raises ``UserError`` for a damaged one."""
    return files.read_json(path, nan=True) if path.exists() else None


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; a last line that was cut is left out with a note."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return []
    rows, cut = files.read_log(path)
    if cut:
        notes.append(f"the last line of {path.name} is cut and was left out: the run was ended while writing")
    return rows


def doubts(metrics: Mapping[str, Any]) -> list[str]:
    """Reasons not to take the numbers of a run at face value."""
    found = [str(note) for note in metrics.get("warnings") or ()]
    if metrics.get("interrupted"):
        found.append("The search was interrupted before its last step; what it had found until then is reported.")
    correlation = number(metrics.get("probe_correlation"))
    if correlation is not None and correlation < CORRELATION_WARNS:
        found.append(
            f"The probe correlation is {correlation:.2f} (below {CORRELATION_WARNS}): at this site and read position "
            "the objective hardly ranks prompts as behaviour does."
        )
    base, prompt = split_rate(metrics.get("baseline"), "test"), selected(metrics)
    if prompt is not None:
        if prompt.get("retokenises") is False:
            found.append("The text of the selected prompt does not give back the token ids that were searched.")
        chosen = split_rate(prompt, "test") or split_rate(prompt, "validation")
        a_rate, usual = number((chosen or {}).get("a_rate")), number((base or {}).get("a_rate"))
        if a_rate is not None:
            shifted = usual is not None and abs(a_rate - usual) > A_RATE_SHIFT
            if not A_RATE_RANGE[0] <= a_rate <= A_RATE_RANGE[1] or shifted:
                found.append(
                    f"With the selected prompt the model answers (A) in {percent(a_rate)} of cases: the rate may "
                    "measure a preferred letter instead of the persona."
                )
    return list(dict.fromkeys(found))


def selected(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The prompt that the run reports, or None where it found none."""
    prompts, index = metrics.get("prompts") or [], metrics.get("selected")
    if isinstance(index, int) and 0 <= index < len(prompts):
        chosen: dict[str, Any] = prompts[index]
        return chosen
    return None


def split_rate(entry: Any, split: str) -> dict[str, Any] | None:
    """The rate record of ``entry`` on one split, if it was measured."""
    value = entry.get(split) if isinstance(entry, Mapping) else None
    return dict(value) if isinstance(value, Mapping) and number(value.get("rate")) is not None else None


def controls(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The controls of a run as rows with a "name", whether they were written as a list or as an object."""
    given = metrics.get("controls") or []
    if isinstance(given, Mapping):
        given = [{"name": name, **(row if isinstance(row, Mapping) else {})} for name, row in given.items()]
    rows = [dict(row) for row in given if isinstance(row, Mapping)]
    # A control may be one bare rate: it was measured on the test questions then.
    return [{**row, "test": row} if "rate" in row and "test" not in row else row for row in rows]


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: Any) -> str:
    """0.0625 as "6.2 %"; a dash where there is no number."""
    share = number(value)
    return "–" if share is None else f"{100 * share:.1f} %"


def decimals(value: Any, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where there is none."""
    given = number(value)
    return "–" if given is None else f"{given:.{digits}f}"


def compact(value: Any) -> str:
    """A number of any size in a few digits; a dash where there is none."""
    given = number(value)
    if given is None:
        return "–"
    return f"{given:.1f}" if abs(given) < 1000 else f"{given:,.0f}" if abs(given) < 1e6 else f"{given:.1e}"


def interval(rate: Mapping[str, Any] | None) -> str:
    """A rate with its 95 % interval: "6.2 % (3.1–11.9)"."""
    if rate is None:
        return "–"
    low_high = [number(end) for end in (rate.get("ci95") or (None, None))]
    if len(low_high) != 2 or low_high[0] is None or low_high[1] is None:
        return percent(rate.get("rate"))
    return f"{percent(rate.get('rate'))} ({100 * low_high[0]:.1f}–{100 * low_high[1]:.1f})"


def visible(text: Any) -> str:
    """``text`` with everything that does not print (newlines, escapes, direction marks) written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def named(value: Any) -> str:
    """A model, persona or method by its name, whether written as a string or as an object with a name."""
    if isinstance(value, Mapping):
        value = value.get("name", value.get("source", "?"))
    return visible("?" if value is None else value)
