"""``run``: what ``jaxsteer search`` does, from options to files: one search, many, or conversations.

Train questions make the direction and the contexts, validation questions the probe (and, on request, the selection),
test questions the report and nothing else. What can be refused is refused before any expensive work.
"""

from __future__ import annotations

import logging

from jaxsteer.models.model import Model
from jaxsteer.personas import load_persona
from jaxsteer.runs.files import METRICS
from jaxsteer.runs.folder import opened
from jaxsteer.study.conversations_run import run_conversations
from jaxsteer.study.many_runs import run_many
from jaxsteer.study.objective_stage import Say, choose_objective
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.results import SearchRun
from jaxsteer.study.stages import Ascent, conclude, load_draft, persona_setting, restarts, rows_scored, search, timed
from jaxsteer.study.study_result import Study

log = logging.getLogger(__name__)


def run(options: SearchOptions, *, model: Model | None = None, say: Say = log.info) -> SearchRun | Study:
    """Do one run, write its files to ``options.run.out`` and return the result, which metrics.json holds.

    A finished run of the same options is not repeated: its result is returned; one that was cut off is done again,
    or with ``resume`` goes on. ``model`` saves loading it again; ``say`` gets one line of narration per stage. Ctrl-C
    during the search ends the search and keeps what it found; SIGTERM saves it and ends the process. With ``vary`` or
    ``problems`` it does many searches (``run_many``), with ``conversations`` one without a persona
    (``run_conversations``). Raises ``UserError`` before any expensive work for options that cannot work.
    """
    options = options.resolved()
    if options.problems.several:
        return run_many(options, model=model, say=say)
    if options.contexts.conversations is not None:
        return run_conversations(options, options.contexts.conversations, model=model, say=say)
    return run_one(options, model=model, say=say)


def run_one(options: SearchOptions, *, model: Model | None, say: Say) -> SearchRun:
    """One search against a persona, with as many restarts as were asked for."""
    persona = load_persona(options.contexts.persona)
    with opened(
        options.run.out, {"data_hash": persona.data_hash, **options.record()}, say, resume=options.run.resume
    ) as folder:
        if folder.finished is not None:
            return SearchRun.from_json(folder.finished, str(folder.path / METRICS))
        timing: dict[str, float] = {}
        with timed(timing, "load_s"):
            setting = persona_setting(options, persona=persona, model=model, say=say)
            folder.begin(resume=options.run.resume)
        with timed(timing, "probe_s"):
            seed, budget = options.algorithm.seed, rows_scored(options, setting.slots, options.algorithm.restarts)
            chosen = choose_objective(setting, options.objective, seed=seed, say=say, run=options.run, budget=budget)
        draft = load_draft(options, setting, say)
        ascent = Ascent(objective=chosen.objective, populations=restarts(options.algorithm))
        (found,) = search(setting, [ascent], options.algorithm, options.run, draft=draft, say=say)
        return conclude(folder, options, setting, chosen, found, timing, say)
