"""Objectives that cannot work fail on a few real rows, before anything expensive."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.objectives import LogitDifference, Projection, TargetLogProb, needs
from jaxsteer.prompt_search import EpoConfig, make_problem, make_task, run_search
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompt_search.checking import check_objective, check_scores
from jaxsteer.prompts import Conversation, build_slots
from tests.prompt_search.setting import setting

SITE = "blocks.0.hook_resid_post"
S = setting(contexts=2, site=SITE)


def test_a_sound_objective_passes() -> None:
    check_objective(S.model.params, S.task, S.objective)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (Projection(delta=jnp.full(32, jnp.nan), site=SITE), r"4 random prompts it returned \[nan, nan, nan, nan\]"),
        (lambda reads: jnp.log(reads[SITE][:, 0] - 9), "not finite: .*nan"),
        (lambda reads: reads[SITE][:, 0] / (reads[SITE][:, 0] - reads[SITE][:, 0]), "divisions by zero"),
        (lambda reads: (reads[SITE] / jnp.linalg.norm(reads[SITE], axis=0))[:, 0], "by their company: one prompt"),
        (Projection(delta=jnp.ones(32), site="layers.1"), "reads layers.1, but the task was made for another"),
        (lambda reads: reads.logits[:, 0], "reads logits, but the task"),
        (lambda reads: reads.span_mean(SITE, "tail")[:, 0], "blocks.0.hook_resid_post over the tail, but the task"),
    ],
)  # fmt: skip
def test_the_message_says_what_it_returned(objective, says: str) -> None:  # noqa: ANN001
    with pytest.raises(UserError, match=says):
        check_objective(S.model.params, S.task, objective)


def test_token_ids_are_needed_for_every_context() -> None:
    ids = jnp.arange(2, dtype=jnp.int32)
    objective = LogitDifference(plus=ids, minus=ids + 5)
    three = setting(contexts=3, site=SITE)
    task = make_task(
        three.model.params, three.model.config, three.slots, needs=needs(objective, S.model.config), allowed=S.allowed
    )
    with pytest.raises(UserError, match="not finite"):
        check_objective(S.model.params, task, objective)


def test_a_tail_or_a_target_that_is_not_there() -> None:
    slots = build_slots(S.model.tokenizer, [Conversation(text="{prompt}")], 4, read="slot_last")

    def task_for(objective):  # noqa: ANN001, ANN202
        wanted = needs(objective, S.model.config)
        return make_task(S.model.params, S.model.config, slots, needs=wanted, allowed=S.allowed)

    tail = dataclasses.replace(S.objective, at="tail")
    with pytest.raises(UserError, match="no token stands between the prompt and the read position"):
        check_objective(S.model.params, task_for(tail), tail)
    with pytest.raises(UserError, match="target answer, but the task has none"):
        check_objective(S.model.params, task_for(TargetLogProb()), TargetLogProb())
    assert isinstance(jax.tree.leaves(tail)[0], jax.Array)


def test_a_search_refuses_before_it_compiles(compile_counter) -> None:  # noqa: ANN001
    """The first problem's objective is tried before the search is planned; the others' first scores are looked at."""
    search = epo(EpoConfig(population=2, children=2, top_k=4))
    broken = dataclasses.replace(S.objective, delta=jnp.full(32, jnp.nan))
    with compile_counter() as count, pytest.raises(UserError, match="the objective is not finite"):
        run_search(S.model.params, S.task, [make_problem(broken, 2)], search, steps=2)
    assert not {"start", "advance"} & set(count.names())
    check_scores(np.asarray([[-np.inf, 1.0], [0.0, 2.0]]), 0)  # a prompt that is not allowed has -inf
    with pytest.raises(UserError, match=r"no first prompt of problem 5 has a finite score \(1 of 2"):
        check_scores(np.asarray([[-np.inf, 1.0], [-np.inf, -np.inf]]), 4)
