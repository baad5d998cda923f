"""``run``: what carries the effect of vectors, or of a prompt, on a persona (2604.08524), in a directory that resumes.

1. Effects: the metric in the base run, under the push, and under random pushes of equal size.
2. Patch maps: every head and MLP from the pushed run, exactly.
3. Edges: EAP-IG, of the push and of a random one.
4. Circuits of several sizes: faithfulness, complement, and a band of random circuits.
5. Freezing: patterns, queries and keys, values, attention, MLPs; in scoring, by layer, and while replies are written.
6. For vectors: words of the value vectors and their ablation; sparse vectors.
7. With several vectors: what their circuits have in common.

Every stage is a file of ``stages/``, written whole; long stages keep their rows, a few at a time, beside it until it is
there. What was cut off goes on behind the last whole file, and gives the same bytes. metrics.json comes last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxsteer.circuits.circuit import greedy_edges, pruned
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.overlap import Overlap, overlap
from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.circuits.study_plan import told_plan
from jaxsteer.circuits.study_pushes import make_bench, prompt_push, vector_push
from jaxsteer.circuits.study_questions import Questions, ask_questions
from jaxsteer.circuits.study_result import Circuits, CircuitStudy, Effect, Grid, PushStudy, Scored
from jaxsteer.circuits.study_setting import Push, digest
from jaxsteer.circuits.study_stages import (
    Bench,
    Keep,
    Part,
    SaidTable,
    Scores,
    StaysTable,
    freeze_parts,
    measure_circuits,
    patch_grid,
    score_edges,
    score_runs,
    write_replies,
)
from jaxsteer.circuits.study_unexplained import unexplained
from jaxsteer.circuits.study_vectors import LevelTable, ValueWords, sparse_vectors, value_words
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files import make_directory, read_json
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.personas import load_persona
from jaxsteer.processes import from_first, is_first
from jaxsteer.ranges import check_ranges
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.files import PROGRESS, append_line, document, write_json
from jaxsteer.runs.folder import RunFolder, opened
from jaxsteer.statistics import ratio_draws
from jaxsteer.steer import Vectors, load_vectors

log = logging.getLogger(__name__)

STAGES = "stages"
TOP_EDGES, TOP_NODES = 200, 40
"""Scores that the result holds; those of all edges are in the stage's file."""
ALIKE = 0.05
"""Share of all edges, the greedy circuits of which are compared."""
R = TypeVar("R", bound=Record)


def run(
    model: str | Model,
    vectors: Mapping[str, Vectors] | Sequence[str | Path] = (),
    persona: str = "refusal",
    *,
    options: CircuitOptions | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] = log.info,
    **changed: Any,
) -> CircuitStudy:
    """What carries the effect of ``vectors`` (vector files, or ``Vectors`` by name), or of a prompt, on a persona.

    ``changed`` are fields of ``options``, ``prompt`` among them. ``persona`` is a choice persona, a character in words,
    or refusal, as ``load_persona`` takes it; test questions are used, and validation questions where something is
    chosen. ``out`` is a directory for all stages (docs/run-files.md): the same call, cut off, goes on there and gives
    the same files. ``say`` takes the plan of the work, in words, before it begins.

    Raises ``UserError`` before anything is written for vectors and a prompt together or neither, vectors that do not
    fit, a metric that is not finite, and a push without any effect.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(CircuitOptions)], "option of circuits.study.run")
    chosen = dataclasses.replace(options or CircuitOptions(), **changed)
    check_ranges(chosen)
    given = _given(vectors, chosen)
    whom = load_persona(persona)
    config = {
        "kind": "circuits",
        "model": model if isinstance(model, str) else [model.name, model.fingerprint],
        "vectors": {name: digest(one) for name, one in given.items()},
        "persona": [persona, whom.data_hash],
        **dataclasses.asdict(chosen),
    }
    with contextlib.ExitStack() as held:
        place = Path(held.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        folder = held.enter_context(opened(place, config, say))
        if folder.finished is not None:
            return CircuitStudy.read(folder.path)
        ready = load(model) if isinstance(model, str) else model
        pushes = [vector_push(ready, one, name, chosen) for name, one in given.items()]
        questions = ask_questions(ready, whom, pushes, chosen, folder.path, say)
        pushes = pushes or [prompt_push(ready, questions, chosen)]
        benches = [make_bench(ready, push, questions, chosen) for push in pushes]
        say(told_plan(benches))
        return _studied(folder, benches, questions, persona, chosen, say)


def _given(vectors: Mapping[str, Vectors] | Sequence[str | Path], options: CircuitOptions) -> dict[str, Vectors]:
    """Vectors by name. Raises ``UserError`` for none without a prompt, and for both."""
    if bool(vectors) == bool(options.prompt.strip()):
        raise UserError(
            "a study of circuits is of vectors or of a prompt: give --steer FILE ... or --prompt TEXT"
            + (", not both" if vectors else "")
        )
    return dict(vectors) if isinstance(vectors, Mapping) else load_each(vectors)


def load_each(files: Sequence[str | Path], site: str | None = None) -> dict[str, Vectors]:
    """The vectors of files by name, at ``site`` or at the one that each names (that its run chose).

    Raises ``UserError`` as ``load_vectors`` and ``Vectors.at``, and for a file that is given twice.
    """
    paths = [Path(one) for one in files]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path.with_suffix("")) for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"a vector file is given twice: {', '.join(map(str, paths))}")
    found = {name: load_vectors(path) for name, path in zip(names, paths, strict=True)}
    chosen = {name: site or one.metadata.get("site") for name, one in found.items()}
    return {name: one if chosen[name] is None else one.at(str(chosen[name])) for name, one in found.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kept:
    """Stages of one push, each in a file."""

    folder: Path
    name: str

    def stage(self, name: str, kind: type[R], make: Callable[[Callable[..., None]], R]) -> R:
        """What the stage found: from its file, or made now and written."""
        path = self.folder / f"{name}.json"
        if from_first(path.is_file):
            return kind.from_json(read_json(path, nan=True), str(path))
        began = time.monotonic()
        with progress_bar(f"{self.name}: {name}", unit="row") as advance:
            found = make(advance)
        text = document(found.to_json())
        write_json(path, found.to_json())
        seconds = round(time.monotonic() - began, 1)
        append_line(self.folder.parent.parent / PROGRESS, {"push": self.name, "stage": name, "seconds": seconds})
        if is_first():
            shutil.rmtree(self._parts(name), ignore_errors=True)
        return kind.from_json(json.loads(text), str(path))

    def parts(self, name: str) -> Keep:
        """What keeps the parts of a stage, each in a file, until the stage's own is written."""

        def keep(part: str, make: Callable[[], Part]) -> Part:
            path = self._parts(name) / f"{part}.json"
            if from_first(path.is_file):
                return Part.from_json(read_json(path, nan=True), str(path))
            found = make()
            if is_first():
                make_directory(path.parent)
            write_json(path, found.to_json())
            return found

        return keep

    def _parts(self, name: str) -> Path:
        return self.folder / f"{name}.parts"


