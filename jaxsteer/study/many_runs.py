"""Many searches in one run: the product of ``--vary``, or a table of problems.

Problems that share all that is static (contexts, objective's kind, site, length) are one group and one program; their
directions, fluency weights and keys are data. Every problem's frontier goes to frontiers.jsonl and a line about it to
problems.csv; what was searched for along one direction at one site is pooled, measured on questions and written as a
run of its own in a folder.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.files import write_text
from jaxsteer.models.model import Model
from jaxsteer.objectives import Objective
from jaxsteer.personas import load_persona
from jaxsteer.processes import from_first, is_first
from jaxsteer.prompt_search import SearchResult
from jaxsteer.prompts import prompt_text
from jaxsteer.sae import load_sae
from jaxsteer.study import files
from jaxsteer.study.named_objectives import custom_objective
from jaxsteer.study.objective_stage import RANDOM, Aim, Say, find_aims, task_of, try_objective
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.outcome import environment
from jaxsteer.study.problem_table import COLUMNS, rows_of
from jaxsteer.study.setting import Setting, prepare
from jaxsteer.study.stages import conclude, in_units, load_model, problem_of, progress_of, search_problems

PROBLEMS, FRONTIERS = "problems.csv", "frontiers.jsonl"


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem: its options, and the number of its restart."""

    options: SearchOptions
    restart: int

    def columns(self) -> dict[str, Any]:
        """What tells it from other problems."""
        names = [name for name in COLUMNS if name != "restart"]
        return {**{name: getattr(self.options, name) for name in names}, "restart": self.restart}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Problems with the same objective: they become a run of their own, in a folder."""

    folder: Path
    setting: Setting
    aim: Aim
    problems: list[int]


def run_many(options: SearchOptions, *, model: Model | None, say: Say) -> dict[str, Any]:
    """Do all searches that ``options.vary`` or ``options.problems`` names; returns what metrics.json holds.

    Directions, probes and units are made with ``options.seed``; a problem's own ``seed`` is that of its search. Raises
    ``UserError`` before any expensive work for options that cannot work.
    """
    rows = [_row(row, options) for row in rows_of(options.vary, options.problems, options)]
    personas = {name: load_persona(name) for name in dict.fromkeys(row.options.persona for row in rows)}
    hashes = {name: persona.data_hash for name, persona in personas.items()}
    listed = hashlib.sha256(repr([row.columns() for row in rows]).encode()).hexdigest()[:16]
    config = {**_header(hashes), **options.record(), "problems": listed}
    finished = from_first(lambda: files.open_run(options.out, config))
    if finished is not None:
        say(f"{options.out} already holds this run: nothing to do")
        return finished
    started = time.perf_counter()
    model = model or load_model(options, parallel=True)
    custom = custom_objective(options.objective, options.target)
    saes = {name: load_sae(name, mesh=model.mesh) for name in {row.options.sae for row in rows} if name}
    settings = {
        key: prepare(key, model, personas[key.persona], custom, saes.get(key.sae or ""))
        for key in dict.fromkeys(_setting_of(row, options) for row in rows)
    }
    for setting in settings.values():
        try_objective(setting)
    files.write_json(options.out / files.CONFIG, config)
    timing = {"load_s": time.perf_counter() - started}
    started = time.perf_counter()
    groups = _grouped(rows, settings, options, say)
    timing["probe_s"] = time.perf_counter() - started
    say(f"{len(rows)} problems in {len(groups)} programs, with {sum(map(len, groups))} objectives")

    table: list[dict[str, Any]] = []
    frontiers: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    searched = {"compile_s": 0.0, "search_s": 0.0, "candidates": 0}
    for number, pools in enumerate(groups):
        result, objectives = _search(options, rows, pools, number, say)
        searched_here = [(pool, problem) for pool in pools for problem in pool.problems][: len(result.archive.f)]
        for at, (pool, problem) in enumerate(searched_here):
            found = _frontier(model, result, problem, at)
            frontiers += found
            table.append(_line(rows[problem], problem, pool, found))
        files.write_lines(options.out / FRONTIERS, frontiers)
        _write_table(options.out / PROBLEMS, table)
        first = 0
        for pool, (objective, units) in zip(pools, objectives, strict=True):
            part = result.of(range(first, first := first + len(pool.problems)))
            if len(part.archive.f):
                runs[pool.folder.name] = _conclude(pool, hashes, part, objective, units, timing, say)
        searched = {name: value + getattr(result, name) for name, value in searched.items()}
        if result.interrupted:
            break
    metrics = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "problems": len(rows),
        "searched": len(table),
        "interrupted": len(table) < len(rows),
        "runs": runs,
        "timing": {**timing, **searched},
        "environment": environment(model),
    }
    files.write_json(options.out / files.METRICS, metrics)
    if is_first():
        shutil.rmtree(options.out / files.STATE, ignore_errors=True)
    return files.plain(metrics)


def _row(row: dict[str, Any], options: SearchOptions) -> Row:
    method = row.get("method", options.method)
    if method == "saega" and options.sae is None:
        raise UserError("a problem asks for saega, which reads a sparse autoencoder: give --sae PATH")
    if method == "resga":
        row = {**row, "sae": None, "latents": None, "surrogate": "none"}
    restart = row.pop("restart", 0)
    changed = dataclasses.replace(options, **row, restarts=1, vary=(), problems=None).resolved()
    if (changed.direction or "").startswith(RANDOM) and changed.site == "auto":
        raise UserError("a random direction needs a site, with --site or among the problems: none is special to it")
    return Row(changed, restart)


def _header(data_hash: Any) -> dict[str, Any]:
    return {"format": files.FORMAT, "version": __version__, "data_hash": data_hash}


def _setting_of(row: Row, options: SearchOptions) -> SearchOptions:
    """The row's options, but for what a setting leaves open."""
    return dataclasses.replace(
        row.options, direction=options.direction, site="auto", fluency=options.fluency, seed=options.seed
    )


