"""Whether an objective works on the rows of a task: asked before anything expensive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsteer.errors import UserError
from jaxsteer.models.params import Params
from jaxsteer.objectives import Objective, as_pytree, needs
from jaxsteer.processes import to_host
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.scoring import score
from jaxsteer.prompts import PAD

SAMPLES = 4
"""Random prompts on which an objective is tried."""


def check_objective(params: Params, task: Task, objective: Objective, *, seed: int = 0) -> None:
    """Try an objective on a few random allowed prompts in the contexts of its task.

    Raises ``UserError`` when it reads what the task was not made for, reads a span that has no tokens, fails, does not
    return one finite float per row, or lets rows depend on each other; the message says what it returned.
    """
    _check_needs(task, objective)
    objective = as_pytree(objective)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(task.ids), (2 * SAMPLES - 1, task.length)).astype(np.int32)
    drawn[:, 0] = rng.choice(np.asarray(task.first_ids), len(drawn))
    drawn[1, : task.length - task.least] = PAD  # the shortest there is
    ids, company = drawn[:SAMPLES], np.concatenate([drawn[:1], drawn[SAMPLES:]])
    scorer = jax.jit(score)
    f, x = to_host(scorer(params, task, objective, jnp.asarray(ids)))
    if not np.isfinite(f).all():
        raise UserError(
            f"the objective is not finite: for {SAMPLES} random prompts it returned {f.tolist()} (average over "
            f"{task.contexts} contexts), while their cross-entropies are {np.round(x, 2).tolist()}. Look for divisions "
            "by zero, logarithms of zero, ids beyond the vocabulary and NaN in its arrays"
        )
    again = float(to_host(scorer(params, task, objective, jnp.asarray(company)))[0][0])
    if abs(again - f[0]) > 1e-5 * float(np.abs(f).max()):  # the same program on other rows: equal to the bit
        raise UserError(
            f"the objective scores rows by their company: one prompt got {f[0]:.6g} among some prompts and {again:.6g} "
            "among others. Every row must be scored by itself: take means and norms over the last axis, not over rows"
        )


def check_scores(f: Float[np.ndarray, "n P"], first: int) -> None:
    """Refuse first populations of the problems ``first``, ``first + 1`` ... without a single finite score."""
    bad = np.flatnonzero(~np.isfinite(f).any(axis=1))
    if len(bad):
        raise UserError(
            f"no first prompt of problem {first + int(bad[0])} has a finite score ({len(bad)} of {len(f)} problems are "
            f"so): look for NaN in the arrays of its objective, and whether given prompts break every constraint"
        )


def _check_needs(task: Task, objective: Objective) -> None:
    wanted = needs(objective, task.config)
    missing = [
        *sorted(set(wanted.sites) - set(task.needs.sites)),
        *(f"{site} over the {span}" for site, span in sorted(set(wanted.spans) - set(task.needs.spans))),
        *(["logits"] if wanted.logits and not task.needs.logits else []),
        *(["the target's log-probability"] if wanted.target and not task.needs.target else []),
    ]
    if missing:
        raise UserError(
            f"the objective reads {', '.join(missing)}, but the task was made for another: give make_task "
            "needs=needs(objective, config) of this one"
        )
    if any(span == "tail" for _, span in wanted.spans) and not bool(task.after_mask.any(-1).all()):
        raise UserError(
            "the objective reads the tail, but in some context no token stands between the prompt and the read position"
        )
