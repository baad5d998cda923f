"""A search in conversations of the user's own: an objective that needs no persona, a frontier, and no rates.

What the conversations are about is not known here, so that nothing can be said about behaviour: prompts and a random
control have the objective and the cross-entropy, from their texts, and that is all.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sites import parse_site
from jaxsteer.objectives import Objective, Projection, needs
from jaxsteer.personas import save_direction
from jaxsteer.processes import is_first
from jaxsteer.prompt_search import check_objective
from jaxsteer.prompt_search.rescore import rescore
from jaxsteer.prompts import load_conversations
from jaxsteer.runs import files
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.folder import opened
from jaxsteer.study.named_objectives import NamedObjective, named_objective
from jaxsteer.study.objective_stage import Say, direction_of_file, task_of
from jaxsteer.study.options import RANDOM, ObjectiveOptions, SearchOptions
from jaxsteer.study.outcome import random_prompt, select
from jaxsteer.study.results import Prompt, SearchRun
from jaxsteer.study.setting import open_slots
from jaxsteer.study.stages import Ascent, load_model, restarts, search, timed, write_results


def run_conversations(options: SearchOptions, path: Path, *, model: Model | None, say: Say) -> SearchRun:
    """Search in the conversations of a file, write the run's files and return what metrics.json holds.

    Raises ``UserError`` before any expensive work for an objective that is made of a persona's questions.
    """
    named = _without_persona(options.objective)
    conversations = load_conversations(path)
    digest = hashlib.sha256(repr(conversations).encode()).hexdigest()
    with opened(options.run.out, {"data_hash": digest, **options.record()}, say, resume=options.run.resume) as folder:
        if folder.finished is not None:
            return SearchRun.from_json(folder.finished, str(folder.path / files.METRICS))
        timing: dict[str, float] = {}
        with timed(timing, "load_s"):
            several = options.algorithm.restarts > 1
            model = model or load_model(options.model, parallel=several, quiet=options.run.quiet)
            read = "slot_last" if options.contexts.read_position == "published" else "input_last"
            texts = [(conversation, read) for conversation in conversations]
            with progress_bar("contexts", quiet=options.run.quiet):
                setting = open_slots(options.contexts, options.scoring, options.prompt, model, texts, named)
            direction = None
            raw: Objective
            if named is not None:
                site, raw = named.name, setting.named_in(setting.slots)[0]
            else:
                site = parse_site(options.objective.site, model.config.n_layers).name
                direction = direction_of_file(model, str(options.objective.direction), [site])
                delta = jnp.asarray(direction.delta[site])
                raw = Projection(delta=delta, site=site, norm=options.objective.objective_norm)
            with progress_bar("objective", quiet=options.run.quiet):
                check_objective(model.params, task_of(setting, raw), raw)
            folder.begin()
            if direction is not None and is_first():
                metadata = {**direction.metadata, "site": site, "objective_sign": "1"}
                save_direction(dataclasses.replace(direction, metadata=metadata), folder.path / files.DIRECTION)
        say(f"Contexts: {len(conversations)} conversations of {path}")
        ascent = Ascent(objective=raw, populations=restarts(options.algorithm))
        (found,) = search(setting, [ascent], options.algorithm, options.run, say=say)

        def measure(prompts: Sequence[Prompt]) -> dict[str, Any]:
            text, reads = random_prompt(setting, options.algorithm.seed), needs(found.objective, setting.model.config)
            how = setting.scoring.combination
            (control,) = rescore(setting.model, setting.slots, found.objective, reads, [text], combine=how)
            return {
                "persona": f"{path.stem} (no persona)",
                "conversations": len(conversations),
                "controls": {"random": Prompt(text=text, target=control.target, cross_entropy=control.cross_entropy)},
                "prompts": tuple(prompts),
                "selected": select(prompts, "objective"),
            }

        return write_results(folder, options, setting, site, found, timing, measure)


def _without_persona(options: ObjectiveOptions) -> NamedObjective | None:
    """The objective by name, if it is not a direction's. Refuses what only a persona's questions can serve."""
    named = named_objective(options.objective, options.target, relative=options.relative)
    if named is not None and named.of_persona:
        raise UserError(f"--objective {options.objective} is made of a persona's answers: take --target TEXT instead")
    given = options.direction is not None and not options.direction.startswith(RANDOM) and options.site != "auto"
    if named is None and not given:
        raise UserError(
            "--conversations come without a persona to make a direction from: give --objective, --target, or "
            "--direction FILE and --site"
        )
    return named
