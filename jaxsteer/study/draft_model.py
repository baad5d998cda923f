"""A draft model beside a run's own, for probe sampling: the same questions, the same aim, its own direction."""

from __future__ import annotations

import dataclasses

from jaxsteer.checkpoints.loading import load
from jaxsteer.errors import UserError
from jaxsteer.objectives import Objective
from jaxsteer.prompt_search import Task, standardise
from jaxsteer.prompt_search.algorithms.probe_sampling import Draft, PairedObjective, with_draft
from jaxsteer.study.objective_stage import Say, find_aim, task_of
from jaxsteer.study.setting import Setting, prepare


def drafted(setting: Setting, task: Task, objective: Objective, say: Say) -> tuple[Task, Objective]:
    """Task and objective with what stands for them in ``--draft MODEL``, if one was given.

    The draft's direction is made from the same train questions and read at the site that its own probe chooses; an
    objective by name is that of the draft's own logits. Raises ``UserError`` for a draft of another tokenizer.
    """
    options = setting.options
    if options.draft is None:
        return task, objective
    if setting.sae is not None:
        raise UserError("--draft has no sparse autoencoder to read: use it with --method resga or with --objective")
    own = dataclasses.replace(options, model=options.draft, site="auto", init=None, init_from=None)
    model = load(options.draft, dtype=options.dtype, mesh=setting.model.mesh)
    beside = prepare(own, model, setting.persona, setting.custom)
    same = len(model.tokenizer) == len(setting.model.tokenizer) and all(
        a.tolist() == b.tolist() for a, b in zip(beside.slots.before, setting.slots.before, strict=True)
    )
    if not same:
        raise UserError(
            f"--draft {options.draft} has another tokenizer than {options.model}: give a model that shares it"
        )
    raw = find_aim(beside, say).objective
    draft_task = task_of(beside, raw)
    standard, _ = standardise(model.params, draft_task, raw, seed=options.seed)
    paired = PairedObjective(target=objective, draft=raw if options.raw_units else standard)
    return with_draft(task, Draft(params=model.params, task=draft_task)), paired
