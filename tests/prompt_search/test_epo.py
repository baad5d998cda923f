"""EPO's rules: slots keep their weights and order, restarts, determinism, sharding, one compilation, planted optima."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.prompt_search import FLUENCY, EpoConfig, Fluency, make_problem, score, standardise
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompt_search.algorithms.epo import mutate
from jaxsteer.prompt_search.driver import Progress
from jaxsteer.prompt_search.population import select
from jaxsteer.prompts import retokenises_many
from tests.prompt_search.setting import search_with, setting

QUICK = EpoConfig(population=4, children=8, top_k=32, restart_every=5, archive=16)
STEPS = 12


@pytest.fixture(scope="module")
def s():
    return setting()


def run(s, *, objective=None, seed=0, problems=1, ids=None, steps=STEPS, **kwargs):
    kwargs.setdefault("steps_per_call", 3)  # one compilation serves most tests
    objective = s.objective if objective is None else objective
    every = [make_problem(objective, 4, seed=seed, restart=i, ids=ids) for i in range(problems)]
    return search_with(s.model.params, s.task, every, epo(QUICK), steps=steps, **kwargs)


def test_mutate_changes_one_token_to_a_proposal() -> None:
    parents = jnp.arange(12).reshape(3, 4)
    tokens = 100 + jnp.arange(3 * 4 * 5).reshape(3, 4, 5)
    children = np.asarray(mutate(jax.random.key(0), parents, tokens, 50)).reshape(3, 50, 4)
    changed = children != np.asarray(parents)[:, None]
    assert (changed.sum(-1) == 1).all()
    for p, e, j in np.argwhere(changed):
        assert children[p, e, j] in np.asarray(tokens)[p, j]
    assert {int(j) for _, _, j in np.argwhere(changed)} == {0, 1, 2, 3}


def test_select_keeps_slots_and_prefers_parents_on_ties() -> None:
    f, x = jnp.asarray([1.0, 0.0, 1.0, 3.0]), jnp.asarray([1.0, 0.0, 1.0, 4.0])
    chosen, loss = select(f, x, jnp.asarray([0.1, 1.0, 5.0]))
    assert chosen.tolist() == [3, 0, 1]  # greedy slot: best f; middle slot: tie of 0, 1 and 2 goes to the first
    np.testing.assert_allclose(loss, [-2.6, 0.0, 0.0], atol=1e-6)


def test_defect_06_slots_keep_their_fluency_weights(s) -> None:
    search, problem = epo(QUICK), make_problem(s.objective, 4)
    state = search.init(s.model.params, s.task, problem)
    step = jax.jit(search.step)
    weights = np.geomspace(0.5, 4.0, 4)
    for _ in range(3):
        before = -np.asarray(state.f) + weights * np.asarray(state.x)
        state, summary = step(s.model.params, s.task, problem, state)
        after = -np.asarray(state.f) + weights * np.asarray(state.x)
        assert (after <= before + 1e-6).all(), "a slot may only improve between restarts"
        np.testing.assert_allclose(summary.loss, after, atol=1e-5)


def test_defects_07_and_08_restarts(s) -> None:
    """No restart at step 0; at step 5 every slot holds the best member under a weight drawn from the stated range."""
    fluency = Fluency(low=0.5, high=100.0, restart=2.0, spread=1.5)
    search, problem = epo(QUICK), make_problem(s.objective, 4, seed=3, fluency=fluency)
    state = search.init(s.model.params, s.task, problem)
    step = jax.jit(search.step)
    populations = []
    for _ in range(6):
        state, _ = step(s.model.params, s.task, problem, state)
        populations.append(np.asarray(state.ids))
    assert len(np.unique(populations[0], axis=0)) > 1
    assert len(np.unique(populations[5], axis=0)) == 1


@pytest.mark.slow
def test_archive_scores_are_the_scores_of_their_prompts(s) -> None:
    """Defects 9 and 10: contexts are fixed and nobody keeps a lucky score."""
    found = run(s).prompts
    ids = jnp.asarray([entry.ids for entry in found])
    f, x = jax.jit(score)(s.model.params, s.task, s.objective, ids)
    np.testing.assert_allclose([entry.target for entry in found], f, atol=1e-5)
    np.testing.assert_allclose([entry.cross_entropy for entry in found], x, atol=1e-5)


def test_result_is_a_frontier_best_first(s) -> None:
    """Defect 5: ordered by target, and nothing on it is dominated."""
    found = run(s, problems=2).prompts
    target = np.array([entry.target for entry in found])
    entropy = np.array([entry.cross_entropy for entry in found])
    assert (np.diff(target) < 0).all() and (np.diff(entropy) < 0).all()
    assert np.asarray(s.allowed)[np.array([entry.ids for entry in found])].all()


@pytest.mark.slow
def test_same_seed_same_prompts_on_one_and_eight_devices_and_in_any_company(s) -> None:
    alone = run(s, seed=5).prompts
    assert [f.ids for f in run(s, seed=5).prompts] == [f.ids for f in alone]
    assert [f.ids for f in run(s, seed=6).prompts] != [f.ids for f in alone]
    mesh = jaxsteer.make_mesh(prompts=8)
    many, sharded = run(s, seed=5, problems=10), run(s, seed=5, problems=10, mesh=mesh)
    assert [(f.problem, f.ids) for f in many.prompts] == [(f.problem, f.ids) for f in sharded.prompts]
    packed = {f.ids for f in many.prompts if f.problem == 0}
    assert packed <= {f.ids for f in alone}


def test_the_step_compiles_once(s, compile_counter) -> None:
    seen: list[Progress] = []
    with compile_counter() as count:
        run(s, seed=8, callback=seen.append, steps_per_call=5)
        names = count.names()
    assert [progress.step for progress in seen] == [5, 10, 12]
    assert names["advance"] <= 1 and names["start"] <= 1, "compiled here, or before by another test"
    assert seen[-1].candidates == 12 * 32
    with compile_counter() as count:
        run(s, seed=9, callback=seen.append, steps_per_call=5)
        assert count["advance"] == 0 and count["start"] == 0, "another search of the same shapes compiles nothing"


@pytest.mark.slow
def test_better_than_random_search_with_as_many_evaluations(s) -> None:
    objective, units = standardise(s.model.params, s.task, s.objective, samples=256)
    assert units["scale"] > 0
    best = run(s, objective=objective).prompts[0].target
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.choice(np.asarray(s.task.ids), (12 * 32, 6)), jnp.int32)
    f, _ = jax.jit(score)(s.model.params, s.task, objective, ids)
    assert best > float(f.max())
    assert abs(float(f.mean())) < 0.3 and 0.7 < float(f.std()) < 1.3


def test_flipping_the_objective_flips_the_prompts(s) -> None:
    up = run(s).prompts[0]
    down = run(s, objective=s.objective.replace(delta=-s.objective.delta)).prompts[0]
    assert up.target > -down.target


def test_prompts_that_do_not_retokenise_are_marked_and_never_lead(s) -> None:
    """What ends in a multiple of 4 is declared broken and leaves the frontier."""
    result = run(s, valid=lambda ids: ids[:, -1] % 4 > 0)
    good = [entry for entry in result.prompts if entry.retokenises]
    assert good and all(entry.ids[-1] % 4 > 0 for entry in good)
    assert all(entry.ids[-1] % 4 == 0 for entry in result.prompts if not entry.retokenises)
    everything = retokenises_many(s.model.tokenizer, s.slots, np.array([entry.ids for entry in good]))
    assert everything.shape == (len(good),)


def test_interrupt_keeps_what_was_found(s) -> None:
    def stop(progress: Progress) -> None:
        if progress.step >= 6:
            raise KeyboardInterrupt

    result = run(s, callback=stop)
    assert result.interrupted and result.steps == 6 and result.prompts


def test_initial_prompts_are_used(s) -> None:
    ids = np.broadcast_to(np.asarray(s.task.ids)[:6], (4, 6))
    found = run(s, steps=1, ids=ids).prompts
    assert all(np.sum(np.array(entry.ids) != ids[0]) <= 1 for entry in found)


def test_presets_are_the_published_ones() -> None:
    assert FLUENCY["strict"].weights(16)[[0, -1]].tolist() == pytest.approx([2, 12])
    assert FLUENCY["medium"].weights(16)[[0, -1]].tolist() == pytest.approx([0.5, 4])
    assert FLUENCY["loose"].weights(16)[[0, -1]].tolist() == pytest.approx([0.05, 0.5])
    with pytest.raises(UserError, match="population must be at least 1"):
        EpoConfig(population=0)


def test_a_flat_objective_is_refused(s) -> None:
    with pytest.raises(UserError, match="must depend on the prompt"):
        standardise(s.model.params, s.task, s.objective.replace(delta=jnp.zeros(32)), samples=16)
