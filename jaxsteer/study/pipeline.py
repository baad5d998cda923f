"""``run``: what ``jaxsteer search`` does, from options to files.

Train questions make the direction and the contexts, validation questions the probe (and, on request, the selection),
test questions the report and nothing else. What can be refused is refused before any expensive work.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxsteer import __version__
from jaxsteer.evals.probe import WARNS, Probe, ProbeRow, Scorer, choose, probe, scorer, stream_sites
from jaxsteer.models.loading import Model, load
from jaxsteer.models.sharding import make_mesh
from jaxsteer.models.sites import parse_site
from jaxsteer.personas import Direction, contrast_pairs, load_persona, mean_difference, save_direction
from jaxsteer.prompts import Slots, first_allowed, retokenises_many
from jaxsteer.search import (
    FLUENCY,
    EpoConfig,
    Objective,
    Projection,
    SearchResult,
    Task,
    make_task,
    needs,
    run_search,
    score,
    standardise,
)
from jaxsteer.search.objectives import as_pytree
from jaxsteer.study import files
from jaxsteer.study.options import SearchOptions, load_objective
from jaxsteer.study.outcome import Say, environment, evaluate, finals
from jaxsteer.study.probing import DIRECTION_ITEMS, PROBE_ITEMS
from jaxsteer.study.setting import Setting, context_items, prepare

log = logging.getLogger(__name__)

PROBE_PROMPTS = 240
"""Random prompts of the probe."""


def run(options: SearchOptions, *, model: Model | None = None, say: Say = log.info) -> dict[str, Any]:
    """Do one run, write its files to ``options.out`` and return what metrics.json holds.

    A finished run of the same options is not repeated: its metrics are returned. ``model`` saves loading it again;
    ``say`` gets one line of narration per stage. Ctrl-C during the search ends the search and keeps what it found.
    Raises ``UserError`` before any expensive work for options that cannot work.
    """
    options = options.resolved()
    persona = load_persona(options.persona)
    custom = load_objective(options.objective) if options.objective else None
    config = {"format": files.FORMAT, "version": __version__, "data_hash": persona.data_hash, **options.record()}
    finished = files.open_run(options.out, config)
    if finished is not None:
        say(f"{options.out} already holds this run: nothing to do")
        return finished
    timing = {}
    started = time.perf_counter()
    if model is None:
        # Restarts are spread over the devices that there are; a single population stays on one.
        spread = options.restarts > 1 and jax.device_count() > 1
        model = load(options.model, dtype=options.dtype, mesh=make_mesh() if spread else None)
    setting = prepare(options, model, persona, custom)
    files.write_json(options.out / files.CONFIG, config)
    timing["load_s"] = time.perf_counter() - started

    started = time.perf_counter()
    direction, table, chosen = find_objective(setting, say)
    timing["probe_s"] = time.perf_counter() - started
    if direction is not None:
        noted = {"site": chosen.site, "objective_sign": str(chosen.sign)}
        noted_direction = dataclasses.replace(direction, metadata={**direction.metadata, **noted})
        save_direction(noted_direction, options.out / files.DIRECTION)

    result, objective, units = search(setting, direction, chosen, say)
    started = time.perf_counter()
    prompts = finals(setting, objective, result)
    files.write_lines(options.out / files.PARETO, prompts)
    metrics = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "persona": persona.name,
        "method": options.method,
        "site": chosen.site,
        "seed": options.seed,
        "read_position": options.read_position,
        "sign": chosen.sign,
        "probe_correlation": chosen.correlation,
        "probe": table.to_json(),
        "target_units": "raw" if options.raw_units else "sd",
        "objective_units": units,
        "splits": {name: len(getattr(setting.splits, name)) for name in ("train", "validation", "test")},
        "interrupted": result.interrupted,
        **evaluate(setting, prompts, say),
    }
    timing |= {
        "compile_s": result.compile_s,
        "search_s": result.search_s,
        "eval_s": time.perf_counter() - started,
        "candidates": result.candidates,
        "candidates_per_s": result.candidates / result.search_s if result.search_s else 0.0,
        "steps": result.steps,
    }
    metrics |= {"timing": timing, "environment": environment(model)}
    files.write_json(options.out / files.METRICS, metrics)
    return files.plain(metrics)


def find_objective(setting: Setting, say: Say) -> tuple[Direction | None, Probe, ProbeRow]:
    """The direction at every site, what the probe says of each, and the site to search at."""
    options, model = setting.options, setting.model
    direction = None
    if setting.custom is None:
        sites = stream_sites(model.config.n_layers)
        if options.site != "auto":
            sites = list(dict.fromkeys([*sites, parse_site(options.site, model.config.n_layers).name]))
        items = context_items(setting.splits.train, DIRECTION_ITEMS)
        pairs = contrast_pairs(
            model, setting.persona, items, options.read_position, split_seed=options.split_seed, **setting.place
        )
        direction = mean_difference(model, pairs, sites)
        say(f"Direction: difference of means over {len(pairs)} pairs of texts, read at {options.read_position}")
        judge = scorer(model, direction)
    else:
        judge = _custom_scorer(setting)
    table = probe(
        model,
        setting.persona,
        context_items(setting.splits.validation, PROBE_ITEMS),
        {options.read_position: judge},
        allowed=setting.allowed,
        length=setting.slots.length,
        n=PROBE_PROMPTS,
        seed=options.seed,
        **setting.place,
    )
    chosen = _chosen(setting, table)
    say(
        f"Probe: objective and behaviour rank {len(table.prompts)} random prompts alike to {chosen.correlation:.2f} at "
        f"{chosen.site}{' (sign turned)' if chosen.sign < 0 else ''}"
    )
    if chosen.correlation < WARNS:
        log.warning(
            "at %s (%s) the objective hardly ranks prompts by behaviour (rank correlation %.2f, below %.1f); "
            "what the search finds may not change it. `jaxsteer direction probe` compares sites and positions",
            chosen.site, options.read_position, chosen.correlation, WARNS,
        )  # fmt: skip
    return direction, table, chosen


def _chosen(setting: Setting, table: Probe) -> ProbeRow:
    """The probe's choice, or the row of the site that was asked for, with its sign as defined."""
    options = setting.options
    if setting.custom is None and options.site == "auto":
        return choose(table.rows)
    wanted = table.rows[0].site
    if setting.custom is None:
        wanted = parse_site(options.site, setting.model.config.n_layers).name
    row = next(row for row in table.rows if row.site == wanted)
    return dataclasses.replace(row, sign=1, correlation=row.sign * row.correlation)


