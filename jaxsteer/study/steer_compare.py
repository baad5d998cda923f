"""``compare``: steering vectors of one persona by every method, at equal disturbance of neutral text.

Train questions make the vectors. On validation questions a site is chosen for each method, the one where a push of the
asked disturbance does most for the goal. Test questions give rates, free replies and steerability, once.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.evals.calibration import neutral_rows
from jaxsteer.evals.choice import choice_eval, distinct, first_rows, rate
from jaxsteer.evals.free_answers import written_rates
from jaxsteer.files import append_text, read_log
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites
from jaxsteer.models.sites import resid_site
from jaxsteer.personas import Persona, check_cues, load_persona, number_of_questions, split
from jaxsteer.personas.signatures import own_site
from jaxsteer.personas.written_persona import ready
from jaxsteer.prompts import Placement
from jaxsteer.ranges import Positive, Range, Seed, as_tuple, check_ranges, must_be
from jaxsteer.runs import files
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.folder import RunFolder, opened
from jaxsteer.sae import SAE, load_sae, require_same_model
from jaxsteer.steer import Vectors, load_vectors, save_vectors
from jaxsteer.study.compared_vectors import Bench, chosen, measured
from jaxsteer.study.comparison import ComparedVector, Comparison
from jaxsteer.study.free_replies import free_replies
from jaxsteer.study.objective_stage import Say
from jaxsteer.study.outcome import environment
from jaxsteer.study.results import Timing
from jaxsteer.study.setting import context_items
from jaxsteer.study.vector_methods import (
    CONTROLS,
    LEARNED,
    METHODS,
    Method,
    ReadPosition,
    VectorOptions,
    diagnosed,
    examples_of,
    make_vectors,
)

log = logging.getLogger(__name__)

VECTORS, ROWS_FILE, FIGURE, TABLE_FILE = "vectors", "vectors.jsonl", "effect.png", "results.json"
VALIDATION = 24
"""Questions that choose a site."""


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
    draws: Annotated[int, Range(1, 64)] = 3
    """Of each control: vectors that differ in their seeds. Their spread is shown."""
    any_weights: bool = False
    """Use the SAE although it was trained on another model."""
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
        for field in ("methods", "sites", "also", "strengths"):
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
    def contenders(self) -> tuple[tuple[Method, int], ...]:
        """(method, draw) of every vector; what is no control is drawn once."""
        return tuple((m, draw) for m in self.compared for draw in range(self.draws if m in CONTROLS else 1))

    @property
    def both_signs(self) -> tuple[float, ...]:
        """Strengths of both signs, without 0."""
        sizes = sorted({1.0, *self.strengths})
        return (*(-size for size in reversed(sizes)), *sizes)


def compare(options: CompareOptions, *, model: Model | None = None, say: Say = log.info) -> Comparison:
    """Make every method's vector, bring all to the same disturbance, and measure them with both signs.

    Writes each method's vector file, its row as it comes, the result into metrics.json and the page's table into
    results.json (``jaxsteer report``). Raises ``UserError`` before any expensive work for options that cannot work.
    """
    must_be(options, CompareOptions, "options")
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
        try:
            result = _compared(options, folder, persona, others, model, say)
        except UserError as error:
            if not isinstance(error, OSError) and not any(row.pushes for row in _known_rows(folder.path / ROWS_FILE)):
                folder.withdraw()  # nothing was measured, and the same options would be refused again
            raise
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
    sites = _sites(options, model)
    persona = ready(model, persona, options.goal, folder.path, say, quiet=options.quiet)
    others = {name: ready(model, one, persona.goal, None, say, quiet=options.quiet) for name, one in others.items()}
    sae = None if options.sae is None else load_sae(options.sae, mesh=model.mesh)
    if sae is not None:
        require_same_model(sae, model, any_weights=options.any_weights)
        own_site(model, sae)  # refused here, before anything is written
    folder.begin()
    bench = _bench(options, model, persona, others, sae)
    if {*LEARNED} & {*options.compared}:
        examples_of(model, bench.train, bench.placement)  # refused before the others are measured
    say(
        f"Comparison: {len(options.compared)} methods x {len(sites)} sites at {options.kl:g} nats of disturbance, "
        f"{len(bench.train)} train, {number_of_questions(bench.validation)} validation and "
        f"{number_of_questions(bench.test)} test questions"
    )
    rows = {(row.method, row.draw or 0): row for row in _known_rows(folder.path / ROWS_FILE)}
    files.write_lines(folder.path / ROWS_FILE, (row.to_json() for row in rows.values()))
    vectors: dict[tuple[Method, int], Vectors] = {}
    for one in options.contenders:
        name = f"{one[0]} {one[1] + 1}" if one[1] else one[0]
        file = folder.path / VECTORS / f"{name.replace(' ', '_')}.safetensors"
        with progress_bar(f"vectors: {name}", quiet=options.quiet) as advance:
            if one not in rows or not file.is_file():
                state = folder.path / f"{name}.state.safetensors"
                tell = lambda done, total, loss, advance=advance: advance(done, total, loss=f"{loss:.3f}")  # noqa: E731
                made = _vectors(options, bench, *one, sites, state, tell)
                save_vectors(chosen(bench, made), file)
            vectors[one] = load_vectors(file, model=model)
        if one not in rows:
            with progress_bar(f"measure: {name}", quiet=options.quiet) as advance:
                rows[one] = measured(bench, *one, vectors[one], vectors.get(("mean difference", 0)), advance)
            append_text(folder.path / ROWS_FILE, files.line(rows[one].to_json()))
    _require_pushes(options, [rows[one] for one in options.contenders])
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
        vectors=tuple(rows[one] for one in options.contenders),
        questions=number_of_questions(bench.test),
        neutral_tokens=sum(map(len, bench.neutral)),
        timing=Timing(sweep_s=time.perf_counter() - started),
        environment=environment(model),
    )


def _sites(options: CompareOptions, model: Model) -> tuple[str, ...]:
    """Names of the sites: of the stream or of what is added to it, and all of one kind, because vectors are learned
    and measured side by side."""
    if not options.sites:
        depth = model.config.n_layers
        third = sorted({min(depth - 2, max(0, round(depth * share) - 1)) for share in (1 / 3, 1 / 2, 2 / 3)})
        return tuple(map(resid_site, third))
    found = direction_sites(model, options.sites)
    if len(kinds := {site.kind for site in found}) > 1:
        raise UserError(
            f"--sites are of several kinds ({', '.join(sorted(kinds))}), but a comparison chooses among the layers of "
            "one kind: give them to a command each, with an --out of its own"
        )
    return tuple(site.name for site in found)


def _require_pushes(options: CompareOptions, rows: Sequence[ComparedVector]) -> None:
    """Raise ``UserError`` where no vector reaches the disturbance at all: there is nothing to compare."""
    if any(row.pushes for row in rows):
        return
    most, name = max((one.kl, row.name) for row in rows for one in row.unreached)
    raise UserError(
        f"--kl {options.kl:g}: none of these vectors reaches so many nats at any strength; the most is {most:.2g}, by "
        f"{name}. Ask for less"
    )


def _bench(
    options: CompareOptions, model: Model, persona: Persona, others: dict[str, Persona], sae: SAE | None
) -> Bench:
    parts = split(persona, seed=options.split_seed)
    placement = Placement(style=options.style)
    test = context_items(distinct(parts.test), options.questions)
    with progress_bar("without steering", quiet=options.quiet) as advance:
        (baseline,) = choice_eval(model, test, [""], placement=placement, progress=advance)
    with progress_bar("neutral replies", quiet=options.quiet):
        free = free_replies(model, parts.train, parts.validation)
    bench = Bench(
        kl=options.kl,
        strengths=options.both_signs,
        placement=placement,
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
        sae=sae,
    )
    with progress_bar("free replies without steering", quiet=options.quiet):
        return dataclasses.replace(bench, said=bench.written(None))


def _vectors(
    options: CompareOptions, bench: Bench, method: Method, draw: int, sites: Sequence[str], state: Path, progress: Any
) -> list[Vectors]:
    seed = int(np.random.default_rng([options.seed, draw]).integers(2**31)) if method in CONTROLS else options.seed
    how = VectorOptions(
        read_position=options.read_position, epochs=options.epochs, tokens=options.tokens,
        seed=seed, placement=bench.placement, sae=bench.sae, any_weights=options.any_weights,
    )  # fmt: skip
    made = make_vectors(
        bench.model, bench.persona, bench.train, method, sites, options=how, state=state, progress=progress
    )
    return diagnosed(bench.model, bench.persona, bench.validation, made, how)


def _known_rows(path: Path) -> list[ComparedVector]:
    """What a comparison had measured when it was cut off."""
    lines, cut = read_log(path) if path.is_file() else ([], False)
    if cut:
        log.warning("%s: a line was cut; that method is measured again", path)
    return [ComparedVector.from_json(line, str(path)) for line in lines]
