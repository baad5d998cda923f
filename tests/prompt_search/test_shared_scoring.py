"""Children scored from the token on where they leave their parents: the numbers of whole prompts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.objectives import as_pytree, needs
from jaxsteer.prompt_search import Combination, make_task
from jaxsteer.prompt_search.scoring import score
from jaxsteer.prompt_search.shared_scoring import score_children, shares, starts, stratified
from tests.prompt_search.setting import gemma_like, random_prompts, setting

whole = jax.jit(score)
shared = jax.jit(score_children, static_argnums=5)


def brood(task, positions: tuple[int, ...], parents: int = 2, seed: int = 0) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Parents, and children that differ from them at their first position, and sometimes later too."""
    rng = np.random.default_rng(seed)
    adults = np.asarray(random_prompts(task, parents, seed))
    children = np.repeat(adults[:, None], len(positions), axis=1)
    for e, position in enumerate(positions):
        for at in {position, int(rng.integers(position, task.length))}:
            children[:, e, at] = rng.choice(np.asarray(task.ids), parents)
    return jnp.asarray(adults), jnp.asarray(children.reshape(-1, task.length), jnp.int32)


def agree(s, task, objective, positions: tuple[int, ...], parents: int = 2) -> None:
    assert shares(task, positions)
    adults, children = brood(task, positions, parents)
    f, x = shared(s.model.params, task, objective, adults, children, positions)
    want_f, want_x = whole(s.model.params, dataclasses.replace(task, batch=64), objective, children)
    np.testing.assert_allclose(f, want_f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x, want_x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("contexts", "kind", "children"),
    [(3, "organism", 8), (0, "qwen", 5)],
    ids=["tails of unequal length", "no BOS and an odd number"],
)
def test_shared_scores_are_whole_scores(contexts: int, kind: str, children: int) -> None:
    s = setting(contexts=contexts, kind=kind, batch=64)
    agree(s, s.task, s.objective, starts(children, s.task.length))


@pytest.mark.parametrize("batch", [1])
def test_micro_batches_change_nothing(batch: int) -> None:
    """One pair of one parent at a time, against all parents at once."""
    s = setting(contexts=0, batch=batch, length=4)
    agree(s, s.task, s.objective, starts(4, 4), parents=4)


def test_windows_soft_caps_and_multipliers() -> None:
    """A window of 4 ends inside the parent for some tokens and inside the context for others."""
    s = setting(contexts=2)
    task = make_task(
        s.model.params,
        gemma_like(s.model.config),
        s.slots,
        needs=s.needs,
        allowed=s.allowed,
        combine=Combination("worst"),
    )
    agree(s, task, s.objective, (0, 2, 3, 5))


def test_logits_neurons_and_context_numbers_are_read_too() -> None:
    s = setting(contexts=2)

    def objective(reads):
        neurons = reads["blocks.1.mlp.hook_post"][:, 3] + reads["blocks.0.attn.hook_z"][:, 0, 1]
        return jax.nn.log_softmax(reads.logits)[:, 5] * (1 + reads.context) + neurons

    wanted = needs(objective, s.model.config)
    task = make_task(s.model.params, s.model.config, s.slots, needs=wanted, allowed=s.allowed)
    agree(s, task, as_pytree(objective), starts(6, 6))


def test_what_only_parents_run_is_scored_whole() -> None:
    s = setting(contexts=1)
    span = needs(lambda reads: reads.span_mean("blocks.0.hook_resid_post")[:, 0], s.model.config)
    pattern = needs(lambda reads: reads["blocks.0.attn.hook_pattern"][:, 0, 0], s.model.config)
    for wanted in (span, pattern):
        task = make_task(s.model.params, s.model.config, s.slots, needs=wanted, allowed=s.allowed)
        assert not shares(task, starts(6, 6))
    assert not shares(s.task, (0, 0, 0))


def test_narrow_models_are_scored_on_any_backend() -> None:
    """In bfloat16 with several contexts: products that XLA's CPU backend does not know are widened."""
    s = setting(contexts=2)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), s.model.params)
    task = make_task(params, s.model.config, s.slots, needs=s.needs, allowed=s.allowed)
    positions = starts(6, 6)
    adults, children = brood(task, positions)
    _, x = shared(params, task, s.objective, adults, children, positions)
    _, want = whole(s.model.params, s.task, s.objective, children)
    np.testing.assert_allclose(x, want, rtol=0.03)


@pytest.mark.parametrize(("children", "length"), [(32, 8), (8, 12), (5, 3), (3, 7), (1, 4)])
def test_positions_are_uniform_and_never_before_their_start(children: int, length: int) -> None:
    positions = np.asarray(stratified(jax.random.key(0), 4000, children, length))
    assert (positions >= np.asarray(starts(children, length))).all() and positions.max() == length - 1
    share = np.bincount(positions.reshape(-1), minlength=length) / positions.size
    np.testing.assert_allclose(share, 1 / length, atol=0.02)