def _studied(
    folder: RunFolder,
    benches: Sequence[Bench],
    questions: Questions,
    persona: str,
    options: CircuitOptions,
    say: Callable[[str], None],
) -> CircuitStudy:
    """All stages of all pushes."""
    before = []
    for number, bench in enumerate(benches):  # refuse what has no effect before any long stage
        path = folder.path / STAGES / f"{number}"
        scores = score_runs(bench, questions.alone, lambda *_: None) if not path.is_dir() else None
        if scores is not None:
            _require_effect(bench, scores)
        before.append((path, scores))
    folder.begin()
    pushes, scored = [], []
    for bench, (path, scores) in zip(benches, before, strict=True):
        if is_first():
            make_directory(path)
        kept = _Kept(folder=path, name=bench.push.name)
        known = kept.stage("effects", Scores, partial(_scored, bench, questions, scores))
        study, edges = _push_study(bench, kept, known, questions)
        pushes.append(study)
        scored.append((bench, *edges))
        say(f"{bench.push.name}: done")
    first = benches[0]
    result = CircuitStudy(
        model=first.model.name, fingerprint=first.model.fingerprint, persona=persona, goal=questions.persona.goal,
        metric=options.metric, told=questions.told(options), prompt=options.prompt,
        filler=questions.filler_text, questions=tuple(item.question for item in questions.test),
        flipped=options.flipped, pushes=tuple(pushes), overlap=_alike(scored, options),
        cosines=_cosines([bench.push for bench in benches]), seed=options.seed,
    )  # fmt: skip
    folder.finish(result)
    return result


def _scored(bench: Bench, questions: Questions, scores: Scores | None, advance: Callable[..., None]) -> Scores:
    return score_runs(bench, questions.alone, advance) if scores is None else scores


def _require_effect(bench: Bench, scores: Scores) -> None:
    change = (np.asarray(scores.pushed) - np.asarray(scores.base)) @ bench.task.weights * bench.task.factor
    if abs(change) < 1e-6:
        raise UserError(
            f"{bench.push.name} changes the metric by {change:.2g} nats in the mean over questions: there is no effect "
            "to explain. Push more strongly, or ask for another persona"
        )


