"""``run``: what ``jaxsteer search`` does, from options to files.

Train questions make the direction and the contexts, validation questions the probe (and, on request, the selection),
test questions the report and nothing else. What can be refused is refused before any expensive work.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from jaxsteer import __version__
from jaxsteer.models.model import Model
from jaxsteer.personas import load_persona
from jaxsteer.processes import from_first
from jaxsteer.sae import load_sae
from jaxsteer.study import files
from jaxsteer.study.conversations_run import run_own
from jaxsteer.study.many_runs import run_many
from jaxsteer.study.named_objectives import custom_objective
from jaxsteer.study.objective_stage import Say, find_aim, try_objective
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.setting import prepare
from jaxsteer.study.stages import conclude, load_model, search

log = logging.getLogger(__name__)


def run(options: SearchOptions, *, model: Model | None = None, say: Say = log.info) -> dict[str, Any]:
    """Do one run, write its files to ``options.out`` and return what metrics.json holds.

    A finished run of the same options is not repeated: its metrics are returned; one that was cut off is done again,
    or with ``options.resume`` goes on. ``model`` saves loading it again; ``say`` gets one line of narration per stage.
    Ctrl-C during the search ends the search and keeps what it found; SIGTERM saves it and ends the process. With
    ``options.vary`` or ``options.problems`` it does many searches (``run_many``), with ``options.conversations``
    one without a persona (``run_own``). Raises ``UserError`` before any expensive work for options that cannot
    work.
    """
    options = options.resolved()
    if options.vary or options.problems:
        return run_many(options, model=model, say=say)
    if options.conversations is not None:
        return run_own(options, options.conversations, model=model, say=say)
    persona = load_persona(options.persona)
    custom = custom_objective(options.objective, options.target)
    config = {"format": files.FORMAT, "version": __version__, "data_hash": persona.data_hash, **options.record()}
    finished = from_first(lambda: files.open_run(options.out, config))
    if finished is not None:
        say(f"{options.out} already holds this run: nothing to do")
        return finished
    started = time.perf_counter()
    if model is None:
        model = load_model(options, parallel=options.restarts > 1)
    sae = load_sae(options.sae, mesh=model.mesh) if options.sae else None
    setting = prepare(options, model, persona, custom, sae)
    try_objective(setting)
    files.write_json(options.out / files.CONFIG, config)
    timing = {"load_s": time.perf_counter() - started}

    started = time.perf_counter()
    aim = find_aim(setting, say)
    timing["probe_s"] = time.perf_counter() - started
    result, objective, units = search(setting, aim.objective, say)
    return conclude(setting, aim, result, objective, units, timing, say)
