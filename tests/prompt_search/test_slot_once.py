"""Slots with the same text before them in all contexts run once per candidate: the numbers of the plain path.

And several conversations as one objective: their mean, the worst of them, or a soft minimum.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.models.transformer import embed_tokens
from jaxsteer.objectives import Projection, as_pytree, needs
from jaxsteer.prompt_search import Combination, make_task, rescore
from jaxsteer.prompt_search.algorithms.proposals import proposals
from jaxsteer.prompt_search.scoring import cross_entropy, run_slots, score
from jaxsteer.prompts import Conversation, Placement, allowed_tokens, build_slots, prompt_text, question_conversation
from tests.helpers.tiny import tiny_model
from tests.prompt_search.setting import QUESTIONS, gemma_like, random_prompts, setting

LETTERS = ("(A)", "(B)")
scored = jax.jit(score)


def system_setting(kind: str = "llama3", gemma: bool = False, objective=None, **options) -> SimpleNamespace:
    """Three questions of unequal length under one searched system message, beside the task of the plain path."""
    model = tiny_model(kind)
    config = gemma_like(model.config) if gemma else model.config
    conversations = [question_conversation(q, Placement(slot="system"), alternatives=LETTERS) for q in QUESTIONS]
    slots = build_slots(model.tokenizer, conversations, 5)
    if objective is None:
        delta = jax.random.normal(jax.random.key(7), (config.d_model,))
        objective = Projection(delta=delta, site="blocks.1.hook_resid_post")
    allowed = allowed_tokens(model.tokenizer, config.vocab_size, word_initial=True)
    task = make_task(model.params, config, slots, needs=needs(objective, config), allowed=allowed, batch=16, **options)
    assert task.slot_once
    plain = dataclasses.replace(
        task,
        slot_once=False,
        prefix=jax.tree.map(lambda a: jnp.repeat(a, 3, axis=a.ndim - 4 if a.ndim == 5 else 0), task.prefix),
        last_hidden=jnp.repeat(task.last_hidden, 3, axis=0),
    )
    ids = random_prompts(task, 4)
    return SimpleNamespace(model=model, slots=slots, objective=as_pytree(objective), task=task, plain=plain, ids=ids)


def everywhere(reads):
    """An objective over many kinds of reads, among them attention over all keys and a context's number."""
    pattern = reads["blocks.1.attn.hook_pattern"]
    prompt = jnp.sum(pattern * reads.keys("prompt")[:, None], axis=(1, 2))
    first = jnp.sum(pattern * reads.keys("first")[:, None], axis=(1, 2))
    return prompt - 2 * first + reads.logits[:, 3] * (1 + reads.context) + reads["blocks.0.mlp.hook_post"][:, 2]


@pytest.mark.parametrize("case", ["gemma", "reads"])
def test_scores_and_gradients_are_those_of_the_plain_path(case: str) -> None:
    s = system_setting(gemma=case == "gemma", objective=everywhere if case == "reads" else None)

    def both(task):
        def loss(slot):
            f, hidden = run_slots(s.model.params, task, s.objective, slot)
            x = cross_entropy(s.model.params, task, hidden, s.ids)
            return jnp.sum(jnp.arange(1.0, 5.0) * (x - f)), (f, x)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(embed_tokens(s.model.params, task.config, s.ids))

    (_, (f, x)), gradient = both(s.task)
    (_, (want_f, want_x)), want = both(s.plain)
    np.testing.assert_allclose(f, want_f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x, want_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


def test_every_candidate_runs_its_slot_once() -> None:
    """Counted in multiplications: C slots fewer than on the plain path, less what attention looks back on."""
    s = system_setting()
    flops = [
        jax.jit(score).lower(s.model.params, task, s.objective, s.ids).cost_analysis()["flops"]  # type: ignore[index]
        for task in (s.task, s.plain)
    ]
    assert flops[0] < 0.8 * flops[1]


@pytest.mark.parametrize("how", ["soft-min"])
def test_text_gives_the_scores_of_the_ids(how: str) -> None:
    combine = Combination(how, 0.5)
    s = system_setting("organism", combine=combine)
    f, x = scored(s.model.params, s.task, s.objective, s.ids[:2])
    texts = [prompt_text(s.model.tokenizer, row) for row in np.asarray(s.ids[:2])]
    again = rescore(s.model, s.slots, s.objective, s.task.needs, texts, combine=combine)
    np.testing.assert_allclose([r.target for r in again], f, atol=1e-4)
    np.testing.assert_allclose([r.cross_entropy for r in again], x, atol=1e-4)


@pytest.mark.slow
def test_proposals_are_those_of_the_plain_path() -> None:
    s = system_setting()
    fluency = jnp.asarray([0.5, 3.0])
    got, want = (
        np.asarray(jax.jit(proposals, static_argnums=5)(s.model.params, task, s.objective, s.ids[:2], fluency, 5))
        for task in (s.task, s.plain)
    )
    assert (got == want).mean() > 0.95  # near ties may swap


def test_slots_that_are_read_or_differ_run_in_every_context() -> None:
    assert not setting(contexts=3).task.slot_once  # other questions stand before the slot
    model = tiny_model()
    conversations = [Conversation(text=f"{{prompt}} {q}") for q in QUESTIONS]
    delta = jax.random.normal(jax.random.key(7), (model.config.d_model,))
    objective = Projection(delta=delta, site="blocks.1.hook_resid_post")
    allowed = np.ones(model.config.vocab_size, bool)
    for read, expected in (("input_last", True), ("slot_last", False)):
        slots = build_slots(model.tokenizer, conversations, 4, read=read)
        task = make_task(model.params, model.config, slots, needs=needs(objective, model.config), allowed=allowed)
        assert task.slot_once == expected


def test_a_soft_minimum_lies_between_the_worst_and_the_mean() -> None:
    scores = jnp.asarray([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    weight = jnp.full(3, 1 / 3)
    np.testing.assert_allclose(Combination()(scores, weight), [4.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(Combination("worst")(scores, weight), [1.0, 5.0])
    np.testing.assert_allclose(Combination("soft-min", 1e-2)(scores, weight), [1.0, 5.0], atol=0.02)
    np.testing.assert_allclose(Combination("soft-min", 1e4)(scores, weight), [4.0, 5.0], atol=1e-2)
    middle = float(Combination("soft-min")(scores, weight)[0])
    assert 1.0 < middle < 4.0
    assert middle == pytest.approx(-np.log(np.mean(np.exp([-1.0, -3.0, -8.0]))), rel=1e-6)


@pytest.mark.parametrize("options", [{"how": "median"}, {"how": "soft-min", "temperature": 0.0}])
def test_combinations_that_cannot_be_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match="combine"):
        Combination(**options)
