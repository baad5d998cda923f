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
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files import write_text
from jaxsteer.models.model import Model
from jaxsteer.personas import Persona, load_persona
from jaxsteer.personas.written_persona import ready
from jaxsteer.processes import is_first
from jaxsteer.prompt_search import SearchResult
from jaxsteer.prompts import prompt_text
from jaxsteer.runs import files
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.folder import opened
from jaxsteer.sae import load_sae
from jaxsteer.study.named_objectives import named_objective
from jaxsteer.study.objective_stage import ChosenObjective, Say, choose_objectives, require_cues, try_objective
from jaxsteer.study.options import RANDOM, ContextOptions, ObjectiveOptions, SearchOptions, from_flat
from jaxsteer.study.outcome import check_judge, environment
from jaxsteer.study.problem_table import COLUMNS, rows_of
from jaxsteer.study.results import SearchRun, Timing
from jaxsteer.study.setting import PersonaSetting, prepare
from jaxsteer.study.stages import Ascent, Population, Searched, conclude, load_model, rows_scored, search, timed
from jaxsteer.study.study_result import RunSummary, Study

PROBLEMS, FRONTIERS = "problems.csv", "frontiers.jsonl"


Key = tuple[ContextOptions, str | None]
"""What a setting is made of: contexts, and the SAE that is read there."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem: its options, and the number of its restart."""

    options: SearchOptions
    restart: int

    @property
    def key(self) -> Key:
        """Problems with the same key share a setting."""
        return self.options.contexts, self.options.objective.sae

    @property
    def population(self) -> Population:
        """Its population."""
        algorithm = self.options.algorithm
        return Population(fluency=algorithm.fluency, seed=algorithm.seed, restart=self.restart)

    def columns(self) -> dict[str, Any]:
        """What tells it from other problems."""
        flat = self.options.flat()
        return {**{name: flat[name] for name in COLUMNS if name != "restart"}, "restart": self.restart}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Problems with the same objective: they become a run of their own, in a folder."""

    folder: Path
    options: SearchOptions
    """Of that run."""
    setting: PersonaSetting
    chosen: ChosenObjective
    problems: list[int]


def run_many(options: SearchOptions, *, model: Model | None, say: Say) -> Study:
    """Do all searches that ``vary`` or ``problems`` names; returns what metrics.json holds.

    1. Every problem gets its options; those that cannot work are refused before any expensive work.
    2. Problems with the same contexts share a setting. Those that also have the same direction and site share an
       objective and are a pool. Pools with the same contexts and site are a group, which is one program.
    3. The groups are searched in turn. After each, its problems join problems.csv and frontiers.jsonl, and its pools
       are concluded as runs of their own.

    Directions, probes and units are made with the seed of ``options``; a problem's own seed is that of its search.
    """
    rows = [_row(row, options) for row in rows_of(options.problems)]
    personas = {name: load_persona(name) for name in dict.fromkeys(row.options.contexts.persona for row in rows)}
    for row in rows:
        contexts, persona = row.options.contexts, personas[row.options.contexts.persona]
        check_judge(options.report, persona)
        require_cues(persona, contexts.read_position, row.options.objective)
    hashes = {name: persona.data_hash for name, persona in personas.items()}
    listed = hashlib.sha256(repr([row.columns() for row in rows]).encode()).hexdigest()[:16]
    config = {"data_hash": hashes, **options.record(), "problems": listed}
    with opened(options.run.out, config, say, resume=options.run.resume) as folder:
        if folder.finished is not None:
            return Study.from_json(folder.finished, str(folder.path / files.METRICS))
        timing: dict[str, float] = {}
        with timed(timing, "load_s"):
            model = model or load_model(options.model, parallel=True, quiet=options.run.quiet)
            settings = _settings(options, rows, personas, model, say)
            folder.begin(resume=options.run.resume)
        with timed(timing, "probe_s"):
            groups = _grouped(rows, settings, options, say)
        say(f"{len(rows)} problems in {len(groups)} programs, with {sum(map(len, groups))} objectives")
        table: list[dict[str, Any]] = []
        frontiers: list[dict[str, Any]] = []
        runs: dict[str, RunSummary] = {}
        searched = {"compile_s": 0.0, "search_s": 0.0, "candidates": 0}
        for number, pools in enumerate(groups):
            ascents = [
                Ascent(objective=pool.chosen.objective, populations=tuple(rows[i].population for i in pool.problems))
                for pool in pools
            ]
            found = search(pools[0].setting, ascents, options.algorithm, options.run, group=number, say=say)
            for pool, part in zip(pools, found, strict=True):
                for at, problem in enumerate(pool.problems[: len(part.result.archive.f)]):
                    frontiers += (frontier := _frontier(model, part.result, problem, at))
                    table.append(_line(rows[problem], problem, pool, frontier))
            files.write_lines(folder.path / FRONTIERS, frontiers)
            _write_table(folder.path / PROBLEMS, table)
            for pool, part in zip(pools, found, strict=True):
                if len(part.result.archive.f):
                    runs[pool.folder.name] = _conclude(pool, hashes, part, timing, say)
            searched = {name: value + getattr(found[0].result, name) for name, value in searched.items()}
            if found[0].result.interrupted:
                break
        done = {line["problem"] for line in table}
        left = [row.options for number, row in enumerate(rows) if number not in done]
        study = Study(
            model=model.name,
            fingerprint=model.fingerprint,
            problems=len(rows),
            searched=len(table),
            interrupted=len(table) < len(rows),
            missing=Counter(f"{one.contexts.persona}, {one.objective.method}" for one in left),
            runs=runs,
            timing=Timing(**timing, **searched),  # type: ignore[arg-type]
            environment=environment(model),
        )
        folder.finish(study)
        return study


def _settings(
    options: SearchOptions, rows: Sequence[Row], personas: Mapping[str, Persona], model: Model, say: Say
) -> dict[Key, PersonaSetting]:
    """The settings of all problems; the objectives are tried in each."""
    named = named_objective(options.objective.objective, options.objective.target, relative=options.objective.relative)
    keys = list(dict.fromkeys(row.key for row in rows))
    saes = {name: load_sae(name, mesh=model.mesh) if name else None for _, name in dict.fromkeys(keys)}
    found: dict[Key, PersonaSetting] = {}
    for contexts, sae in keys:
        persona = ready(model, personas[contexts.persona], contexts.goal, None, say, quiet=options.run.quiet)
        with progress_bar("contexts", quiet=options.run.quiet):
            found[contexts, sae] = prepare(contexts, options.scoring, options.prompt, model, persona, named, saes[sae])
    with progress_bar("objectives", quiet=options.run.quiet):
        for key, objective in dict.fromkeys((row.key, row.options.objective) for row in rows):
            try_objective(found[key], objective)
    return found


def _row(row: Mapping[str, Any], options: SearchOptions) -> Row:
    method = row.get("method", options.objective.method)
    if method == "saega" and options.objective.sae is None:
        raise UserError("a problem asks for saega, which reads a sparse autoencoder: give --sae PATH")
    own = {name: value for name, value in row.items() if name != "restart"}
    if method == "resga":
        own |= {"sae": None, "latents": None, "surrogate": "none"}
    alone = {"restarts": 1, "vary": (), "problems": None}
    changed = from_flat({**options.flat(), **own, **alone}).resolved()
    objective = changed.objective
    if (objective.direction or "").startswith(RANDOM) and objective.site == "auto":
        raise UserError("a random direction needs a site, with --site or among the problems: none is special to it")
    return Row(changed, row.get("restart", 0))


def _grouped(
    rows: Sequence[Row],
    settings: Mapping[Key, PersonaSetting],
    options: SearchOptions,
    say: Say,
) -> list[list[Pool]]:
    """All pools, those together that are one program: the same contexts, site and kind of objective."""
    wanted: dict[tuple[Key, ObjectiveOptions], dict[str, list[int]]] = {}
    for number, row in enumerate(rows):
        anywhere = dataclasses.replace(row.options.objective, site="auto")
        wanted.setdefault((row.key, anywhere), {}).setdefault(row.options.objective.site, []).append(number)
    groups: dict[tuple[Key, str], list[Pool]] = {}
    for (key, objective), sites in wanted.items():
        setting = settings[key]
        seed, budget = options.algorithm.seed, rows_scored(options, setting.slots, sum(map(len, sites.values())))
        found = choose_objectives(setting, objective, list(sites), seed=seed, say=say, run=options.run, budget=budget)
        for problems, chosen in zip(sites.values(), found, strict=True):
            mine = _pooled(rows[problems[0]].options, options, setting, len(problems))
            folder = Path(options.run.out) / _folder(mine, chosen, sum(map(len, groups.values())))
            pool = Pool(folder=folder, options=mine.at(folder), setting=setting, chosen=chosen, problems=problems)
            groups.setdefault((key, chosen.row.site), []).append(pool)
    return list(groups.values())


def _pooled(first: SearchOptions, options: SearchOptions, setting: PersonaSetting, restarts: int) -> SearchOptions:
    """The options of the run that problems are pooled to, of the first of them."""
    seed = options.algorithm.seed
    # A prompt's length may be that of --init, which only the setting knows.
    length = first.prompt.prompt_length or setting.slots.length
    return dataclasses.replace(
        first,
        algorithm=dataclasses.replace(first.algorithm, seed=seed, restarts=restarts),
        prompt=dataclasses.replace(first.prompt, prompt_length=length),
    )


def _folder(options: SearchOptions, chosen: ChosenObjective, number: int) -> str:
    objective = options.objective
    site = chosen.row.site if objective.site == "auto" else objective.site
    goal = (options.contexts.goal,) if options.contexts.goal else ()
    words = [f"{number:03d}", Path(options.contexts.persona).stem, *goal, objective.method, site]
    if objective.direction is not None:
        words.append(Path(objective.direction).stem)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))[:120]


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
        "goal": pool.setting.persona.goal,
        "site": pool.chosen.row.site,
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
    pool: Pool, hashes: Mapping[str, str], found: Searched, timing: Mapping[str, float], say: Say
) -> RunSummary:
    """Measure a pool and write its run, unless that is done; returns what the whole run's metrics say about it."""
    options, problems = pool.options, len(pool.problems)
    config = {"data_hash": hashes[options.contexts.persona], **options.record(), "pooled": problems}
    with opened(pool.folder, config, lambda _: None, resume=options.run.resume) as folder:
        if folder.finished is not None:
            run = SearchRun.from_json(folder.finished, str(folder.path / files.METRICS))
        else:
            say(f"{pool.folder.name}: {problems} problems")
            folder.begin()
            run = conclude(folder, options, pool.setting, pool.chosen, found, dict(timing), say)
    return RunSummary.of(run, problems=problems)
