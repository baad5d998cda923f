"""A search in conversations of the user's own: an objective that needs no persona, a frontier, and no rates.

What the conversations are about is not known here, so that nothing can be said about behaviour: prompts and a random
control have the objective and the cross-entropy, from their texts, and that is all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sites import parse_site
from jaxsteer.objectives import Objective, Projection, needs
from jaxsteer.personas import Direction, Persona, Splits, check_direction, load_direction, save_direction
from jaxsteer.processes import from_first, is_first
from jaxsteer.prompt_search import check_objective
from jaxsteer.prompt_search.rescore import rescore
from jaxsteer.prompts import Conversation, load_conversations
from jaxsteer.study import files
from jaxsteer.study.named_objectives import Custom, custom_objective
from jaxsteer.study.objective_stage import RANDOM, Say, task_of
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.outcome import environment, finals, random_prompt, select
from jaxsteer.study.setting import Setting, locate
from jaxsteer.study.stages import described, load_model, search, spent


def run_own(options: SearchOptions, path: Path, *, model: Model | None, say: Say) -> dict[str, Any]:
    """Search in the conversations of a file, write the run's files and return what metrics.json holds.

    Raises ``UserError`` before any expensive work for options that belong to personas, and for an objective that does.
    """
    custom = _asked(options)
    conversations = load_conversations(path)
    digest = hashlib.sha256(repr(conversations).encode()).hexdigest()
    config = {"format": files.FORMAT, "version": __version__, "data_hash": digest, **options.record()}
    finished = from_first(lambda: files.open_run(options.out, config))
    if finished is not None:
        say(f"{options.out} already holds this run: nothing to do")
        return finished
    started = time.perf_counter()
    model = model or load_model(options, parallel=options.restarts > 1)
    setting = _setting(options, path, digest, model, conversations, custom)
    direction = None if custom is not None else _direction(options, model)
    raw: Objective
    if direction is None:
        site, raw = setting.custom.name, setting.placed(setting.slots)[0]  # type: ignore[union-attr]
    else:
        site = parse_site(options.site, model.config.n_layers).name
        raw = Projection(delta=jnp.asarray(direction.delta[site]), site=site, norm=options.objective_norm)
    check_objective(model.params, task_of(setting, raw), raw)
    files.write_json(options.out / files.CONFIG, config)
    if direction is not None and is_first():
        metadata = {**direction.metadata, "site": site, "objective_sign": "1"}
        save_direction(dataclasses.replace(direction, metadata=metadata), options.out / files.DIRECTION)
    timing: dict[str, float] = {"load_s": time.perf_counter() - started}
    say(f"Contexts: {len(conversations)} conversations of {path}")
    result, objective, units = search(setting, raw, say)

    started = time.perf_counter()
    prompts = finals(setting, objective, result)
    files.write_lines(options.out / files.PARETO, prompts)
    text = random_prompt(setting)
    reads = needs(objective, model.config)
    control = rescore(model, setting.slots, objective, reads, [text], combine=options.combination)[0]
    metrics = {
        **described(setting, site, result, units),
        "conversations": len(conversations),
        "controls": {"random": {"text": text, **dataclasses.asdict(control)}},
        "prompts": prompts,
        "selected": select(prompts, "objective"),
        "selected_by": "objective",
        "timing": timing | spent(result, time.perf_counter() - started),
        "environment": environment(model),
    }
    files.write_json(options.out / files.METRICS, metrics)
    if is_first():
        shutil.rmtree(options.out / files.STATE, ignore_errors=True)
    return files.plain(metrics)


def _asked(options: SearchOptions) -> Custom | None:
    """The objective by name, if it is not a direction's. Refuses what only a persona's questions can serve."""
    usual = SearchOptions(out=options.out)
    names = ("persona", "style", "slot", "contexts", "select", "draft", "method")
    if other := [name for name in names if getattr(options, name) != getattr(usual, name)]:
        raise UserError(
            f"--{other[0].replace('_', '-')} is an option of a persona's questions: leave it out, or --conversations"
        )
    if options.algorithm == "soft":
        raise UserError("--algorithm soft measures its embeddings on a persona's questions: leave out --conversations")
    custom = custom_objective(options.objective, options.target)
    if custom is not None and custom.of_persona:
        raise UserError(f"--objective {options.objective} is made of a persona's answers: take --target TEXT instead")
    given = options.direction is not None and not options.direction.startswith(RANDOM) and options.site != "auto"
    if custom is None and not given:
        raise UserError(
            "--conversations come without a persona to make a direction from: give --objective, --target, or "
            "--direction FILE and --site"
        )
    return custom


def _setting(
    options: SearchOptions, path: Path, digest: str, model: Model, own: tuple[Conversation, ...], custom: Custom | None
) -> Setting:
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer.json: a search needs the tokenizer beside the weights")
    nobody = Persona(name=f"{path.stem} (no persona)", items=(), data_hash=digest)
    nothing = Splits(train=(), validation=(), test=(), seed=options.split_seed, fractions=(0.0, 0.0, 0.0))
    read = "slot_last" if options.read_position == "published" else "input_last"
    return locate(options, model, nobody, nothing, [(conversation, read) for conversation in own], custom)


def _direction(options: SearchOptions, model: Model) -> Direction:
    direction = load_direction(Path(options.direction or "").expanduser())
    check_direction(direction, model)
    site = parse_site(options.site, model.config.n_layers).name
    if site not in direction.sites:
        raise UserError(f"--direction {options.direction} has no {site}: it has {', '.join(direction.sites)}")
    return direction
