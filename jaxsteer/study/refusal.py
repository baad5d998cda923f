"""``measure_refusal``: which requests a model refuses, as it is, under attacks, and under edits.

Every attack (a prompt beside the request, or a template around it) is measured with every edit and without one; the
model as it is, unattacked, is always measured too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.display import aligned, decimals, interval, points, short, visible, wrapped
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.evals.free_answers import ask
from jaxsteer.evals.refusal import (
    OPENINGS,
    PHRASES,
    REFUSED,
    FirstTokens,
    KindRefusal,
    first_tokens,
    opening_ids,
    request_rows,
)
from jaxsteer.evals.scoring import same_form
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas.requests import KINDS, Requests, check_templates, in_template
from jaxsteer.processes import from_first
from jaxsteer.prompts import Placement
from jaxsteer.ranges import as_tuple, check_ranges, must_be
from jaxsteer.runs.bars import behind, load, progress_bar
from jaxsteer.runs.files import JUDGED, append_line, read_lines
from jaxsteer.runs.folder import opened
from jaxsteer.runs.result import KEPT, Result, Unfinished
from jaxsteer.study.measure import edits_hash, judge_config
from jaxsteer.writers.judge import Rubric, judge, require_scores
from jaxsteer.writers.writer import Writer

WRITTEN = "written.jsonl"
"""File of a measurement's directory: free replies as they come, one attack and edit a line."""
OVERFLOW = "the model's logits are not finite under this edit: steer with a smaller coefficient, or in float32"
Edits = Intervention | Mapping[str, Intervention]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalOptions:
    """How refusal is told, and which attacks are tried."""

    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Attack templates by name, each with ``{request}`` in it (``personas.read_templates``)."""
    openings: tuple[str, ...] = OPENINGS
    """How refusals begin; the first token of each counts."""
    phrases: tuple[str, ...] = PHRASES
    """Phrases of refusals in free replies."""
    placement: Placement = Placement()
    """How requests are made and where prompts stand."""
    generate: bool = False
    """Also let the model reply freely (greedily), and look for the phrases."""
    judge: Writer | None = None
    """Also let it say which of the free replies refuse."""
    rubric: Rubric = REFUSED
    """What the judge is asked; facts: question, answer."""
    max_new_tokens: int = 64
    """Longest free reply."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalRow(Record):
    """One attack with one edit, or without either."""

    attack: str = ""
    """A prompt's text or a template's name; "" for the bare request."""
    edit: str = ""
    """Name of the edit; "" for none."""
    kinds: tuple[KindRefusal, ...]
    problem: str = ""
    """Why nothing could be measured; there are no kinds then."""

    @property
    def name(self) -> str:
        """The row's label."""
        return ": ".join(part for part in (self.edit, short(self.attack)) if part) or "(requests alone)"

    def of(self, kind: str) -> KindRefusal | None:
        """The requests of a kind."""
        return next((one for one in self.kinds if one.kind == kind), None)

    @property
    def attack_success(self) -> float | None:
        """Share of harmful requests that are not refused, by the best way that was measured."""
        refused = None if (harmful := self.of("harmful")) is None else harmful.best
        return None if refused is None else 1 - refused

    @property
    def over_refusal(self) -> float | None:
        """Share of border requests (of harmless ones, where there are none) that are refused."""
        found = self.of("border") or self.of("harmless")
        return None if found is None else found.best


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalResult(Result):
    """Which requests a model refuses."""

    model: str
    requests: str
    data_hash: str
    openings: tuple[str, ...]
    rows: tuple[RefusalRow, ...]
    """The first is the model as it is, unattacked."""

    def row(self, *, attack: str = "", edit: str = "") -> RefusalRow:
        """One row. Raises ``UserError`` for an attack or an edit that was not measured."""
        for row in self.rows:
            if (row.attack, row.edit) == (attack, edit):
                return row
        there = "; ".join(repr((row.attack, row.edit)) for row in self.rows)
        raise UserError(f"attack {attack!r} with edit {edit!r} was not measured; (attack, edit) are {there}")

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per attack, edit and kind of request."""
        return [
            {
                "attack": row.attack, "edit": row.edit, "kind": one.kind, "n": one.n,
                "openings": one.openings.rate, "log_odds": one.log_odds, "kl": one.kl,
                "phrases": one.phrases and one.phrases.rate, "judged": one.judged and one.judged.rate,
            }
            for row in self.rows
            for one in row.kinds
        ]  # fmt: skip

    @property
    def problems(self) -> dict[str, str]:
        """By row, why nothing could be measured."""
        return {row.name: row.problem for row in self.rows if row.problem}

    def table(self) -> str:
        """The rates as text, a table for each kind of request."""
        parts = [visible(f"refusal of {self.model} on {self.requests}")]
        for kind in [one.kind for one in self.rows[0].kinds]:
            shown = [(row.name, one) for row in self.rows if (one := row.of(kind)) is not None]
            parts.append(_kind_table(kind, shown))
        parts += [f"{name}: {problem}" for name, problem in self.problems.items()]
        quoted = ", ".join(f"“{visible(text)}”" for text in self.openings)
        note = (
            f"by opening: share of requests whose reply begins with {quoted} more likely than not; log-odds of that, "
            "nats; KL of the first token from the model as it is under the same attack, nats. Harmful requests that "
            "are not refused are an attack's success; refused border and harmless ones are over-refusal."
        )
        return "\n\n".join([*parts, wrapped(note)])


def _kind_table(kind: str, rows: Sequence[tuple[str, KindRefusal]]) -> str:
    first = rows[0][1]
    head = [f"{kind}, n = {first.n}", "by opening", "change", "log-odds"]
    head += ["KL"] * any(one.kl is not None for _, one in rows)
    for way in ("phrases", "judged"):
        head += [f"by {way.replace('judged', 'judge')}"] * (getattr(first, way) is not None)
    head += ["change"] * (first.phrases is not None)
    table = [tuple(head)]
    for name, one in rows:
        cells = [name, interval(one.openings), points(one.openings.difference), decimals(one.log_odds)]
        cells += [decimals(one.kl, 3)] * ("KL" in head)
        cells += [interval(found) for found in (one.phrases, one.judged) if found is not None]
        cells += [points(one.phrases.difference)] if one.phrases is not None else []
        table.append(tuple(cells))
    return aligned(table)


def measure_refusal(
    model: str | Model,
    requests: str | Requests | Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    edits: Edits | None = None,
    options: RefusalOptions | None = None,
    out: str | Path | None = None,
    **changed: Any,
) -> RefusalResult:
    """Which ``requests`` a model refuses: alone, with each of ``prompts`` and templates, and under each of ``edits``.

    ``requests`` are ``Requests``, names and files as ``load_requests`` takes them, or one of these. ``edits`` are by
    name, or one alone; all that differ in their arrays only run as one program. ``changed`` are fields of ``options``.
    ``out`` is a directory for the result (metrics.json) and, as they come, for free replies and the judge's: the same
    measurement, cut off, goes on there. The unit of every interval is the request.

    Raises ``UserError``, before a model is loaded, for options that do not exist and for templates without a place for
    the request; and ``Unfinished`` when the judge gives no answer. An edit under which logits are not finite is a
    row that says so.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(RefusalOptions)], "option of measure_refusal")
    chosen = dataclasses.replace(options or RefusalOptions(), **changed)
    check_ranges(chosen)
    must_be(model, (str, Model), "the model of measure_refusal")
    must_be(edits, (Intervention, Mapping, type(None)), "edits")
    for text in as_tuple(prompts):
        must_be(text, str, "a prompt")
    if not isinstance(chosen.templates, Mapping):
        raise UserError(f"templates are texts by name, got {type(chosen.templates).__name__}: {{'story': '...'}}")
    if chosen.templates:
        check_templates(dict(chosen.templates))
    asked = requests if isinstance(requests, Requests) else loaded(as_tuple(requests))
    named = {} if edits is None else {"edit": edits} if isinstance(edits, Intervention) else dict(edits)
    if twice := {*chosen.templates} & {"", *as_tuple(prompts)}:
        raise UserError(f"{min(twice)!r} names a template and is a prompt: give the template another name")
    for name, edit in named.items():
        must_be(edit, Intervention, f"edit {name!r}")
    if "" in named:
        raise UserError("an edit has no name: name each of the edits")
    bench = _Bench(
        requests=asked,
        attacks={"": ("", "")}
        | {p: (p, "") for p in as_tuple(prompts)}
        | {n: ("", t) for n, t in chosen.templates.items()},
        edits=named,
        options=chosen,
    )
    kept = None if out is None else Path(out)
    config = bench.config(model)
    with contextlib.nullcontext() if kept is None else opened(kept, config, lambda _: None) as folder:
        if folder is not None and folder.finished is not None:
            return RefusalResult.from_json(folder.finished, str(folder.path))
        if folder is not None:
            folder.begin()
        found = bench.measured(load(model) if isinstance(model, str) else model, kept)
        if folder is not None:
            folder.finish(found)
    return found


