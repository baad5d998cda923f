"""How far texts lie along an axis: conversations, replies and plain texts, by token, by turn and as a whole.

What is read is the model as it is, whoever wrote the text and under whatever edits. So a conversation has the same
projection from a live chat and from a file, and one that was written under a cap can be compared with one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.display import aligned, decimals, short
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, parse_json, write_text
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.reading import BATCH, direction_sites, read_along
from jaxsteer.models.sites import parse_site, resid_site
from jaxsteer.models.taps import Intervention
from jaxsteer.personas.passages import Passage, Span, encode_passage
from jaxsteer.processes import is_first
from jaxsteer.ranges import CountFrom0, as_tuple
from jaxsteer.runs import files
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.result import Result
from jaxsteer.steer.vectors import Vectors, check_vectors, load_vectors

AXIS = "axis.safetensors"
"""The axis in the directory of `axis run`."""
DEFAULT_PROJECTION, ROLES_PROJECTION, CALIBRATION = "default_projection", "roles_projection", "calibration"
"""Keys of the axis file's metadata, JSON by site: mean projections of the default's rollouts and of the roles' (the
mean of their means), and percentiles of the default's."""
CONVERSATIONS, TURNS, WHOLES = "projections.jsonl", "turns.csv", "conversations.csv"
SNIPPET = 120
"""Letters of a turn that are written beside its numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnProjection(Record):
    """One assistant turn, or a plain text."""

    turn: CountFrom0
    """Number of the message, from 0."""
    text: str
    """How it begins."""
    tokens: CountFrom0
    """Content tokens that the mean is over."""
    along: Mapping[str, float]
    """By site: mean of <h, u> over its tokens, u the unit vector of the axis; in units of the stream."""
    position: Mapping[str, float]
    """The same from 0, where the mean of the roles lies, to 1, where the default does; empty where the axis does not
    know the two."""
    pieces: tuple[str, ...] = ()
    """Its tokens as texts, where they were asked for."""
    each: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """By site: the projection of each, in units of the stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassageProjection(Record):
    """One conversation, reply or text."""

    id: str
    group: str = ""
    turns: tuple[TurnProjection, ...]

    def along(self, site: str) -> float:
        """Mean over the content tokens of all its turns."""
        return self._mean([turn.along[site] for turn in self.turns])

    def position(self, site: str) -> float | None:
        """The same as position; None where it is not known."""
        known = [turn.position.get(site) for turn in self.turns]
        return self._mean([one for one in known if one is not None]) if None not in known else None

    def _mean(self, values: Sequence[float]) -> float:
        return float(np.average(values, weights=[turn.tokens for turn in self.turns]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projections(Result):
    """Texts on an axis."""

    model: str
    axis: str
    """What going along it means."""
    sites: tuple[str, ...]
    passages: tuple[PassageProjection, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per turn and site."""
        return [
            {
                "id": passage.id, "group": passage.group, "turn": turn.turn, "site": site, "tokens": turn.tokens,
                "along": turn.along[site], "position": turn.position.get(site), "text": turn.text,
            }
            for passage in self.passages
            for turn in passage.turns
            for site in self.sites
        ]  # fmt: skip

    def wholes(self) -> list[dict[str, Any]]:
        """One row per passage and site."""
        return [
            {
                "id": passage.id, "group": passage.group, "site": site, "turns": len(passage.turns),
                "tokens": sum(turn.tokens for turn in passage.turns), "along": passage.along(site),
                "position": passage.position(site),
            }
            for passage in self.passages
            for site in self.sites
        ]  # fmt: skip

    def table(self, most: int = 20) -> str:
        """Mean and spread of every group at every site, and the passages at both ends of the first."""
        rows = [("group", "site", "n", "along", "standard deviation", "position")]
        for group in sorted({passage.group for passage in self.passages}):
            own = [passage for passage in self.passages if passage.group == group]
            for site in self.sites:
                values, positions = [p.along(site) for p in own], [p.position(site) for p in own]
                known = [one for one in positions if one is not None]
                mean = float(np.mean(known)) if known else None
                spread = float(np.std(values))
                cells = (f"{np.mean(values):.4g}", f"{spread:.4g}", decimals(mean))
                rows.append((group or "(all)", site, str(len(own)), *cells))
        site = self.sites[0]
        order = sorted(self.passages, key=lambda passage: passage.along(site))
        ends = order if len(order) <= most else [*order[: most // 2], *order[-most // 2 :]]
        listed = [("lowest first", "along", "position", "begins")]
        for passage in ends:
            along, position = f"{passage.along(site):.4g}", decimals(passage.position(site))
            listed.append((short(passage.id, 30), along, position, short(passage.turns[0].text, 50)))
        note = (
            f"Mean over the assistant's content tokens of the projection on the unit vector, in units of the stream; "
            f"position: 0 is the mean of the roles, 1 the default. {self.axis}"
        )
        return f"{aligned(rows, left=(0, 1))}\n\n{site}:\n{aligned(listed, left=(0, 3), note=note)}"

    def write(self, folder: Path) -> None:
        """projections.jsonl (a conversation a line), turns.csv and conversations.csv in a folder, which is made."""
        make_directory(folder)
        files.write_lines(folder / CONVERSATIONS, [passage.to_json() for passage in self.passages])
        if is_first():
            for name, rows in ((TURNS, self.to_rows()), (WHOLES, self.wholes())):
                write_text(folder / name, as_csv(rows))


def project(
    model: Model,
    axis: Vectors,
    passages: Sequence[Passage],
    *,
    sites: str | Sequence[str] = (),
    tokens: bool = False,
    any_weights: bool = False,
) -> Projections:
    """Where ``passages`` lie on ``axis`` at ``sites`` (default: ``axis_sites``), as the model as it is reads them.

    The mean of a turn is over its content tokens, in float64, of float32 states; ``tokens`` keeps every one of them.
    Raises ``UserError`` for an axis that does not fit the model (``check_vectors``) or is zero, for no passages, and
    as ``encode_passage`` does.
    """
    names = axis_sites(axis, model, sites, any_weights=any_weights)
    rows = encoded(model, passages)
    values = along(model, [ids for ids, _ in rows], units(axis, names)[:, None], names)
    scales = {site: scale(axis, site) for site in names}
    found = []
    for passage, (ids, spans), own in zip(passages, rows, values, strict=True):
        turns = tuple(_turn(model, ids, span, names, own[:, 0], scales, tokens) for span in spans)
        found.append(PassageProjection(id=passage.id, group=passage.group, turns=turns))
    return Projections(model=model.name, axis=axis.sign, sites=names, passages=tuple(found))


def encoded(model: Model, passages: Sequence[Passage]) -> list[tuple[np.ndarray, tuple[Span, ...]]]:
    """Every passage in token space. Raises ``UserError`` for none, and as ``encode_passage`` does."""
    if not passages:
        raise UserError("no conversation was given: expected at least one")
    rows = []
    with progress_bar("conversations", len(passages), unit="conversation") as advance:
        for passage in passages:
            rows.append(encode_passage(model, passage))
            advance(len(rows))
    return rows


def along(
    model: Model,
    rows: Sequence[np.ndarray],
    vectors: Float[np.ndarray, "s k D"],
    sites: Sequence[str],
    *,
    edits: Intervention | None = None,
) -> list[Float[np.ndarray, "s k T"]]:
    """Inner products of the stream with k vectors per site at every token of every row, float64."""
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    done, size = 0, min(BATCH, bucket(len(rows), 8))  # few conversations, which may be long, fill no whole batch
    with progress_bar("reading", len(rows), unit="text") as advance:
        read = read_along(model, rows, vectors, direction_sites(model, sites), edits=edits, batch_size=size)
        for chunk, values in read:
            for at, number in enumerate(chunk):
                found[number] = values[:, :, at, : len(rows[number])].astype(np.float64)
            done += len(chunk)
            advance(done)
    return found


def axis_sites(
    axis: Vectors, model: Model, sites: str | Sequence[str] = (), *, any_weights: bool = False
) -> tuple[str, ...]:
    """Names of the sites that are read: those that are asked for, else the file's own "site", else the output of the
    block at half depth, as in the paper, else all of the file's.

    Raises ``UserError`` for an axis that does not fit the model, and for a site that it does not hold or where it is
    zero.
    """
    check_vectors(axis, model, any_weights=any_weights)
    asked = tuple(site for site in as_tuple(sites) if site)
    middle = resid_site(min(model.config.n_layers // 2, model.config.n_layers - 1))
    own = axis.metadata.get("site") or (middle if middle in axis.arrays else "")
    names = tuple(dict.fromkeys(parse_site(site).name for site in asked or as_tuple(own or axis.sites)))
    units(axis, names)
    return names


def units(axis: Vectors, sites: Sequence[str]) -> Float[np.ndarray, "s D"]:
    """The axis at each site, of length 1, float32. Raises ``UserError`` where there is none, or a zero."""
    held = axis.at(sites)
    for site in held.sites:
        if not held.norm(site):
            raise UserError(f"the axis at {site} is zero: nothing lies along it. Choose other sites")
    return np.stack([(a.astype(np.float64) / held.norm(site)).astype(np.float32) for site, a in held.arrays.items()])


def load_axis(path: str | os.PathLike[str]) -> Vectors:
    """The axis of a vector file, or of the directory of `axis run`. Raises ``UserError`` as ``load_vectors`` does."""
    path = Path(path)
    return load_vectors(path / AXIS if path.is_dir() else path)


def axis_hash(axis: Vectors) -> str:
    """sha256 of the arrays and of the metadata, which a file gives back in any order."""
    digest = hashlib.sha256(json.dumps(sorted(axis.metadata.items())).encode())
    for site, array in axis.arrays.items():
        digest.update(site.encode() + array.tobytes())
    return digest.hexdigest()


def scale(axis: Vectors, site: str) -> tuple[float, float] | None:
    """(projection of the mean of the roles, of the default) at a site, where the file says them and they differ."""
    found = [_by_site(axis, key).get(site) for key in (ROLES_PROJECTION, DEFAULT_PROJECTION)]
    ends = [float(one) for one in found if isinstance(one, int | float)]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] != ends[1] else None


def calibration(axis: Vectors, site: str) -> dict[float, float]:
    """Projections of the default's rollouts at a site by percentile; empty where the file says none."""
    found = _by_site(axis, CALIBRATION).get(site, {})
    return {float(name): float(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _by_site(axis: Vectors, key: str) -> dict[str, Any]:
    found = parse_json(axis.metadata.get(key, "{}"), key)
    if not isinstance(found, dict):
        raise UserError(f"the axis file is damaged: its {key} is no JSON object by site")
    return found


def _turn(
    model: Model,
    ids: np.ndarray,
    span: Span,
    sites: Sequence[str],
    values: Float[np.ndarray, "s T"],
    scales: Mapping[str, tuple[float, float] | None],
    tokens: bool,
) -> TurnProjection:
    means = {site: float(own[span.mask].mean()) for site, own in zip(sites, values, strict=True)}
    position = {s: (mean - ends[0]) / (ends[1] - ends[0]) for s, mean in means.items() if (ends := scales[s])}
    kept: dict[str, Any] = {}
    if tokens:
        decoded = model.tokenizer.batch_decode([[int(i)] for i in ids[span.mask]], clean_up_tokenization_spaces=False)
        each = {site: tuple(map(float, own[span.mask])) for site, own in zip(sites, values, strict=True)}
        kept = {"pieces": tuple(decoded), "each": each}
    return TurnProjection(
        turn=span.turn, text=span.text[:SNIPPET], tokens=int(span.mask.sum()), along=means, position=position, **kept
    )


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Flat rows as CSV, with the columns of all."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value