def _push_study(
    bench: Bench, kept: _Kept, scores: Scores, questions: Questions
) -> tuple[PushStudy, tuple[EdgeScores, EdgeScores]]:
    heads, mlps = (
        kept.stage(name, Grid, partial(patch_grid, bench, kind, kept.parts(name)))
        for name, kind in (("heads", "attn.hook_z"), ("mlps", "hook_mlp_out"))
    )
    found = kept.stage("edges", EdgeScores, lambda _: score_edges(bench, bench.source))
    control = kept.stage("edges-random", EdgeScores, lambda _: score_edges(bench, bench.controls[0]))
    circuits = kept.stage(
        "circuits", Circuits, partial(measure_circuits, bench, found, control, kept.parts("circuits"))
    )
    frozen = kept.stage("frozen", StaysTable, lambda advance: freeze_parts(bench, advance))
    by_layer = StaysTable(lines=())
    if bench.options.layer_questions and len(bench.blocks) > 1:
        by_layer = kept.stage("layers", StaysTable, lambda advance: freeze_parts(bench, advance, by_layer=True))
    said = kept.stage(
        "replies", SaidTable, lambda advance: write_replies(bench, questions.shown, questions.groups, advance)
    )
    words: ValueWords | None = None
    levels: LevelTable | None = None
    if bench.push.vectors is not None:
        words = kept.stage("words", ValueWords, lambda _: value_words(bench, scores))
        levels = kept.stage("sparse", LevelTable, lambda advance: sparse_vectors(bench, scores, advance))
    whole, push = found.target - found.base, bench.push
    through = 1 - next(line.share for line in frozen.lines if line.what == "values")
    explained = None if words is None or abs(through) < 0.02 else (1 - words.ablated.share) / through
    study = PushStudy(
        name=push.name, label=push.label, site=push.site, start=push.start,
        norm=None if push.vectors is None else push.vectors.norm(push.site),
        rows=len(bench.task.rows.tokens), readings=int(bench.task.rows.readings.sum()),
        effects=_effects(bench, scores, questions), heads=heads, mlps=mlps,
        edges=_largest(found.names, found.values, control.values, whole, TOP_EDGES),
        nodes=_largest(found.graph.writers, found.nodes, control.nodes, whole, TOP_NODES),
        completeness=found.completeness, method=f"{found.method}, {found.steps} steps, {found.rule}", circuits=circuits,
        frozen=frozen.lines, by_layer=by_layer.lines, generated=said.lines,
        words=None if words is None else words.words, control_words=None if words is None else words.control,
        ablated=None if words is None else words.ablated, explained=explained,
        dimensions=None if levels is None else levels.dimensions, sparsity=() if levels is None else levels.lines,
        unexplained=(),
    )  # fmt: skip
    return dataclasses.replace(study, unexplained=unexplained(study)), (found, control)


def _effects(bench: Bench, scores: Scores, questions: Questions) -> tuple[Effect, ...]:
    """Changes in the mean over questions, with intervals."""
    task = bench.task
    names = ["base", "pushed", *(f"random {i + 1}" for i in range(len(scores.controls)))]
    rows = [scores.base, scores.pushed, *scores.controls]
    return tuple(_effect(task, name, scores.base, row) for name, row in zip(names, rows, strict=True)) + (
        () if not scores.plain else (_effect(task, "no prompt", scores.base, scores.plain),)
    )


def _effect(task: Any, name: str, base: Sequence[float], row: Sequence[float]) -> Effect:
    change, metric = np.asarray(row) - np.asarray(base), np.asarray(row) @ task.weights * task.factor
    drawn = ratio_draws((change * task.weights)[:, None], task.weights, task.groups)[:, 0] * task.factor
    low, high = np.percentile(drawn, [2.5, 97.5])
    total = float(change @ task.weights * task.factor)
    return Effect(name=name, metric=float(metric), change=total, ci95=(float(low), float(high)))


def _largest(
    names: Sequence[str], values: Sequence[float], control: Sequence[float], whole: float, count: int
) -> tuple[Scored, ...]:
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    return tuple(Scored(name=names[i], share=values[i] / whole, control=control[i] / whole) for i in order)


def _alike(scored: Sequence[tuple[Bench, EdgeScores, EdgeScores]], options: CircuitOptions) -> Overlap | None:
    """Greedy circuits of all vectors, and of the first one's random push; None for one, or for different graphs."""
    if len(scored) < 2 or len({found.graph for _, found, _ in scored}) > 1:
        return None
    every = {bench.push.name: found for bench, found, _ in scored} | {"random push": scored[0][2]}
    graph = scored[0][1].graph
    count = max(1, round(ALIKE * graph.n_edges))
    circuits = {name: pruned(graph, greedy_edges(found, count, end=options.end)) for name, found in every.items()}
    circuits = {name: edges for name, edges in circuits.items() if edges.any()}
    if len(circuits) < 2:
        return None
    return overlap(graph, circuits, {name: every[name] for name in circuits}, seed=options.seed)


def _cosines(pushes: Sequence[Push]) -> dict[str, float]:
    found = {}
    for a, b in itertools.combinations([push for push in pushes if push.vectors is not None], 2):
        if a.site == b.site and a.vectors is not None and b.vectors is not None:
            x, y = (one.vectors.arrays[one.site].astype(np.float64) for one in (a, b) if one.vectors is not None)
            found[f"{a.name}, {b.name}"] = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return found