def _grouped(
    rows: Sequence[Row], settings: dict[SearchOptions, Setting], options: SearchOptions, say: Say
) -> list[list[Pool]]:
    """All pools, those together that are one program: the same contexts, site and kind of objective."""
    wanted: dict[tuple[SearchOptions, str | None], dict[str, list[int]]] = {}
    for number, row in enumerate(rows):
        alike = _setting_of(row, options), row.options.direction
        wanted.setdefault(alike, {}).setdefault(row.options.site, []).append(number)
    groups: dict[tuple[SearchOptions, str], list[Pool]] = {}
    for (key, direction), sites in wanted.items():
        setting = settings[key]
        directed = dataclasses.replace(setting, options=dataclasses.replace(setting.options, direction=direction))
        for (site, problems), aim in zip(sites.items(), find_aims(directed, list(sites), say), strict=True):
            # A prompt's length may be that of --init, which only the setting knows.
            first = dataclasses.replace(rows[problems[0]].options, seed=options.seed, restarts=len(problems))
            length = setting.options.prompt_length
            folder = _folder(first, aim, site, sum(map(len, groups.values())))
            mine = dataclasses.replace(
                setting, options=dataclasses.replace(first, out=options.out / folder, prompt_length=length)
            )
            pool = Pool(folder=options.out / folder, setting=mine, aim=aim, problems=problems)
            groups.setdefault((key, aim.chosen.site), []).append(pool)
    return list(groups.values())


def _folder(options: SearchOptions, aim: Aim, site: str, number: int) -> str:
    place = aim.chosen.site if site == "auto" else site
    words = [f"{number:03d}", Path(options.persona).stem, options.method, place]
    if options.direction is not None:
        words.append(Path(options.direction).stem)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))[:120]


def _search(
    options: SearchOptions, rows: Sequence[Row], pools: Sequence[Pool], number: int, say: Say
) -> tuple[SearchResult, list[tuple[Objective, dict[str, Any]]]]:
    """Search one group; its problems come in the order of its pools. Also every pool's objective, with its units."""
    setting = pools[0].setting
    task = task_of(setting, pools[0].aim.objective)
    objectives = [in_units(pool.setting, task, pool.aim.objective) for pool in pools]
    problems = [
        problem_of(
            dataclasses.replace(setting, options=rows[problem].options), objective, restart=rows[problem].restart
        )
        for pool, (objective, _) in zip(pools, objectives, strict=True)
        for problem in pool.problems
    ]
    with progress_of(options, f"group {number}", group=number) as report:
        state = options.out / files.STATE / str(number)
        return search_problems(setting, task, problems, report, state, say), objectives


def _frontier(model: Model, result: SearchResult, problem: int, at: int) -> list[dict[str, Any]]:
    return [
        {
            "problem": problem,
            "text": prompt_text(model.tokenizer, entry.ids),
            "ids": list(entry.ids),
            "target": entry.target,
            "cross_entropy": entry.cross_entropy,
            "step": entry.step,
            "retokenises": entry.retokenises,
        }
        for entry in result.frontier([at])
    ]


def _line(row: Row, problem: int, pool: Pool, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A problem's line of the table: what it was, and its best prompt."""
    best = next((entry for entry in found if entry["retokenises"]), {})
    return {
        "problem": problem,
        **row.columns(),
        "site": pool.aim.chosen.site,
        "run": pool.folder.name,
        "prompts": sum(entry["retokenises"] for entry in found),
        **{name: best.get(name) for name in ("target", "cross_entropy", "step", "text")},
    }


def _write_table(path: Path, table: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(table, key=lambda line: line["problem"]))
    if is_first():
        write_text(path, text.getvalue())


def _conclude(
    pool: Pool,
    hashes: dict[str, str],
    result: SearchResult,
    objective: Objective,
    units: dict[str, Any],
    timing: dict[str, float],
    say: Say,
) -> dict[str, Any]:
    """Measure a pool and write its run, unless that is done; returns what the whole run's metrics say about it."""
    options = pool.setting.options
    config = {**_header(hashes[options.persona]), **options.record(), "pooled": len(pool.problems)}
    metrics = from_first(lambda: files.open_run(pool.folder, config))
    if metrics is None:
        say(f"{pool.folder.name}: {len(pool.problems)} problems")
        files.write_json(pool.folder / files.CONFIG, config)
        metrics = conclude(pool.setting, pool.aim, result, objective, units, dict(timing), say)
    best = metrics["prompts"][metrics["selected"]] if metrics["selected"] is not None else None
    return {
        "problems": len(pool.problems),
        "persona": metrics["persona"],
        "method": metrics["method"],
        "site": metrics["site"],
        "probe_correlation": metrics["probe_correlation"],
        "baseline": metrics["baseline"]["test"]["rate"],
        "selected": best and {"text": best["text"], "target": best["target"], "rate": best["test"]["rate"]},
    }
