"""Vectors of positions (GPT-2) in a search: tokens stand where they stand in whole texts, wherever they are run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.models.model import Model
from jaxsteer.objectives import Projection, needs
from jaxsteer.prompt_search import make_task, rescore
from jaxsteer.prompt_search.scoring import score
from jaxsteer.prompt_search.shared_scoring import score_children, starts
from jaxsteer.prompts import Placement, allowed_tokens, build_slots, prompt_text, question_conversation
from tests.helpers.tiny import tiny_model
from tests.prompt_search.setting import QUESTIONS, random_prompts

whole = jax.jit(score)
shared = jax.jit(score_children, static_argnums=5)


def positioned() -> Model:
    """The tiny model with a table of positions in place of its rotation."""
    model = tiny_model()
    config = dataclasses.replace(model.config, learned_positions=True, ropes=(), rope_index=())
    table = np.random.default_rng(1).standard_normal((config.max_positions, config.d_model)) / 4
    params = dataclasses.replace(model.params, positions=jnp.asarray(table, jnp.float32))
    return dataclasses.replace(model, config=config, params=params)


def setting(slot: str, **options: bool) -> SimpleNamespace:
    model = positioned()
    conversations = [question_conversation(q, Placement(slot=slot), alternatives=("(A)", "(B)")) for q in QUESTIONS]
    slots = build_slots(model.tokenizer, conversations, 5)
    delta = jax.random.normal(jax.random.key(7), (model.config.d_model,))
    objective = Projection(delta=delta, site="blocks.1.hook_resid_post")
    allowed = allowed_tokens(model.tokenizer, model.config.vocab_size, word_initial=True)
    wanted = needs(objective, model.config)
    task = make_task(model.params, model.config, slots, needs=wanted, allowed=allowed, batch=16, **options)
    return SimpleNamespace(model=model, slots=slots, objective=objective, needs=wanted, task=task)


@pytest.mark.parametrize("slot", ["suffix", "system"])
def test_scores_of_ids_are_those_of_whole_texts(slot: str) -> None:
    """Behind texts of unequal length (suffix), and where the slot runs once for all contexts (system)."""
    s = setting(slot)
    assert s.task.slot_once == (slot == "system")
    ids = random_prompts(s.task, 3)
    f, x = whole(s.model.params, s.task, s.objective, ids)
    texts = [prompt_text(s.model.tokenizer, row) for row in np.asarray(ids)]
    again = rescore(s.model, s.slots, s.objective, s.needs, texts)
    np.testing.assert_allclose([r.target for r in again], f, atol=1e-4)
    np.testing.assert_allclose([r.cross_entropy for r in again], x, atol=1e-4)
    moved = dataclasses.replace(s.model.params, positions=jnp.roll(s.model.params.positions, 1, axis=0))
    assert np.abs(np.asarray(whole(moved, s.task, s.objective, ids)[1]) - x).min() > 1e-3


def test_children_stand_where_they_stand() -> None:
    s = setting("suffix")
    positions = starts(4, s.task.length)
    adults = random_prompts(s.task, 2)
    children = np.repeat(np.asarray(adults)[:, None], 4, axis=1)
    for e, position in enumerate(positions):
        children[:, e, position] = np.asarray(s.task.ids)[[3 + e, 9 + e]]
    brood = jnp.asarray(children.reshape(-1, s.task.length), jnp.int32)
    f, x = shared(s.model.params, s.task, s.objective, adults, brood, positions)
    want_f, want_x = whole(s.model.params, s.task, s.objective, brood)
    np.testing.assert_allclose(f, want_f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x, want_x, rtol=1e-5, atol=1e-5)
