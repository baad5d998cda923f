"""The stages that every search goes through: load the model, search, measure what was found, write it.

The stages between the first two are in ``setting`` (contexts) and ``objective_stage`` (what is raised).
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxsteer.checkpoints.loading import load
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import make_mesh
from jaxsteer.objectives import Objective
from jaxsteer.personas import save_direction, save_signature
from jaxsteer.processes import is_first
from jaxsteer.prompt_search import (
    FLUENCY,
    Problem,
    Progress,
    SearchResult,
    Store,
    Task,
    make_problem,
    run_search,
    standardise,
)
from jaxsteer.prompt_search.constraints import text_filter
from jaxsteer.study import files
from jaxsteer.study.draft_model import drafted
from jaxsteer.study.initial_prompts import spread
from jaxsteer.study.latent_explanation import explained
from jaxsteer.study.objective_stage import Aim, Say, task_of
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.outcome import environment, evaluate, finals
from jaxsteer.study.setting import Setting
from jaxsteer.study.soft_outcome import KEEP, finish_soft

log = logging.getLogger(__name__)


def load_model(options: SearchOptions, *, parallel: bool) -> Model:
    """The model. Several problems are spread over the devices that there are, and so are weights that are split; else
    it stays on one."""
    spread = options.mesh_model > 1 or (parallel and jax.device_count() > 1)
    mesh = make_mesh(model=options.mesh_model) if spread else None
    return load(options.model, dtype=options.dtype, mesh=mesh)


def search(setting: Setting, raw: Objective, say: Say) -> tuple[SearchResult, Objective, dict[str, Any]]:
    """Search with all restarts; returns what was found, the objective in the units of the search, and those units."""
    options = setting.options
    task = task_of(setting, raw)
    objective, units = in_units(setting, task, raw)
    task, objective = drafted(setting, task, objective, say)
    problems = [problem_of(setting, objective, restart=i) for i in range(options.restarts)]
    with progress_of(options, "search") as report:
        result = search_problems(setting, task, problems, report, options.out / files.STATE, say)
    return result, objective, units


def in_units(setting: Setting, task: Task, raw: Objective) -> tuple[Objective, dict[str, Any]]:
    """The objective in the units that were asked for, and these units."""
    options = setting.options
    standard, numbers = standardise(setting.model.params, task, raw, seed=options.seed)
    name = "raw" if options.raw_units else "standard deviations over random prompts"
    return raw if options.raw_units else standard, {"name": name, **numbers}


def problem_of(setting: Setting, objective: Objective, *, restart: int) -> Problem:
    """One population of the setting's search."""
    options = setting.options
    population = options.make_search()[1]
    ids = None if setting.start is None else spread(setting.start, population)
    fluency = FLUENCY[options.fluency]
    return make_problem(objective, population, fluency=fluency, seed=options.seed, restart=restart, ids=ids)


def search_problems(
    setting: Setting,
    task: Task,
    problems: Sequence[Problem],
    report: Callable[[Progress], None],
    state: Path,
    say: Say,
) -> SearchResult:
    """Search all problems of one task; what is needed to go on is kept in the directory ``state``."""
    options, model = setting.options, setting.model
    algorithm, _ = options.make_search()
    say(
        f"Search: {options.steps} steps of {algorithm.candidates * len(problems)} prompts of "
        f"{f'{task.least} to ' * task.varies}{task.length} tokens, each scored in {task.contexts} contexts"
    )
    with Store(state, every_s=options.save_every, resume=options.resume) as store:
        result = run_search(
            model.params,
            task,
            problems,
            algorithm,
            steps=options.steps or 0,
            valid=text_filter(model.tokenizer, setting.slots, options.ban),
            callback=report,
            mesh=model.mesh,
            memory_gib=options.memory_gib,
            store=store,
            keep=KEEP.get(options.algorithm),
            say=say,
        )
    if result.interrupted:
        say(f"Interrupted after {result.steps} steps: going on with what was found")
    return result


