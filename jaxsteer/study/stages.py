"""The stages that every search goes through, in their order; ``dispatch.run`` puts them together.

1. ``load_model``: the model, on one device or spread over several.
2. ``setting.prepare``: questions become contexts with an open slot, and what cannot work is refused
   (``persona_setting`` does both).
3. ``objective_stage.choose_objective``: direction or signature, its site and its sign.
4. ``search``: objectives in the units of the search, one problem per population, and the search, saved as it goes.
5. ``conclude``: what was found is scored again from its text, measured on questions, and written.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import make_mesh
from jaxsteer.objectives import Objective
from jaxsteer.personas import Persona, load_persona, save_direction, save_signature
from jaxsteer.personas.written_persona import ready
from jaxsteer.processes import is_first
from jaxsteer.prompt_search import (
    FLUENCY,
    Hooks,
    Problem,
    Progress,
    Resources,
    SearchResult,
    Store,
    Task,
    make_problem,
    run_search,
    standardise,
)
from jaxsteer.prompt_search.algorithms.probe_sampling import Draft, PairedObjective, with_draft
from jaxsteer.prompt_search.compiling import require_problems
from jaxsteer.prompt_search.constraints import text_filter
from jaxsteer.prompts import Slots
from jaxsteer.runs import files
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.folder import GO_ON, RunFolder
from jaxsteer.runs.result import Unfinished
from jaxsteer.sae import load_sae
from jaxsteer.study.algorithm import AlgorithmOptions
from jaxsteer.study.initial_prompts import spread
from jaxsteer.study.latent_explanation import explain_latents
from jaxsteer.study.named_objectives import named_objective
from jaxsteer.study.objective_stage import ChosenObjective, Say, choose_objective, require_cues, task_of, try_objective
from jaxsteer.study.options import ModelOptions, RunOptions, SearchOptions
from jaxsteer.study.outcome import check_judge, environment, evaluate, finals
from jaxsteer.study.results import Prompt, SearchRun, Timing, Units
from jaxsteer.study.setting import PersonaSetting, Setting, prepare
from jaxsteer.study.soft_outcome import KEEP, finish_soft

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """What tells one population from the others that raise the same objective."""

    fluency: str
    seed: int
    restart: int = 0
    """Number of the repetition with this seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ascent:
    """An objective, and the populations that raise it independently."""

    objective: Objective
    """In its own units."""
    populations: tuple[Population, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
    """What the populations of one objective found."""

    result: SearchResult
    """Only of populations that were searched: an interrupted search has fewer."""
    objective: Objective
    """In the units of the search."""
    units: Units


def restarts(algorithm: AlgorithmOptions) -> tuple[Population, ...]:
    """One population for every restart."""
    populations = range(algorithm.restarts)
    return tuple(Population(fluency=algorithm.fluency, seed=algorithm.seed, restart=i) for i in populations)


def load_model(options: ModelOptions, *, parallel: bool, quiet: bool = False) -> Model:
    """The model. Several problems are spread over the devices that there are, and so are weights that are split; else
    it stays on one."""
    spread = options.mesh_model > 1 or (parallel and jax.device_count() > 1)
    mesh = make_mesh(model=options.mesh_model) if spread else None
    return load(options.model, quiet=quiet, dtype=options.dtype, mesh=mesh)


def persona_setting(
    options: SearchOptions, *, persona: Persona | None = None, model: Model | None = None, say: Say = log.info
) -> PersonaSetting:
    """The first two stages: the model, and the persona's questions as contexts. ``options`` are resolved.

    ``persona`` and ``model`` save loading them again. Raises ``UserError`` for what cannot be searched.
    """
    objective = options.objective
    named = named_objective(objective.objective, objective.target, relative=objective.relative)
    persona = persona or load_persona(options.contexts.persona)
    check_judge(options.report, persona)
    require_cues(persona, options.contexts.read_position, objective)
    model = model or load_model(options.model, parallel=options.algorithm.restarts > 1, quiet=options.run.quiet)
    persona = ready(model, persona, options.contexts.goal, Path(options.run.out), say, quiet=options.run.quiet)
    sae = load_sae(objective.sae, mesh=model.mesh) if objective.sae else None
    with progress_bar("contexts", quiet=options.run.quiet):
        setting = prepare(options.contexts, options.scoring, options.prompt, model, persona, named, sae)
        try_objective(setting, objective)
    return setting


def load_draft(options: SearchOptions, setting: PersonaSetting, say: Say) -> tuple[Setting, Objective] | None:
    """The same questions asked of ``--draft MODEL``, if one was given, and the objective there.

    Its direction is made from the same train questions and read at the site that its own probe chooses; an objective by
    name is that of the draft's own logits. Raises ``UserError`` for a draft of another tokenizer.
    """
    name, seed = options.algorithm.draft, options.algorithm.seed
    if name is None:
        return None
    if setting.sae is not None:
        raise UserError("--draft has no sparse autoencoder to read: use it with --method resga or with --objective")
    model = load(name, quiet=options.run.quiet, dtype=options.model.dtype, mesh=setting.model.mesh)
    lengths = f"{setting.least}:{setting.slots.length}"
    prompt = dataclasses.replace(options.prompt, prompt_length=lengths, init=None, init_from=None)
    beside = prepare(options.contexts, options.scoring, prompt, model, setting.persona, setting.named)
    same = len(model.tokenizer) == len(setting.model.tokenizer) and all(
        a.tolist() == b.tolist() for a, b in zip(beside.slots.before, setting.slots.before, strict=True)
    )
    if not same:
        raise UserError(f"--draft {name} has another tokenizer than {options.model.model}: give a model that shares it")
    probe = options.objective.probe
    anywhere = dataclasses.replace(options.objective, site="auto", probe="auto" if probe == "off" else probe)
    budget = rows_scored(options, setting.slots, options.algorithm.restarts)
    return beside, choose_objective(beside, anywhere, seed=seed, say=say, run=options.run, budget=budget).objective


def rows_scored(options: SearchOptions, contexts: Slots, populations: int) -> int:
    """Rows that a search scores: every candidate in every context."""
    algorithm = options.algorithm
    return (algorithm.steps or 0) * algorithm.make_search().candidates * populations * len(contexts)


def search(
    setting: Setting,
    ascents: Sequence[Ascent],
    algorithm: AlgorithmOptions,
    run: RunOptions,
    *,
    group: int | None = None,
    draft: tuple[Setting, Objective] | None = None,
    say: Say = log.info,
) -> list[Searched]:
    """Search all populations of all ascents as one program; returns what was found, ascent by ascent.

    What is needed to go on is kept in ``run.out``, for every ``group`` of a run that has several. ``draft`` is a
    second model's contexts and objective, for probe sampling with one ascent. Raises ``UserError`` as ``run_search``.
    """
    task = task_of(setting, ascents[0].objective)
    distinct = {id(ascent.objective): ascent.objective for ascent in ascents}
    with progress_bar("units of the objective", quiet=run.quiet):
        units = {number: in_units(setting, task, raw, algorithm) for number, raw in distinct.items()}
    scaled = [units[id(ascent.objective)] for ascent in ascents]
    raised = [objective for objective, _ in scaled]
    if draft is not None:
        other = task_of(*draft)
        task = with_draft(task, Draft(params=draft[0].model.params, task=other))
        raised = [PairedObjective(target=raised[0], draft=in_units(draft[0], other, draft[1], algorithm)[0])]
    every = [(goal, each) for ascent, goal in zip(ascents, raised, strict=True) for each in ascent.populations]
    one = _problem(setting, *every[0], algorithm)
    require_problems(len(every), setting.model.params, task, one, algorithm.make_search())
    problems = [one, *(_problem(setting, *each, algorithm) for each in every[1:])]
    result = _searched(setting, task, problems, algorithm, run, group, say)
    found, first = [], 0
    for ascent, (objective, numbers) in zip(ascents, scaled, strict=True):
        part = result.of(range(first, first := first + len(ascent.populations)))
        found.append(Searched(result=part, objective=objective, units=numbers))
    return found


def in_units(setting: Setting, task: Task, raw: Objective, algorithm: AlgorithmOptions) -> tuple[Objective, Units]:
    """The objective in the units that were asked for, and these units."""
    standard, numbers = standardise(setting.model.params, task, raw, seed=algorithm.seed)
    name = "raw" if algorithm.raw_units else "standard deviations over random prompts"
    units = Units(name=name, offset=numbers["offset"], scale=numbers["scale"], samples=int(numbers["samples"]))
    return raw if algorithm.raw_units else standard, units


def _problem(setting: Setting, objective: Objective, population: Population, algorithm: AlgorithmOptions) -> Problem:
    size = algorithm.config.population
    return make_problem(
        objective,
        size,
        fluency=FLUENCY[population.fluency],
        seed=population.seed,
        restart=population.restart,
        ids=None if setting.start is None else spread(setting.start, size),
    )


def _searched(
    setting: Setting,
    task: Task,
    problems: Sequence[Problem],
    algorithm: AlgorithmOptions,
    run: RunOptions,
    group: int | None,
    say: Say,
) -> SearchResult:
    model, how = setting.model, algorithm.make_search()
    lengths = f"{task.least} to {task.length}" if task.varies else task.length
    say(
        f"Search: {algorithm.steps} steps of {how.candidates * len(problems)} prompts of {lengths} tokens, each scored "
        f"in {task.contexts} contexts"
    )
    state = Path(run.out) / files.STATE
    state = state if group is None else state / str(group)
    with (
        progress_of(run, algorithm.steps or 0, group) as report,
        Store(state, every_s=run.save_every, resume=run.resume) as store,
    ):
        result = run_search(
            model.params,
            task,
            problems,
            how,
            steps=algorithm.steps or 0,
            hooks=Hooks(
                valid=text_filter(model.tokenizer, setting.slots, setting.banned),
                callback=report,
                keep=KEEP.get(algorithm.algorithm),
                say=say,
            ),
            resources=Resources(mesh=model.mesh, memory_gib=run.memory_gib),
            store=store,
        )
    if result.interrupted:
        say(f"Interrupted after {result.steps} steps: going on with what was found")
    return result


@contextmanager
def progress_of(run: RunOptions, steps: int, group: int | None) -> Iterator[Callable[[Progress], None]]:
    """A callback that writes progress.jsonl, with the ``group`` in its rows if there are several, and moves a bar.

    Rows of the same search that are already there stay, up to the checkpoint from which it goes on.
    """
    path, first = Path(run.out) / files.PROGRESS, True
    named = {} if group is None else {"group": group}
    what = "search" if group is None else f"group {group}"
    with progress_bar(what, steps, unit="step", quiet=run.quiet) as advance:

        def report(progress: Progress) -> None:
            nonlocal first
            if first:
                files.write_lines(path, [row for row in files.read_lines(path) if stays(row, progress)])
            first = False
            files.append_line(path, {**named, **dataclasses.asdict(progress)})
            advance(progress.step, best=f"{float(np.max(progress.best_target)):.2f}")

        def stays(row: dict[str, Any], progress: Progress) -> bool:
            return row.get("group") != group or (run.resume and row["candidates"] < progress.candidates)

        yield report


def conclude(
    folder: RunFolder,
    options: SearchOptions,
    setting: PersonaSetting,
    chosen: ChosenObjective,
    found: Searched,
    timing: dict[str, float],
    say: Say,
) -> SearchRun:
    """Measure on the persona's questions what a search found, and write everything but config.json.

    ``timing`` is what the stages before took.
    """
    row = chosen.row
    sign = {"objective_sign": str(row.sign)}
    if chosen.direction is not None and is_first():
        metadata = {**chosen.direction.metadata, "site": row.site, **sign}
        save_direction(dataclasses.replace(chosen.direction, metadata=metadata), folder.path / files.DIRECTION)
    if chosen.signature is not None and is_first():
        metadata = {**chosen.signature.metadata, **sign}
        save_signature(dataclasses.replace(chosen.signature, metadata=metadata), folder.path / files.SIGNATURE)

    def measure(prompts: Sequence[Prompt]) -> dict[str, Any]:
        rates = evaluate(setting, prompts, options.report, options.run, seed=options.algorithm.seed, say=say)
        signature = soft = None
        if setting.sae is not None and chosen.signature is not None:
            best = None if rates.selected is None else rates.prompts[rates.selected]
            text, ids = (None, ()) if best is None else (best.text, best.ids)
            with progress_bar("latents", quiet=options.run.quiet):
                signature = explain_latents(setting, setting.sae, chosen.signature, text, ids)
        if options.algorithm.algorithm == "soft":
            with progress_bar("soft prompts", quiet=options.run.quiet):
                soft = finish_soft(setting, found.result.kept, folder.path)
        return {
            "persona": setting.persona.name,
            "sign": row.sign,
            "probe_correlation": None if chosen.probe is None else row.correlation,
            "probe_ci95": row.ci95,
            "probe": chosen.probe,
            "splits": setting.splits.questions,
            "baseline": rates.baseline,
            "controls": rates.controls,
            "prompts": rates.prompts,
            "selected": rates.selected,
            "selected_by": rates.selected_by,
            "goal": None if setting.persona.goal == "reduce" else setting.persona.goal,
            "reply_reader": rates.reply_reader,
            "failure": rates.failure,
            "signature": signature,
            "soft": soft,
        }

    return write_results(folder, options, setting, row.site, found, timing, measure)


def write_results(
    folder: RunFolder,
    options: SearchOptions,
    setting: Setting,
    site: str,
    found: Searched,
    timing: dict[str, float],
    measure: Callable[[Sequence[Prompt]], dict[str, Any]],
) -> SearchRun:
    """Score the frontier from its text, and write it with the fields of the result that ``measure`` gives.

    Raises ``Unfinished`` where these name a ``failure``: then the run's metrics are not written.
    """
    model, result = setting.model, found.result
    started = time.perf_counter()
    with progress_bar("scoring what was found", quiet=options.run.quiet):
        prompts = finals(setting, found.objective, result)
    files.write_lines(folder.path / files.PARETO, (prompt.to_json() for prompt in prompts))
    measured = measure(prompts)
    failure = measured.pop("failure", None)
    run = SearchRun(
        model=model.name,
        fingerprint=model.fingerprint,
        method=options.objective.method,
        site=site,
        seed=options.algorithm.seed,
        read_position=setting.read_position,
        target_units="raw" if options.algorithm.raw_units else "sd",
        objective_units=found.units,
        plan=result.plan,
        interrupted=result.interrupted,
        **measured,
        timing=Timing(
            **timing,  # type: ignore[arg-type]
            compile_s=result.compile_s,
            search_s=result.search_s,
            eval_s=time.perf_counter() - started,
            candidates=result.candidates,
            candidates_per_s=result.candidates / result.search_s if result.search_s else 0.0,
            steps=result.steps,
        ),
        environment=environment(model),
    )
    if failure is not None:
        kept = f"What was found and judged is kept in {folder.path}: {GO_ON}."
        raise Unfinished(str(failure), run, kept) from failure
    folder.finish(run)
    return run


@contextmanager
def timed(timing: dict[str, float], name: str) -> Iterator[None]:
    """Note in ``timing`` how many seconds the body took."""
    started = time.perf_counter()
    yield
    timing[name] = time.perf_counter() - started