def _custom_scorer(setting: Setting) -> Scorer:
    def judge(slots: Slots, ids: np.ndarray) -> dict[str, np.ndarray]:
        assert setting.custom is not None
        task = _task(setting, setting.custom, slots)
        f, _ = jax.jit(score)(setting.model.params, task, as_pytree(setting.custom), ids)
        return {f"custom: {(setting.options.objective or '').rpartition(':')[2]}": np.asarray(f)}

    return judge


def _task(setting: Setting, objective: Objective, slots: Slots) -> Task:
    return make_task(
        setting.model.params,
        setting.model.config,
        slots,
        needs=needs(objective, setting.model.config),
        allowed=setting.allowed,
        allowed_first=first_allowed(setting.model.tokenizer, slots, setting.allowed),
        batch=setting.options.batch,
    )


def search(
    setting: Setting, direction: Direction | None, chosen: ProbeRow, say: Say
) -> tuple[SearchResult, Objective, dict[str, Any]]:
    """Run EPO; returns what it found, the objective in the units of the search, and those units."""
    options, model = setting.options, setting.model
    if setting.custom is not None:
        raw: Objective = setting.custom
    else:
        assert direction is not None
        raw = Projection(delta=jnp.asarray(chosen.sign * direction.delta[chosen.site]), site=chosen.site)
    task = _task(setting, raw, setting.slots)
    standard, numbers = standardise(model.params, task, raw, seed=options.seed)
    objective = raw if options.raw_units else standard
    units = {"name": "raw" if options.raw_units else "standard deviations over random prompts", **numbers}
    config = EpoConfig(
        fluency=FLUENCY[options.fluency],
        **{
            name: getattr(options, name)
            for name in ("prompt_length", "population", "children", "steps", "top_k", "restart_every")
        },
    )
    say(
        f"Search: {options.steps} steps of {config.candidates * options.restarts} prompts of {options.prompt_length} "
        f"tokens, each scored in {task.contexts} contexts"
    )
    total = options.steps or 0
    with (
        open(options.out / files.PROGRESS, "w", encoding="utf-8") as stream,
        tqdm(total=total, desc="search", unit="step", disable=options.quiet, leave=False) as bar,
    ):

        def report(progress: Any) -> None:
            stream.write(files.line(dataclasses.asdict(progress)))
            stream.flush()
            bar.update(progress.step - bar.n)
            bar.set_postfix(best=f"{float(np.max(progress.best_target)):.2f}", refresh=False)

        result = run_search(
            model.params,
            task,
            objective,
            config,
            seed=options.seed,
            problems=options.restarts,
            valid=lambda ids: retokenises_many(model.tokenizer, setting.slots, ids),
            callback=report,
            mesh=model.mesh,
        )
    if result.interrupted:
        say(f"Interrupted after {result.steps} steps: going on with what was found")
    return result, objective, units