@contextmanager
def progress_of(options: SearchOptions, what: str, **more: Any) -> Iterator[Callable[[Progress], None]]:
    """A callback that writes progress.jsonl, with what ``more`` adds to its rows, and moves a bar.

    Rows of the same search that are already there stay, up to the checkpoint from which it goes on.
    """
    path, first = options.out / files.PROGRESS, True
    with tqdm(total=options.steps, desc=what, unit="step", disable=options.quiet or not is_first(), leave=False) as bar:

        def report(progress: Progress) -> None:
            nonlocal first
            if first:
                files.write_lines(path, [row for row in files.read_lines(path) if stays(row, progress)])
            first = False
            files.append_line(path, {**more, **dataclasses.asdict(progress)})
            bar.update(progress.step - bar.n)
            bar.set_postfix(best=f"{float(np.max(progress.best_target)):.2f}", refresh=False)

        def stays(row: dict[str, Any], progress: Progress) -> bool:
            if any(row.get(name) != value for name, value in more.items()):
                return True
            return options.resume and row["candidates"] < progress.candidates

        yield report


def conclude(
    setting: Setting,
    aim: Aim,
    result: SearchResult,
    objective: Objective,
    units: dict[str, Any],
    timing: dict[str, float],
    say: Say,
) -> dict[str, Any]:
    """Measure what a search found and write everything but config.json; returns what metrics.json holds."""
    options, model, chosen = setting.options, setting.model, aim.chosen
    sign = {"objective_sign": str(chosen.sign)}
    if aim.direction is not None and is_first():
        metadata = {**aim.direction.metadata, "site": chosen.site, **sign}
        save_direction(dataclasses.replace(aim.direction, metadata=metadata), options.out / files.DIRECTION)
    if aim.signature is not None and is_first():
        metadata = {**aim.signature.metadata, **sign}
        save_signature(dataclasses.replace(aim.signature, metadata=metadata), options.out / files.SIGNATURE)
    started = time.perf_counter()
    prompts = finals(setting, objective, result)
    files.write_lines(options.out / files.PARETO, prompts)
    metrics = {
        **described(setting, chosen.site, result, units),
        "sign": chosen.sign,
        "probe_correlation": chosen.correlation,
        "probe": aim.table.to_json(),
        "splits": {name: len(getattr(setting.splits, name)) for name in ("train", "validation", "test")},
        **evaluate(setting, prompts, say),
    }
    timing |= spent(result, time.perf_counter() - started)
    if setting.sae is not None and aim.signature is not None:
        metrics["signature"] = explained(setting, setting.sae, aim.signature, metrics)
    if options.algorithm == "soft":
        metrics["soft"] = finish_soft(setting, result.kept)
    metrics |= {"timing": timing, "environment": environment(model)}
    files.write_json(options.out / files.METRICS, metrics)
    if is_first():
        shutil.rmtree(options.out / files.STATE, ignore_errors=True)
    return files.plain(metrics)


def described(setting: Setting, site: str, result: SearchResult, units: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json says of any search: what was searched, where, and in which units."""
    options, model = setting.options, setting.model
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "persona": setting.persona.name,
        "method": options.method,
        "site": site,
        "seed": options.seed,
        "read_position": options.read_position,
        "target_units": "raw" if options.raw_units else "sd",
        "objective_units": units,
        "plan": dataclasses.asdict(result.plan),
        "interrupted": result.interrupted,
    }


def spent(result: SearchResult, eval_s: float) -> dict[str, float]:
    """What metrics.json says of a search's cost."""
    return {
        "compile_s": result.compile_s,
        "search_s": result.search_s,
        "eval_s": eval_s,
        "candidates": result.candidates,
        "candidates_per_s": result.candidates / result.search_s if result.search_s else 0.0,
        "steps": result.steps,
    }
