"""What caps do: to neutral text, to answers to ordinary questions, and to replies in roles, beside their controls.

Every condition writes replies of its own; all of them are read by the model as it is, so that a cap is not credited
with the projection that it sets. Edits of one structure run as one program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxsteer.axis.cap_result import ASSISTANT, CapResult, CapRow, Exchange
from jaxsteer.axis.caps import Calibration, calibrate_caps, cap_sites, mean_displacement
from jaxsteer.axis.drift import whole_projections
from jaxsteer.axis.pipeline import TRANSCRIPTS, VECTORS
from jaxsteer.axis.projection import axis_hash, axis_sites, load_axis, project, scale
from jaxsteer.axis.role_vectors import load_role_vectors
from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.evals.calibration import neutral_rows
from jaxsteer.evals.choice import choice_eval
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.scoring import same_form
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import load_persona
from jaxsteer.personas.passages import Passage, encode_passage, read_passages
from jaxsteer.processes import from_first, is_first
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import CountFrom0, Range, Seed, check_ranges
from jaxsteer.runs import files
from jaxsteer.runs.bars import behind, load, progress_bar
from jaxsteer.runs.folder import opened
from jaxsteer.runs.result import KEPT, Unfinished
from jaxsteer.statistics import rate_interval, student
from jaxsteer.steer.vectors import Vectors, check_vectors, random_arrays, save_vectors
from jaxsteer.study.measure import judge_config
from jaxsteer.writers.judge import judge, require_scores
from jaxsteer.writers.writer import Writer

CAPS, WRITTEN = "caps.safetensors", "written.jsonl"
"""Files of the directory: the caps, and replies as they come, a condition a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapOptions:
    """Which caps are made, which are tried beside them, and on what."""

    percentile: Annotated[float, Range(0, 100)] = 25.0
    """Of the calibration rollouts' projections: the caps that are written, and that controls stand beside."""
    percentiles: tuple[float, ...] = (1.0, 50.0, 75.0)
    """Other caps that are tried."""
    layers: tuple[CountFrom0, CountFrom0] | None = None
    """First and last block that is capped (default: 70 to 89 % of the depth, as in the paper)."""
    group: str = DEFAULT
    """Rollouts that caps are calibrated on: a role, "default", or "" for all."""
    strengths: tuple[float, ...] = ()
    """Also add the axis, and every random one, at its site by so many mean norms of the stream."""
    random: CountFrom0 = 2
    """Random axes of equal norm, capped by the same rule, and added where the axis is."""
    roles: CountFrom0 = 8
    """Roles that the model is asked to play, evenly from those that lie furthest from the default to the middle."""
    questions: int = 3
    """Asked of each."""
    max_new_tokens: int = 48
    """Longest reply."""
    ordinary: int = 32
    """Ordinary questions, at most."""
    dataset: str = ""
    """Also the share of questions of this persona's dataset that its answer wins."""
    items: int = 100
    """Questions of it, at most."""
    seed: Seed = 0
    """Seed of random axes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capping:
    """Caps and what they do."""

    caps: Vectors
    result: CapResult


def cap(
    model: str | Model,
    axis: str | Path | Vectors,
    rollouts: str | Path | Sequence[Passage] | None = None,
    *,
    pc2: Vectors | None = None,
    judge: Writer | None = None,
    out: str | Path | None = None,
    any_weights: bool = False,
    options: CapOptions | None = None,
    **changed: Any,
) -> Capping:
    """Calibrate caps along ``axis`` on ``rollouts``, and measure them beside random axes, ``pc2`` and an addition.

    ``rollouts`` are passages or a file (default: transcripts.jsonl of the directory of `axis run`, where ``axis`` is
    one), with the role of each as its group. ``judge`` says whether the Assistant speaks in the replies. ``out`` is a
    directory for caps.safetensors, for replies as they come and for the result (metrics.json): the same call, cut off,
    goes on there. ``changed`` are fields of ``options``.

    Raises ``UserError``, before a model is loaded, for options and files that do not exist; for rollouts that are too
    few, and an axis or rollouts that do not fit the model; and ``Unfinished`` when the judge gives no answer. Many
    parameters: the axis, what it is calibrated on, who judges, and where it is kept.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(CapOptions)], "option of cap")
    chosen = dataclasses.replace(options or CapOptions(), **changed)
    check_ranges(chosen)
    if rollouts is None:
        if isinstance(axis, Vectors) or not Path(axis).is_dir():
            raise UserError("caps are calibrated on rollouts: give a file of them, or the directory of `axis run`")
        rollouts = Path(axis) / TRANSCRIPTS
    passages = tuple(read_passages(rollouts)) if isinstance(rollouts, str | Path) else tuple(rollouts)
    vectors = axis if isinstance(axis, Vectors) else load_axis(axis)
    if pc2 is None and not isinstance(axis, Vectors) and (Path(axis) / VECTORS).is_file():
        pc2 = load_role_vectors(Path(axis) / VECTORS).component(2)
    config = {
        "kind": "caps",
        "model": model if isinstance(model, str) else [model.name, model.fingerprint],
        "axis": axis_hash(vectors), "pc2": pc2 and axis_hash(pc2),
        "rollouts": hashlib.sha256(repr([one.to_json() for one in passages]).encode()).hexdigest(),
        **{f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)},
        **judge_config(judge, ASSISTANT),
    }  # fmt: skip
    kept = None if out is None else Path(out)
    with contextlib.nullcontext() if kept is None else opened(kept, config, lambda _: None) as folder:
        if folder is not None and folder.finished is not None:
            return Capping(caps=load_axis(folder.path / CAPS), result=CapResult.from_json(folder.finished))
        ready = load(model) if isinstance(model, str) else model
        check_vectors(vectors, ready, any_weights=any_weights)
        (site,) = axis_sites(vectors, ready, any_weights=any_weights)
        cap_sites(ready, vectors, chosen.layers)
        if folder is not None:
            folder.begin()
        bench = _Bench(
            model=ready, axis=vectors, site=site, options=chosen, rollouts=passages, any_weights=any_weights, kept=kept
        )
        found = bench.measured(pc2)
        if kept is not None and is_first():
            save_vectors(found.caps, kept / CAPS)
        if judge is not None:
            found = dataclasses.replace(found, result=_judged(found.result, judge, kept))
        if folder is not None:
            folder.finish(found.result)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """A conversation of a role up to the reply."""

    role: str
    messages: tuple[Mapping[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    """What is measured, of every condition."""

    model: Model
    axis: Vectors
    site: str
    """Where replies are read."""
    options: CapOptions
    rollouts: tuple[Passage, ...]
    any_weights: bool
    kept: Path | None

    def measured(self, pc2: Vectors | None) -> Capping:
        """All conditions, the model as it is first."""
        calibration = self.calibration(self.axis)
        caps, asked = calibration.caps(self.axis, self.options.percentile), self.asked()
        conditions = self.conditions(calibration, caps, pc2, asked)
        edits = {name: vectors.edits() for name, vectors in conditions.items()}
        ordinary = neutral_texts(self.model)[: self.options.ordinary]
        written = self.written(edits, [one.messages for one in asked], ordinary)
        replies = {name: texts[: len(asked)] for name, texts in written.items()}
        answers = {name: texts[len(asked) :] for name, texts in written.items()}
        facts = self.side_effects(edits, ordinary, answers[""])
        shares, places = self.shares(edits), {name: self.places(asked, texts) for name, texts in replies.items()}
        rows = []
        for name in ("", *edits):
            moved = np.asarray([now != was for now, was in zip(answers[name], answers[""], strict=True)], float)
            changed: dict[str, Any] = {
                "changed": float(moved.mean()),
                "changed_ci95": rate_interval(moved, list(ordinary)),
            }
            rows.append(
                CapRow(
                    name=name, vectors=conditions[name].sign if name else "", **facts[name], **shares.get(name, {}),
                    **(changed if name else {}), **self.placed(asked, places[name], places[""] if name else None),
                    replies=replies[name], answers=answers[name],
                )
            )  # fmt: skip
        result = CapResult(
            model=self.model.name, axis=self.axis.sign, site=self.site, sites=caps.sites,
            percentile=self.options.percentile, calibrated_on=caps.metadata["calibrated_on"],
            asked=tuple(Exchange(role=one.role, question=one.messages[-1]["content"]) for one in asked),
            ordinary=tuple(ordinary), rows=tuple(rows),
        )  # fmt: skip
        return Capping(caps=caps, result=result)

    def calibration(self, axis: Vectors) -> Calibration:
        """Of caps along any axis: by the same rule."""
        options = self.options
        return calibrate_caps(
            self.model, axis, self.rollouts, layers=options.layers, group=options.group, any_weights=self.any_weights
        )

    def asked(self) -> list[_Asked]:
        """Questions to roles, from those whose rollouts lie furthest from the Assistant up to the middle."""
        others = [one for one in self.rollouts if one.group not in ("", DEFAULT) and one.messages]
        if not others or not self.options.roles:
            return []
        means: dict[str, list[float]] = {}
        for one, value in zip(others, whole_projections(self.model, self.axis, others, [self.site])[0], strict=True):
            means.setdefault(one.group, []).append(float(value))
        order = sorted(means, key=lambda role: float(np.mean(means[role])))
        lower = order[: max(min(self.options.roles, len(order)), len(order) // 2)]
        places = np.linspace(0, len(lower) - 1, min(self.options.roles, len(lower)))
        found = []
        for role in dict.fromkeys(lower[round(float(place))] for place in places):
            own: dict[str, _Asked] = {}
            for one in others:
                last = max(i for i, message in enumerate(one.messages) if message["role"] == "assistant")
                if one.group == role and last:
                    question = one.messages[last - 1]["content"]
                    own.setdefault(question, _Asked(role=role, messages=tuple(one.messages[:last])))
            found += list(own.values())[: self.options.questions]
        return found

    def conditions(
        self, calibration: Calibration, caps: Vectors, pc2: Vectors | None, asked: Sequence[_Asked]
    ) -> dict[str, Vectors]:
        """Vectors by the name of the condition."""
        options, site = self.options, self.site
        percentiles = sorted({options.percentile, *options.percentiles})
        found = {f"cap, percentile {p:g}": calibration.caps(self.axis, p) for p in percentiles}
        others = {} if pc2 is None else {"cap on PC2": pc2}
        random = {
            f"random axis {number + 1}": dataclasses.replace(
                self.axis, arrays=random_arrays(self.axis.arrays, options.seed * 1000 + number), sign="random"
            )
            for number in range(options.random)
        }
        others |= {f"cap on {name}": other for name, other in random.items()}
        found |= {name: self.calibration(other).caps(other, options.percentile) for name, other in others.items()}
        if asked:
            roles = {one.role for one in asked}
            own = [one for one in self.rollouts if one.group in roles][: 4 * len(asked)]
            addition = mean_displacement(self.model, caps, own)
            if any(array.any() for array in addition.arrays.values()):
                found["addition, equal mean"] = addition
        for strength in options.strengths:
            push: dict[str, Any] = {"operation": "add", "coefficient": strength, "coefficient_units": "mean_resid_norm"}
            for name, along in {"axis": self.axis, **random}.items():
                found[f"{name} x {strength:g}"] = dataclasses.replace(along.at(site), **push)
        return found

    def written(
        self, edits: Mapping[str, Intervention], chats: Sequence[Any], ordinary: Sequence[str]
    ) -> dict[str, tuple[str, ...]]:
        """Greedy replies to ``chats`` and then to ordinary questions, by condition; what is logged is not repeated."""
        log = None if self.kept is None else self.kept / WRITTEN
        lines = [] if log is None else from_first(lambda: files.resumed_lines(log))
        known = {str(line["condition"]): tuple(map(str, line["replies"])) for line in lines}
        every = [*map(list, chats), *([{"role": "user", "content": text}] for text in ordinary)]
        with progress_bar("replies", len(every) * (1 + len(edits)), unit="reply") as advance:
            for at, name in enumerate(("", *edits)):
                if name not in known:
                    made = generate(
                        self.model, every, temperature=0, max_new_tokens=self.options.max_new_tokens,
                        edits=edits.get(name), progress=partial(behind, advance, at * len(every)),
                    )  # fmt: skip
                    known[name] = tuple(text.strip() for text in made.texts)
                    if log is not None:
                        files.append_line(log, {"condition": name, "replies": known[name]})
                advance((at + 1) * len(every))
        return {name: known[name] for name in ("", *edits)}

    def side_effects(
        self, edits: Mapping[str, Intervention], ordinary: Sequence[str], answers: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Fields of every row: on neutral requests, and on the model's own answers to ordinary questions."""
        neutral, own = neutral_rows(self.model, ordinary), []
        for text, answer in zip(ordinary, answers, strict=True):
            if answer:
                said = (("user", text), ("assistant", answer))
                messages = tuple({"role": role, "content": content} for role, content in said)
                own.append(encode_passage(self.model, Passage(id=text, messages=messages)))
        masks = [spans[0].mask for _, spans in own]
        found: dict[str, dict[str, Any]] = {}
        with progress_bar("side effects", len(edits), unit="edit") as advance:
            for names in self.together(edits):
                variants = [edits[name] for name in names]
                plain = side_effects(self.model, neutral, variants)
                said_ = side_effects(self.model, [ids for ids, _ in own], variants, counted=masks) if own else None
                found[""] = {"perplexity": plain.baseline_perplexity}
                for i, name in enumerate(names):
                    facts = {"kl": float(plain.kl[i]), "perplexity": float(plain.perplexity[i])}
                    found[name] = facts | ({} if said_ is None else {"reply_kl": float(said_.kl[i])})
                advance(len(found) - 1)
        return found

    def together(self, edits: Mapping[str, Intervention]) -> list[list[str]]:
        """Names of the edits that run as one program."""
        names = list(edits)
        return [[names[i] for i in group] for group in same_form([edits[name] for name in names])]

    def shares(self, edits: Mapping[str, Intervention]) -> dict[str, dict[str, Any]]:
        """Of every row, the share of a dataset's questions that the persona's answer wins."""
        if not self.options.dataset:
            return {}
        items = load_persona(self.options.dataset).items[: self.options.items]
        found = {"": choice_eval(self.model, items, "")[0]}
        for names in self.together(edits):
            every = choice_eval(self.model, items, "", variants=[edits[name] for name in names])
            found |= dict(zip(names, every, strict=True))
        return {
            name: {"persona": float(r.persona.mean()), "persona_ci95": rate_interval(r.persona, list(r.groups))}
            for name, r in found.items()
        }

    def places(self, asked: Sequence[_Asked], replies: Sequence[str]) -> np.ndarray:
        """Projections of replies in roles, as the model as it is reads them; NaN for one without words."""
        whole = [
            Passage(id=f"{one.role} {i}", messages=(*one.messages, {"role": "assistant", "content": text}))
            for i, (one, text) in enumerate(zip(asked, replies, strict=True))
            if text
        ]
        values = np.full(len(asked), np.nan)
        if whole:
            at = [i for i, text in enumerate(replies) if text]
            values[at] = self.last_turns(whole)
        return values

    def last_turns(self, passages: Sequence[Passage]) -> np.ndarray:
        """Mean projection of the last assistant turn of each."""
        found = project(self.model, self.axis, passages, sites=self.site, any_weights=self.any_weights)
        return np.asarray([one.turns[-1].along[self.site] for one in found.passages])

    def placed(self, asked: Sequence[_Asked], values: np.ndarray, before: np.ndarray | None) -> dict[str, Any]:
        """Fields of a row: where replies in roles lie, and by how much they moved. The unit is the role."""
        if not len(values) or np.isnan(values).all():
            return {}
        zero, one = scale(self.axis, self.site) or (0.0, 1.0)
        known = scale(self.axis, self.site) is not None
        by_role = _by_role(asked, (values - zero) / (one - zero))
        fields: dict[str, Any] = {"along": float(np.nanmean(values))}
        if known:
            fields |= {"position": float(np.mean(by_role)), "position_ci95": student(by_role)}
        if before is not None:
            moved = _by_role(asked, (values - before) / (one - zero))
            fields |= {"moved": float(np.mean(moved)), "moved_ci95": student(moved)}
        return fields


def _by_role(asked: Sequence[_Asked], values: np.ndarray) -> np.ndarray:
    """The mean of every role, over its replies that have words."""
    roles = np.asarray([one.role for one in asked])
    own = [values[(roles == role) & ~np.isnan(values)] for role in dict.fromkeys(roles)]
    return np.asarray([some.mean() for some in own if len(some)])


def _judged(result: CapResult, writer: Writer, kept: Path | None) -> CapResult:
    """With what a judge says of every reply in a role. Raises ``Unfinished``, with what is there."""
    log, rows = None if kept is None else kept / files.JUDGED, list(result.rows)
    for at, row in enumerate(rows):
        facts = [
            {"question": one.question, "answer": text} for one, text in zip(result.asked, row.replies, strict=True)
        ]
        try:
            with progress_bar(f"judge, {at + 1} of {len(rows)}", unit="reply") as advance:
                found = judge(writer, ASSISTANT, facts, [one.role for one in result.asked], log=log, progress=advance)
            require_scores(found)
        except UserError as error:
            where = "" if log is None else KEPT.format(log.parent)
            raise Unfinished(str(error), dataclasses.replace(result, rows=tuple(rows)), where) from error
        rows[at] = dataclasses.replace(row, judged=found)
    return dataclasses.replace(result, rows=tuple(rows))