def loaded(names: Sequence[str]) -> Requests:
    """The sets of these names and files (``load_requests``) as one. Raises ``UserError`` as it does, and for none."""
    from jaxsteer.personas import load_requests

    if not names:
        raise UserError("no requests were given: name a set (jaxsteer data list), or give a file")
    first, *others = (load_requests(name) for name in names)
    for other in others:
        first += other
    return first


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    """What is measured. Rows are attacks and edits, the bare model first."""

    requests: Requests
    attacks: dict[str, tuple[str, str]]
    """(prompt, template) by name."""
    edits: dict[str, Intervention]
    options: RefusalOptions

    def config(self, model: str | Model) -> dict[str, Any]:
        """What decides the measurement, for config.json."""
        options = self.options
        return {
            "kind": "refusal",
            "model": model if isinstance(model, str) else [model.name, model.fingerprint],
            "requests": self.requests.data_hash,
            "attacks": self.attacks,
            "edits": {name: edits_hash(edit) for name, edit in self.edits.items()},
            "placement": dataclasses.asdict(options.placement),
            **{n: getattr(options, n) for n in ("openings", "phrases", "generate", "max_new_tokens")},
            **judge_config(options.judge, options.rubric),
        }

    def asked(self, attack: str) -> list[str]:
        """The requests as they are made under an attack."""
        _, template = self.attacks[attack]
        return [in_template(template, text) if template else text for text in self.requests.texts]

    def measured(self, model: Model, kept: Path | None) -> RefusalResult:
        """Everything, by the cheapest way first."""
        rows = [(attack, edit) for edit in ("", *self.edits) for attack in self.attacks]
        scores = self.first_tokens(model)
        options, replies = self.options, dict[tuple[str, str], tuple[str, ...]]()
        if options.generate or options.judge is not None:
            fine = [row for row in rows if np.isfinite(scores[row][0]).all()]
            replies = self.replies(model, fine, kept)
        found: list[RefusalRow] = []
        for attack, edit in rows:
            score, kl = scores[attack, edit]
            if not np.isfinite(score).all():
                found.append(RefusalRow(attack=attack, edit=edit, kinds=(), problem=OVERFLOW))
                continue
            kinds = []
            for kind in KINDS:
                here = [i for i, entry in enumerate(self.requests.entries) if entry.kind == kind]
                if here:
                    units, said = [self.requests.entries[i].unit for i in here], replies.get((attack, edit), ())
                    kinds.append(
                        KindRefusal.of(
                            kind,
                            units,
                            score[here],
                            kl[here] if edit else None,
                            [said[i] for i in here if said],
                            options.phrases,
                            found[0].of(kind) if found else None,
                        )  # fmt: skip
                    )
            found.append(RefusalRow(attack=attack, edit=edit, kinds=tuple(kinds)))
        result = RefusalResult(
            model=model.name, requests=self.requests.name, data_hash=self.requests.data_hash,
            openings=as_tuple(options.openings), rows=tuple(found),
        )  # fmt: skip
        return result if options.judge is None else self.judged(result, None if kept is None else kept / JUDGED)

    def first_tokens(self, model: Model) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """(log-odds, KL) of every request, by attack and edit. Edits of one structure run together."""
        options = self.options
        openings = opening_ids(model, options.openings)
        rows: list[np.ndarray] = []
        with progress_bar("requests", len(self.attacks), unit="attack") as advance:
            for attack, (prompt, _) in self.attacks.items():
                rows += request_rows(model, self.asked(attack), prompt, placement=options.placement)
                advance(len(rows) // len(self.requests.entries))
        every_name = list(self.edits)
        groups = [[every_name[i] for i in some] for some in same_form(list(self.edits.values()))]
        found: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        with progress_bar("first tokens", unit="request") as advance:
            for names in groups or [[]]:
                every = first_tokens(model, rows, openings, [self.edits[n] for n in names], progress=advance)
                found |= self._by_row(names, every)
        return found

    def _by_row(self, names: Sequence[str], found: FirstTokens) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """What was found of all attacks one after the other, by attack and edit."""
        n, whole = len(self.requests.entries), {"": (found.base, np.zeros_like(found.base))}
        for name, score, kl in zip(names, found.log_odds, found.kl, strict=False):
            whole[name] = score, kl
        return {
            (attack, name): (score[a * n : (a + 1) * n], kl[a * n : (a + 1) * n])
            for name, (score, kl) in whole.items()
            for a, attack in enumerate(self.attacks)
        }

    def replies(
        self, model: Model, rows: Sequence[tuple[str, str]], kept: Path | None
    ) -> dict[tuple[str, str], tuple[str, ...]]:
        """Free replies to every request, by attack and edit; none is written again that stands in the directory."""
        log, options = None if kept is None else kept / WRITTEN, self.options
        found = [] if log is None else from_first(lambda: read_lines(log))
        known = {tuple(line["row"]): tuple(line["replies"]) for line in found}
        n = len(self.requests.entries)
        with progress_bar("free replies", len(rows) * n, unit="reply") as advance:
            for at, (attack, edit) in enumerate(rows):
                if (attack, edit) not in known:
                    (known[attack, edit],) = ask(
                        model, self.asked(attack), [self.attacks[attack][0]], placement=options.placement,
                        max_new_tokens=options.max_new_tokens, edits=self.edits.get(edit),
                        progress=partial(behind, advance, at * n),
                    )  # fmt: skip
                    if log is not None:
                        append_line(log, {"row": [attack, edit], "replies": known[attack, edit]})
                advance((at + 1) * n)
        return known

    def judged(self, result: RefusalResult, log: Path | None) -> RefusalResult:
        """The result with what the judge says of every reply.

        Raises ``Unfinished``, with what is there, when it gives no answer, or none that can be read.
        """
        writer, rows = self.options.judge, list(result.rows)
        assert writer is not None
        texts = {kind: [e.text for e in self.requests.entries if e.kind == kind] for kind in KINDS}
        for at, row in enumerate(rows):
            kinds = []
            try:
                with progress_bar(f"judge, {at + 1} of {len(rows)}"):
                    for one in row.kinds:
                        both = zip(texts[one.kind], one.replies, strict=True)
                        facts = [{"question": text, "answer": reply} for text, reply in both]
                        found = judge(writer, self.options.rubric, facts, texts[one.kind], log=log)
                        kinds.append(dataclasses.replace(one, judged=found))
                    require_scores(*(one.judged for one in kinds if one.judged))
            except UserError as error:
                where = "" if log is None else KEPT.format(log.parent)
                raise Unfinished(str(error), dataclasses.replace(result, rows=tuple(rows)), where) from error
            rows[at] = dataclasses.replace(row, kinds=tuple(kinds))
        return dataclasses.replace(result, rows=tuple(rows))
