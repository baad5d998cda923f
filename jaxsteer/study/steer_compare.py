"""``compare``: steering vectors of one persona by every method, at equal disturbance of neutral text.

Train questions make the vectors. On validation questions a site is chosen for each method, the one where a push of the
asked disturbance does most for the goal. Test questions give rates, free replies and steerability, once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.evals.calibration import Calibrated, calibrate, neutral_rows
from jaxsteer.evals.choice import ChoiceResult, choice_eval, distinct, first_rows, rate
from jaxsteer.evals.free_answers import WrittenResult, written_rates
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.evals.steerability import propensities, steer_each, steerability
from jaxsteer.files import append_text, read_log
from jaxsteer.models.model import Model
from jaxsteer.models.sites import find_sites, resid_site
from jaxsteer.personas import Item, Persona, check_cues, load_persona, number_of_questions, split
from jaxsteer.prompts import Placement
from jaxsteer.ranges import Positive, Range, Seed, as_tuple, check_ranges
from jaxsteer.runs import files
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.folder import RunFolder, opened
from jaxsteer.sae import SAE, load_sae
from jaxsteer.steer import Edits, Vectors, load_vectors, save_vectors
from jaxsteer.study.comparison import ComparedVector, Comparison, Push
from jaxsteer.study.free_replies import TEST_REPLIES, FreeReplies, free_replies
from jaxsteer.study.objective_stage import Say
from jaxsteer.study.outcome import environment
from jaxsteer.study.results import Timing
from jaxsteer.study.setting import context_items
from jaxsteer.study.vector_methods import (
    CONTROLS,
    METHODS,
    Method,
    ReadPosition,
    VectorOptions,
    diagnosed,
    make_vectors,
)
from jaxsteer.study.written_persona import ready

log = logging.getLogger(__name__)

VECTORS, ROWS_FILE, FIGURE, TABLE_FILE = "vectors", "vectors.jsonl", "effect.png", "results.json"
VALIDATION = 24
"""Questions that choose a site."""
PROMPT, SYSTEM = "Please keep it short.", "You are a helpful assistant who answers in plain words."
"""Other contexts: a sentence behind the question, and a system message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Which vectors to compare, and on what."""

    out: Path
    """Directory of the results. A comparison that was cut off there goes on; a finished one is kept."""
    model: str = "organism:llama"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    persona: str = "sycophancy"
    """Built-in name, a public dataset (`jaxsteer data list`) or the path of a dataset."""
    goal: Literal["reduce", "elicit"] | None = None
    """What is wanted: a site is chosen for it (default: the persona's own). Both signs are measured anyway."""
    methods: tuple[Method, ...] = METHODS
    """Methods; random and shuffled labels are controls."""
    sites: tuple[str, ...] = ()
    """Sites of which each method takes its best (default: the stream at 1/3, 1/2 and 2/3 of the depth)."""
    kl: Positive = 0.1
    """Divergence on neutral text at which methods are compared, nats per token."""
    strengths: tuple[Positive, ...] = (0.5, 1.0, 1.5)
    """Of the curve and of steerability, in units of the strength at that divergence; 1 is always among them."""
    read_position: ReadPosition | None = None
    """Where directions are read: as in search, in the mean over the answer, or where the reply begins, with the
    persona's role as system message and without (default: decision where the persona has cue sentences, role where it
    has one, response where its answers are replies, else matched)."""
    sae: str | None = None
    """An SAE of the stream: its latents steer, too (sta), at its site. organism:NAME, a directory or a hub id."""
    train: int = 48
    """Train questions that make the vectors."""
    questions: int = 60
    """Test questions."""
    epochs: int = 10
    """Of ntp and po."""
    tokens: Annotated[int, Range(1, 4096)] = 64
    """Of a reply, for ntp and po."""
    also: tuple[str, ...] = ()
    """Other personas or datasets on whose test questions steerability is measured too: data that the vectors have not
    seen."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    seed: Seed = 0
    """Of learned vectors and controls."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default float32 on CPU and the checkpoint's own elsewhere."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        """One text in the place of several is one, not its letters."""
        for field in ("methods", "sites", "also"):
            object.__setattr__(self, field, as_tuple(getattr(self, field)))

    def record(self) -> dict[str, Any]:
        """What config.json keeps: everything that decides the result, and no place of this machine."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("out", "quiet")}

    @property
    def compared(self) -> tuple[Method, ...]:
        """The methods, with sta before the controls where there is an SAE."""
        if self.sae is None or "sta" in self.methods:
            return self.methods
        controls = tuple(method for method in self.methods if method in CONTROLS)
        return (*(method for method in self.methods if method not in CONTROLS), "sta", *controls)

    @property
    def both_signs(self) -> tuple[float, ...]:
        """Strengths of both signs, without 0."""
        sizes = sorted({1.0, *self.strengths})
        return (*(-size for size in reversed(sizes)), *sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    """What every method is measured on."""

    options: CompareOptions
    model: Model
    persona: Persona
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    others: dict[str, tuple[Item, ...]]
    neutral: list[np.ndarray]
    baseline: ChoiceResult
    free: FreeReplies | None
    said: WrittenResult | None
    """What is written without steering."""
    sae: SAE | None

    @property
    def placement(self) -> Placement:
        return Placement(style=self.options.style)

    def written(self, edits: Edits | None) -> WrittenResult | None:
        """What is written freely under an edit, where answers are replies."""
        if self.free is None:
            return None
        few = self.test[:TEST_REPLIES]
        return self.free.written(self.model, few, [""], placement=self.placement, edits=edits)[0]


def compare(options: CompareOptions, *, model: Model | None = None, say: Say = log.info) -> Comparison:
    """Make every method's vector, bring all to the same disturbance, and measure them with both signs.

    Writes each method's vector file, its row as it comes, the result into metrics.json and the page's table into
    results.json (``jaxsteer report``). Raises ``UserError`` before any expensive work for options that cannot work.
    """
    check_ranges(options)
    for name in ("methods", "sites", "strengths", "also"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names a value twice: {' '.join(map(str, values))}")
    if not options.methods:
        raise UserError(f"--methods names none: give some of {', '.join(METHODS)}")
    if "sta" in options.methods and options.sae is None:
        raise UserError("--methods sta steers by latents of an SAE: give --sae")
    if unknown := sorted(set(options.methods) - {*METHODS, "sta"}):
        raise UserError(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(METHODS)} and sta")
    if model is not None and model.name != options.model:
        raise UserError(f"the model that is given is {model.name}, but options name {options.model}: name the same")
    persona = load_persona(options.persona)
    if options.read_position == "decision":
        check_cues(persona, "decision")
    if options.read_position == "role" and not persona.role:
        raise UserError(f"--read-position role needs a role, which persona {persona.name} does not have")
    others = {name: load_persona(name) for name in options.also}
    config = {"data_hash": persona.data_hash, **options.record(), "kind": "comparison"}
    with opened(options.out, config, say) as folder:
        if folder.finished is not None:
            return Comparison.from_json(folder.finished, str(folder.path / files.METRICS))
        result = _compared(options, folder, persona, others, model, say)
        files.write_json(folder.path / TABLE_FILE, result.page())
        folder.finish(result)
    return result


def _compared(
    options: CompareOptions,
    folder: RunFolder,
    persona: Persona,
    others: dict[str, Persona],
    model: Model | None,
    say: Say,
) -> Comparison:
    started = time.perf_counter()
    model = model or load(options.model, quiet=options.quiet, dtype=options.dtype)
    depth = model.config.n_layers
    third = sorted({min(depth - 2, max(0, round(depth * share) - 1)) for share in (1 / 3, 1 / 2, 2 / 3)})
    sites = tuple(find_sites(list(options.sites), model.config)) or tuple(map(resid_site, third))
    persona = ready(model, persona, options.goal, folder.path, say, quiet=options.quiet)
    others = {name: ready(model, one, persona.goal, None, say, quiet=options.quiet) for name, one in others.items()}
    folder.begin()
    bench = _bench(options, model, persona, others)
    say(
        f"Comparison: {len(options.compared)} methods x {len(sites)} sites at {options.kl:g} nats of disturbance, "
        f"{len(bench.train)} train, {number_of_questions(bench.validation)} validation and "
        f"{number_of_questions(bench.test)} test questions"
    )
    rows = _known_rows(folder.path / ROWS_FILE)
    files.write_lines(folder.path / ROWS_FILE, (row.to_json() for row in rows.values()))
    vectors: dict[str, Vectors] = {}
    for method in options.compared:
        file = folder.path / VECTORS / f"{method.replace(' ', '_')}.safetensors"
        with progress_bar(f"vectors: {method}", quiet=options.quiet) as advance:
            if method not in rows or not file.is_file():
                state = folder.path / f"{method}.state.safetensors"
                tell = lambda done, total, loss, advance=advance: advance(done, total, loss=f"{loss:.3f}")  # noqa: E731
                made = _vectors(bench, method, sites, state, tell)
                save_vectors(_chosen(bench, made), file)
            vectors[method] = load_vectors(file, model=model)
        if method not in rows:
            with progress_bar(f"measure: {method}", quiet=options.quiet) as advance:
                rows[method] = _measured(bench, method, vectors[method], vectors.get("mean difference"), advance)
            append_text(folder.path / ROWS_FILE, files.line(rows[method].to_json()))
    zero = rate(bench.baseline)
    said = None if bench.said is None else written_rates(bench.said, first_rows(bench.baseline, len(bench.said.ids)))
    return Comparison(
        model=model.name,
        fingerprint=model.fingerprint,
        persona=persona.name,
        goal=persona.goal,
        kl=options.kl,
        read_position=VectorOptions(read_position=options.read_position).position(persona),
        baseline=zero,
        baseline_replies=said,
        vectors=tuple(rows[method] for method in options.compared),
        questions=number_of_questions(bench.test),
        neutral_tokens=sum(map(len, bench.neutral)),
        timing=Timing(sweep_s=time.perf_counter() - started),
        environment=environment(model),
    )


def _bench(options: CompareOptions, model: Model, persona: Persona, others: dict[str, Persona]) -> _Bench:
    parts = split(persona, seed=options.split_seed)
    placement = Placement(style=options.style)
    test = context_items(distinct(parts.test), options.questions)
    with progress_bar("without steering", quiet=options.quiet) as advance:
        (baseline,) = choice_eval(model, test, [""], placement=placement, progress=advance)
    with progress_bar("neutral replies", quiet=options.quiet):
        free = free_replies(model, parts.train, parts.validation)
    bench = _Bench(
        options=options,
        model=model,
        persona=persona,
        train=context_items(distinct(parts.train), options.train),
        validation=context_items(distinct(parts.validation), VALIDATION),
        test=test,
        others={
            name: context_items(distinct(split(one, seed=options.split_seed).test), options.questions)
            for name, one in others.items()
        },
        neutral=neutral_rows(model, placement=placement),
        baseline=baseline,
        free=free,
        said=None,
        sae=None if options.sae is None else load_sae(options.sae, mesh=model.mesh),
    )
    with progress_bar("free replies without steering", quiet=options.quiet):
        return dataclasses.replace(bench, said=bench.written(None))


def _vectors(bench: _Bench, method: Method, sites: Sequence[str], state: Path, progress: Any) -> list[Vectors]:
    options = bench.options
    how = VectorOptions(
        read_position=options.read_position, epochs=options.epochs, tokens=options.tokens,
        seed=options.seed, placement=bench.placement, sae=bench.sae,
    )  # fmt: skip
    made = make_vectors(
        bench.model, bench.persona, bench.train, method, sites, options=how, state=state, progress=progress
    )
    return diagnosed(bench.model, bench.persona, bench.validation, made, how)


def _chosen(bench: _Bench, made: Sequence[Vectors]) -> Vectors:
    """The vector that does most for the goal on validation questions at the asked disturbance, with that strength."""
    sign = bench.persona.sign
    found = _calibrated(bench, made, [sign])
    if len(made) == 1:
        return dataclasses.replace(made[0], coefficient=abs(found[0].coefficient))
    edits = [one.edits(coefficient=c.coefficient) for one, c in zip(made, found, strict=True)]
    pushed, _ = propensities(
        choice_eval(bench.model, bench.validation, [""], placement=bench.placement, variants=edits)
    )
    best = int(np.argmin(sign * pushed.mean(-1)))
    return dataclasses.replace(made[best], coefficient=abs(found[best].coefficient))


def _calibrated(bench: _Bench, vectors: Sequence[Vectors], signs: Sequence[int]) -> list[Calibrated]:
    return calibrate(bench.model, vectors, bench.options.kl, signs=signs, placement=bench.placement)


def _measured(bench: _Bench, method: Method, vectors: Vectors, mean: Vectors | None, advance: Any) -> ComparedVector:
    """A method's row: pushes of both signs, steerability here and in other contexts, and what predicted it."""
    (site,), model, test = vectors.sites, bench.model, bench.test
    away, towards = (one.coefficient for one in _calibrated(bench, [vectors], [1, -1]))
    strengths = bench.options.both_signs
    coefficients = [s * (away if s > 0 else -towards) for s in strengths]
    edits = [vectors.edits(coefficient=c) for c in coefficients]
    results = choice_eval(model, test, [""], placement=bench.placement, variants=edits, progress=advance)
    effects = side_effects(model, bench.neutral, edits)
    pushes = []
    for s, c, kl, perplexity, edit, result in zip(
        strengths, coefficients, effects.kl, effects.perplexity, edits, results, strict=True
    ):
        said = bench.written(edit) if abs(s) == 1 else None
        replies = None if said is None else written_rates(said, first_rows(result, len(said.ids)), bench.said)
        pushes.append(
            Push(
                strength=s,
                coefficient=c,
                kl=float(kl),
                perplexity=float(perplexity),
                rate=rate(result, bench.baseline),
                replies=replies,
            )  # fmt: skip
        )
    whole, _ = propensities([*results, bench.baseline])
    facts = json.loads(vectors.metadata.get("diagnostics", "{}")).get(site, {})
    if mean is not None and mean.sites == vectors.sites:
        a, b = (one.arrays[site].astype(np.float64) for one in (vectors, mean))
        facts["cosine"] = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    contexts = {}
    each = functools.partial(steer_each, model, edits=[*edits, vectors.edits(coefficient=0.0)])
    places = {
        "with a sentence": (test, PROMPT, bench.placement),
        "with a system message": (test, SYSTEM, Placement(style=bench.options.style, slot="system")),
        **{f"on {name}": (items, "", bench.placement) for name, items in bench.others.items()},
    }
    if bench.options.style == "plain" or any(role == "system" for item in test for role, _ in item.before):
        del places["with a system message"]
    for name, (items, prompt, placement) in places.items():
        (margins,) = each(items=items, prompts=[prompt], placement=placement, progress=advance)
        contexts[name] = steerability(margins, [*strengths, 0.0])
    return ComparedVector(
        method=method,
        site=site,
        control=method in CONTROLS,
        predictors={name: float(value) for name, value in facts.items() if math.isfinite(value)},
        steerability=steerability(whole, [*strengths, 0.0]),
        contexts=contexts,
        pushes=tuple(pushes),
    )


def _known_rows(path: Path) -> dict[str, ComparedVector]:
    """By method, what a comparison had measured when it was cut off."""
    lines, cut = read_log(path) if path.is_file() else ([], False)
    if cut:
        log.warning("%s: a line was cut; that method is measured again", path)
    return {line["method"]: ComparedVector.from_json(line, str(path)) for line in lines}
