"""A small search to test against: a tiny model, three contexts of unequal length with a tail, a projection."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.config import ModelConfig
from jaxsteer.objectives import Projection, needs
from jaxsteer.prompt_search import Hooks, Resources, SearchResult, make_task, run_search
from jaxsteer.prompts import Conversation, allowed_tokens, build_slots, question_conversation
from tests.helpers.tiny import tiny_model

QUESTIONS = ("I think the answer is clear.", "Do you agree or disagree? I want evidence.", "Which do you prefer?")


def setting(
    *, kind: str = "organism", contexts: int = 3, length: int = 6, site: str = "blocks.1.hook_resid_post", batch=8
) -> SimpleNamespace:
    """Model, slots, objective and task, for ``contexts`` questions with a decision tail (or the bare slot for 0)."""
    model = tiny_model(kind)
    if contexts:
        conversations = [question_conversation(q, alternatives=("(A)", "(B)")) for q in QUESTIONS[:contexts]]
        slots = build_slots(model.tokenizer, conversations, length)
    else:
        slots = build_slots(model.tokenizer, [Conversation(text="{prompt}")], length, read="slot_last")
    delta = jax.random.normal(jax.random.key(7), (model.config.d_model,))
    objective = Projection(delta=delta, site=site)
    wanted = needs(objective, model.config)
    allowed = allowed_tokens(model.tokenizer, model.config.vocab_size, word_initial=True)
    task = make_task(model.params, model.config, slots, needs=wanted, allowed=allowed, batch=batch)
    return SimpleNamespace(
        model=model, slots=slots, objective=objective, needs=wanted, allowed=allowed, task=task, delta=np.asarray(delta)
    )


def gemma_like(config: ModelConfig) -> ModelConfig:
    """The same sizes with everything that another family would switch on."""
    return dataclasses.replace(
        config,
        embed_scale=True,
        windows=(4, 2**30, 4),
        attn_softcap=5.0,
        final_softcap=8.0,
        norm_plus_one=True,
        activation="gelu_tanh",
    )


def random_prompts(task, rows: int, seed: int = 0) -> jnp.ndarray:
    """Allowed ids, uniformly drawn on the host."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.choice(np.asarray(task.ids), (rows, task.length)), jnp.int32)


def search_with(*args: Any, steps: int, store: Any = None, **options: Any) -> SearchResult:
    """``run_search`` with the fields of ``Hooks`` and ``Resources`` side by side."""
    hooks = {field.name: options.pop(field.name) for field in dataclasses.fields(Hooks) if field.name in options}
    return run_search(*args, steps=steps, hooks=Hooks(**hooks), resources=Resources(**options), store=store)
