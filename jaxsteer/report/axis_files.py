"""The directory of an axis run, read for its page: the result, a few replies of every role, and what was done with the
axis in directories inside it (drift, caps, hold)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.axis import AxisResult, Transcript
from jaxsteer.axis.cap_result import CapResult
from jaxsteer.axis.drift import Drift
from jaxsteer.axis.hold_result import HoldResult
from jaxsteer.axis.pipeline import TRANSCRIPTS
from jaxsteer.display import visible
from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.files.paths import user_path
from jaxsteer.report.run_files import read_lines, read_object
from jaxsteer.runs.files import CONFIG, METRICS

logger = logging.getLogger(__name__)

REPLIES, LETTERS = 2, 300
"""Replies of a role on the page, and letters of each."""
PARTS: dict[str, type[Drift | CapResult | HoldResult]] = {"drift": Drift, "caps": CapResult, "hold": HoldResult}
"""What lies in directories inside that of the run, by the kind that config.json says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisFiles:
    """The directory of an axis run in memory."""

    path: Path
    result: AxisResult
    """metrics.json."""
    config: Mapping[str, Any]
    """config.json: the options."""
    replies: Mapping[str, tuple[tuple[str, str], ...]]
    """transcripts.jsonl: the first questions of each role, each with the beginning of the reply."""
    drifts: tuple[tuple[str, Drift], ...] = ()
    """By the directory they lie in."""
    caps: tuple[tuple[str, CapResult], ...] = ()
    holds: tuple[tuple[str, HoldResult], ...] = ()
    unfinished: tuple[str, ...] = ()
    """Directories inside this one whose work is not done."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before believing the numbers, in words."""


def is_axis(directory: str | Path) -> bool:
    """Whether a directory is that of ``jaxsteer axis run``."""
    return kind_of_run(user_path(directory)) == "axis"


def read_axis(directory: str | Path) -> AxisFiles:
    """Read the directory of ``jaxsteer axis run``, and of drift, caps and hold inside it.

    metrics.json must be there and whole, in this directory; without transcripts.jsonl the page has a warning and the
    replies that stand in the result. Raises ``UserError`` otherwise.
    """
    path, notes = user_path(directory), list[str]()
    result = AxisResult.read(path)
    replies = _replies(path / TRANSCRIPTS, result, notes)
    parts: dict[str, list[tuple[str, Any]]] = {kind: [] for kind in PARTS}
    unfinished = []
    for folder in sorted(one for one in path.iterdir() if one.is_dir()):
        kind = kind_of_run(folder)
        if kind in PARTS and not (folder / METRICS).is_file():
            unfinished.append(folder.name)
        elif kind in PARTS:
            found = PARTS[kind].from_json(read_json(folder / METRICS, nan=True), str(folder / METRICS))
            parts[kind].append((folder.name, found))
            if found.model != result.model:
                notes.append(f"{folder.name} is of another model, {visible(found.model)}")
    notes += [f"{visible(name)} is not finished: it is not on this page" for name in unfinished]
    for note in notes:
        logger.warning("%s: %s", path, note)
    return AxisFiles(
        path=path, result=result, config=read_object(path / CONFIG) or {}, replies=replies,
        drifts=tuple(parts["drift"]), caps=tuple(parts["caps"]), holds=tuple(parts["hold"]),
        unfinished=tuple(unfinished), warnings=(*result.doubts, *notes),
    )  # fmt: skip


def kind_of_run(path: Path) -> str | None:
    """What config.json says of a directory; None where there is none that can be read."""
    try:
        kind = (read_object(path / CONFIG) or {}).get("kind")
    except (UserError, OSError):
        return None
    return kind if isinstance(kind, str) else None


def _replies(path: Path, result: AxisResult, notes: list[str]) -> dict[str, tuple[tuple[str, str], ...]]:
    """(question, reply) of every place, to different questions; of judged rollouts those that were kept."""
    least = 0 if result.filter is None else result.filter.keep
    found: dict[str, list[tuple[str, str]]] = {place.name: [] for place in (result.default, *result.roles)}
    for at, row in enumerate(read_lines(path, notes), 1):
        some = found.get(str(row.get("role")))
        if some is None or len(some) == REPLIES:
            continue
        one = Transcript.from_json(row, f"{path}:{at}")
        kept = one.score is None or one.score >= least
        if kept and one.said.strip() and one.asked not in [asked for asked, _ in some]:
            some.append((cut(one.asked), cut(one.said)))
    return {name: tuple(some) for name, some in found.items()}


def cut(text: str) -> str:
    """The first ``LETTERS`` letters."""
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
