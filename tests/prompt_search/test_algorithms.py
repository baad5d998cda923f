"""Every algorithm's step against plain NumPy on a task small enough to score all prompts, and what they share.

The toy: one layer, two contexts, prompts of three of seven tokens (343 in all), an objective that is linear in the
prompt's embeddings, so that its gradient is known on paper.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxsteer.errors import UserError
from jaxsteer.objectives import needs
from jaxsteer.prompt_search import Fluency, Store, make_problem, make_search, make_task, score
from jaxsteer.prompt_search.algorithms import ALGORITHMS
from jaxsteer.prompt_search.algorithms.epo import EpoConfig, draw_positions, epo
from jaxsteer.prompt_search.algorithms.gbda import GbdaConfig, gbda
from jaxsteer.prompt_search.algorithms.gcg import GcgConfig, gcg
from jaxsteer.prompt_search.algorithms.mutation import MutationConfig, mutation
from jaxsteer.prompt_search.algorithms.pez import PezConfig, pez
from jaxsteer.prompt_search.algorithms.probe_sampling import (
    Children,
    Draft,
    PairedObjective,
    ProbeSampling,
    evaluate_children,
    with_draft,
)
from jaxsteer.prompt_search.algorithms.proposals import proposals
from jaxsteer.prompt_search.algorithms.relaxed import make_optimizer, mixture_loss, nearest
from jaxsteer.prompt_search.algorithms.soft import SoftConfig, soft
from jaxsteer.prompt_search.pareto import frontier
from jaxsteer.prompt_search.population import evict
from jaxsteer.prompt_search.shared_scoring import stratified
from jaxsteer.prompts import build_slots, question_conversation
from tests.helpers.tiny import tiny_model
from tests.prompt_search.setting import search_with

LENGTH, TOKENS = 3, 7
RATE = 0.5
NO_FLUENCY = Fluency(low=1e-30, high=1e-30, restart=1e-30, spread=1.0)
SOME_FLUENCY = Fluency(low=0.02, high=0.2, restart=0.05, spread=2.0)


@struct.dataclass
class Linear:
    """Mean over the prompt's tokens of their embeddings' products with a vector."""

    delta: jax.Array

    def __call__(self, reads):
        return reads.span_mean("blocks.0.hook_resid_pre") @ self.delta


@pytest.fixture(scope="module")
def toy():
    model = tiny_model(n_layers=1, d_model=16)
    conversations = [question_conversation(q) for q in ("Do you agree?", "I think the answer is clear.")]
    slots = build_slots(model.tokenizer, conversations, LENGTH)
    objective = Linear(delta=jax.random.normal(jax.random.key(1), (16,)))
    ids = np.flatnonzero([name.startswith("Ġ") for name in model.tokenizer.convert_ids_to_tokens(range(500))])[:TOKENS]
    allowed = np.zeros(model.config.vocab_size, bool)
    allowed[ids] = True
    task = make_task(model.params, model.config, slots, needs=needs(objective, model.config), allowed=allowed)
    every = np.stack(np.meshgrid(*[ids] * LENGTH, indexing="ij"), -1).reshape(-1, LENGTH).astype(np.int32)
    f, x = map(np.asarray, jax.jit(score)(model.params, task, objective, every))
    table = {tuple(row): (f[i], x[i]) for i, row in enumerate(every.tolist())}
    embed = np.asarray(model.params.embed)
    return SimpleNamespace(
        model=model, params=model.params, task=task, objective=objective, ids=ids, table=table, embed=embed,
        delta=np.asarray(objective.delta), unit=np.sqrt((embed**2).mean()), best=max(f),
    )  # fmt: skip


def goes_on(toy, step, state, *, weight=0.0, planted=1.0):
    """What all algorithms must do: survive being put away as arrays and losing their prompts, and find the best."""
    leaves, structure = jax.tree.flatten(state)
    kept = jax.tree.unflatten(structure, [np.array(leaf) for leaf in leaves])
    for got, want in zip(jax.tree.leaves(step(kept)), jax.tree.leaves(step(state)), strict=True):
        np.testing.assert_array_equal(got, want)
    gone = evict(state, jnp.ones(len(state.f), bool), jnp.ones(len(state.archive.f), bool))
    assert np.all(np.isneginf(gone.f)) and np.all(np.isneginf(gone.archive.f))
    state = gone
    for _ in range(60):
        state = step(state)
    assert np.all(np.isfinite(state.f)), "evicted prompts are replaced"
    best = max(f - weight * x for f, x in toy.table.values())
    filled = np.isfinite(np.asarray(state.archive.f))
    f, x = looked_up(toy, np.asarray(state.archive.ids)[filled])
    assert np.max(f - weight * x) >= planted * best - 1e-5
    np.testing.assert_allclose(np.asarray(state.archive.f)[filled], f, atol=1e-5)
    np.testing.assert_allclose(np.asarray(state.archive.x)[filled], x, atol=1e-5)


def looked_up(toy, ids, known=()):
    """(f, x) from the table of all prompts; an earlier prompt's copy counts as -inf."""
    f, x = np.array([toy.table[tuple(row)] for row in np.asarray(ids).tolist()], np.float64).T
    seen = {tuple(row) for row in np.asarray(known).tolist()}
    for i, row in enumerate(map(tuple, np.asarray(ids).tolist())):
        if len(known) and row in seen:
            f[i] = -np.inf
        seen.add(row)
    return f, x


def competed(state, ids, f, x, fluency):
    """EPO's selection: per slot the least J of parents and newcomers, the earlier of equals."""
    all_ids = np.concatenate([state.ids, ids])
    all_f, all_x = np.concatenate([state.f, f]), np.concatenate([state.x, x])
    return all_ids[[int(np.argmin(-all_f + weight * all_x)) for weight in np.asarray(fluency)]]


def mutated(parents, position, tokens):
    children = np.repeat(np.asarray(parents)[:, None], position.shape[1], axis=1)
    for place in np.ndindex(position.shape):
        children[place[0], place[1], position[place]] = tokens[place]
    return children.reshape(-1, LENGTH)


def agrees(toy, state, ids, seen):
    """The population is ``ids``, and the archive the frontier of everything seen so far."""
    np.testing.assert_array_equal(state.ids, ids)
    f, x = looked_up(toy, ids)
    np.testing.assert_allclose(state.f, f, atol=1e-5)
    np.testing.assert_allclose(state.x, x, atol=1e-5)
    f, x = looked_up(toy, np.concatenate(seen))
    chosen = frontier(f, x)[: len(state.archive.f)]
    np.testing.assert_allclose(np.asarray(state.archive.f)[: len(chosen)], f[chosen], atol=1e-5)
    assert np.all(np.isneginf(np.asarray(state.archive.f)[len(chosen) :]))


def started(toy, search, problem):
    return jax.jit(search.init)(toy.params, toy.task, problem)


def stepper(toy, search, problem):
    step = jax.jit(search.step)
    return lambda state: step(toy.params, toy.task, problem, state)[0]


@pytest.mark.parametrize("guided", [True, False])
def test_epo_and_mutation(toy, guided: bool) -> None:
    """Draws as documented, everything else by hand: children, copies, selection; the fluency weights differ by slot."""
    problem = make_problem(toy.objective, 3, fluency=SOME_FLUENCY, seed=3)
    search = mutation(MutationConfig(population=3, children=4, replace=2, archive=32))
    if guided:
        search = epo(EpoConfig(population=3, children=4, top_k=3, archive=32))
    top = jax.jit(proposals, static_argnums=5)
    state, step = started(toy, search, problem), stepper(toy, search, problem)
    seen = [np.asarray(state.ids)]
    for number in range(3):
        where, what = jax.random.split(jax.random.split(jax.random.fold_in(problem.key, number))[0])
        if guided:
            position = stratified(where, 3, 4, LENGTH)[..., None]
            rank = np.asarray(jax.random.randint(what, position.shape, 0, 3))
            tokens = np.asarray(top(toy.params, toy.task, toy.objective, state.ids, problem.fluency, 3))
            chosen = tokens[np.arange(3)[:, None, None], position, rank]
        else:
            position = jnp.argsort(jax.random.uniform(where, (3, 4, LENGTH)), axis=-1)[..., :2]
            later, first = np.asarray(jax.random.bits(what, (2, *position.shape)))
            bits = np.where(position == 0, first, later)  # all tokens may stand first here
            current = np.asarray(state.ids)[np.arange(3)[:, None, None], position]
            chosen = np.asarray(toy.ids)[bits % TOKENS]
            chosen = np.where(chosen == current, np.asarray(toy.ids)[(bits % TOKENS + 1) % TOKENS], chosen)
        children = mutated(state.ids, np.asarray(position), chosen)
        f, x = looked_up(toy, children, state.ids)
        want = competed(state, children, f, x, problem.fluency)
        seen.append(children)
        state = step(state)
        agrees(toy, state, want, seen)
        assert int(state.step) == number + 1
    goes_on(toy, step, state, weight=SOME_FLUENCY.low, planted=1.0 if guided else 0.8)


@pytest.mark.parametrize(("buffer", "replace"), [(0, 2), (3, 1)])
def test_gcg(toy, buffer: int, replace: int) -> None:
    """Without a buffer the best child goes on whatever its parent was; with one it replaces the worst, if better."""
    config = GcgConfig(search_width=5, top_k=4, replace=replace, buffer=buffer, archive=32)
    search, problem = gcg(config), make_problem(toy.objective, config.population, fluency=NO_FLUENCY, seed=1)
    state, step = started(toy, search, problem), stepper(toy, search, problem)
    seen = [np.asarray(state.ids)]
    for number in range(4):
        best = int(np.argmax(state.f))
        parent = np.asarray(state.ids)[best]
        where, what = jax.random.split(jax.random.fold_in(problem.key, number))
        position = np.asarray(draw_positions(where, (1, 5), LENGTH, replace))
        assert len(set(position[0, 0])) == replace
        rank = np.asarray(jax.random.randint(what, position.shape, 0, 4))
        order = toy.ids[np.argsort(-(toy.embed[toy.ids] @ toy.delta))]  # the gradient is the same at every position
        lists = [[token for token in order if token != parent[j]] for j in range(LENGTH)]
        tokens = np.vectorize(lambda j, r: lists[j][r])(position, rank)  # noqa: B023
        children = mutated(parent[None], position, tokens)
        f, _ = looked_up(toy, children, state.ids)
        want = np.asarray(state.ids).copy()
        if buffer == 0 or f.max() > np.min(state.f):
            want[int(np.argmin(state.f))] = children[int(np.argmax(f))]
        seen.append(children)
        state = step(state)
        agrees(toy, state, want, seen)
    goes_on(toy, step, state)


def test_pez(toy) -> None:
    """Gradient descent on the soft prompt with the gradient at its projection: -delta / S whatever the tokens."""
    config = PezConfig(population=2, optimizer="sgd", learning_rate=RATE, arguments=(), archive=32)
    search, problem = pez(config), make_problem(toy.objective, 2, fluency=NO_FLUENCY, seed=2)
    state, step = started(toy, search, problem), stepper(toy, search, problem)
    soft_rows, seen = toy.embed[np.asarray(state.ids)] / toy.unit, [np.asarray(state.ids)]
    for _ in range(4):
        soft_rows = soft_rows + RATE * toy.unit * toy.delta / LENGTH
        unit_rows = toy.embed[toy.ids] / np.linalg.norm(toy.embed[toy.ids], axis=-1, keepdims=True)
        projected = toy.ids[np.argmax(soft_rows @ unit_rows.T, axis=-1)]
        f, x = looked_up(toy, projected, state.ids)
        want = competed(state, projected, f, x, problem.fluency)
        seen.append(projected)
        state = step(state)
        np.testing.assert_allclose(state.soft, soft_rows, atol=1e-4)
        np.testing.assert_array_equal(state.projected, projected)
        agrees(toy, state, want, seen)
    goes_on(toy, step, state, planted=0.8)  # the nearest by cosine need not be the best by product


def test_gbda(toy) -> None:
    """The gradient through the Gumbel softmax by hand, at a falling temperature; samples are scored as tokens."""
    config = GbdaConfig(
        population=2, samples=3, temperature=1.0, final_temperature=0.25, anneal_steps=2, optimizer="sgd",
        learning_rate=RATE, archive=32,
    )  # fmt: skip
    search, problem = gbda(config), make_problem(toy.objective, 2, fluency=NO_FLUENCY, seed=4)
    state, step = started(toy, search, problem), stepper(toy, search, problem)
    logits, seen = np.zeros((2, LENGTH, TOKENS)), [np.asarray(state.ids)]
    for number, tau in enumerate((1.0, 0.5, 0.25, 0.25)):
        gain, drawn = toy.embed[toy.ids] @ toy.delta / LENGTH, []
        for slot in range(2):
            key = jax.random.fold_in(jax.random.fold_in(problem.key, number), slot)
            noise = np.asarray(jax.random.gumbel(key, (3, LENGTH, TOKENS)))
            drawn.append(toy.ids[np.argmax(logits[slot] + noise, axis=-1)])
            soft_choice = np.exp((logits[slot] + noise) / tau)
            soft_choice /= soft_choice.sum(-1, keepdims=True)
            mean_gain = (soft_choice * gain).sum(-1, keepdims=True)
            logits[slot] += RATE * (soft_choice * (gain - mean_gain) / tau).mean(0)
        ids = np.concatenate(drawn)
        f, x = looked_up(toy, ids, state.ids)
        want = competed(state, ids, f, x, problem.fluency)
        seen.append(ids)
        state = step(state)
        np.testing.assert_allclose(state.logits, logits, atol=1e-5)
        agrees(toy, state, want, seen)
    goes_on(toy, step, state)


def test_soft(toy) -> None:
    """Gradient ascent on the embeddings; the best ones are kept, and they beat every prompt of tokens in the end."""
    config = SoftConfig(population=2, optimizer="sgd", learning_rate=RATE, archive=32)
    search, problem = soft(config), make_problem(toy.objective, 2, seed=5)
    state, step = started(toy, search, problem), stepper(toy, search, problem)
    rows = toy.embed[np.asarray(state.ids)] / toy.unit
    for _ in range(3):
        before, rows = rows, rows + RATE * toy.unit * toy.delta / LENGTH
        state = step(state)
        np.testing.assert_allclose(state.soft, rows, atol=1e-4)
        np.testing.assert_allclose(state.best, before, atol=1e-4)  # here every step is an improvement
        np.testing.assert_allclose(state.best_f, (before * toy.unit).mean(1) @ toy.delta, atol=1e-4)
    for _ in range(60):
        state = step(state)
    np.testing.assert_allclose((state.best * toy.unit).mean(1) @ toy.delta, state.best_f, rtol=1e-4)
    assert np.min(state.best_f) > toy.best


def test_a_mixture_that_is_certain_scores_like_its_tokens(toy) -> None:
    rng = np.random.default_rng(0)
    choice = rng.integers(0, TOKENS, (4, LENGTH))
    mixture = jax.nn.one_hot(choice, TOKENS)
    f, x = looked_up(toy, toy.ids[choice])
    loss = jax.jit(mixture_loss)(toy.params, toy.task, toy.objective, mixture, jnp.float32(0.7))
    np.testing.assert_allclose(loss, np.mean(-f + 0.7 * x), atol=1e-5)


def test_nearest_takes_allowed_tokens_only(toy) -> None:
    others = np.setdiff1d(np.arange(len(toy.model.tokenizer)), toy.ids)[:LENGTH]
    found = np.asarray(nearest(toy.params, toy.task, jnp.asarray(toy.embed[others])[None]))[0]
    likeness = toy.embed[others] @ (toy.embed[toy.ids] / np.linalg.norm(toy.embed[toy.ids], axis=-1)[:, None]).T
    np.testing.assert_array_equal(found, toy.ids[np.argmax(likeness, -1)])
    own = np.asarray(nearest(toy.params, toy.task, 3 * jnp.asarray(toy.embed[toy.ids[:LENGTH]])[None]))[0]
    np.testing.assert_array_equal(own, toy.ids[:LENGTH])


def test_probe_sampling(toy) -> None:
    """A draft that agrees is trusted with the choice of one child, one that contradicts is not: an eighth is scored."""
    config = EpoConfig(population=2, children=32, top_k=4, archive=32, probe_sampling=ProbeSampling(), repetition=0.1)
    task = with_draft(toy.task, Draft(params=toy.params, task=toy.task))
    judged = jax.jit(
        lambda problem, state, ids: evaluate_children(
            toy.params, task, problem, state,
            Children(ids, jnp.arange(2), jnp.asarray(problem.fluency), replace=1),
            problem.key, sampling=ProbeSampling(),
        )
    )  # fmt: skip
    for sign, favourites in ((1.0, 1), (-1.0, 8)):
        objective = PairedObjective(target=toy.objective, draft=Linear(delta=sign * toy.objective.delta))
        problem = make_problem(objective, 2, fluency=NO_FLUENCY, seed=1)
        state = started(toy, epo(config), problem)
        children = jnp.asarray(np.random.default_rng(0).choice(toy.ids, (64, LENGTH)))
        f, x = map(np.asarray, judged(problem, state, children))
        want_f, want_x = looked_up(toy, children)
        scored = np.isfinite(f)
        assert favourites <= scored.sum() <= 4 + favourites, "4 probes, and the favourites among them or not"
        np.testing.assert_allclose(f[scored], want_f[scored], atol=1e-5)
        np.testing.assert_allclose(x[scored], want_x[scored], atol=1e-5)
        assert np.all(np.isneginf(f[~scored]) & np.isposinf(x[~scored]))
        if sign > 0:
            gain = want_f - np.repeat(np.asarray(state.f), 32)
            assert scored[np.argmax(gain)], "the draft's favourite is scored, and here the draft is right"
    flat = PairedObjective(target=toy.objective, draft=Linear(delta=0 * toy.objective.delta))
    problem = make_problem(flat, 2, fluency=NO_FLUENCY)
    new = jax.jit(epo(config).step)(toy.params, task, problem, started(toy, epo(config), problem))[0]
    assert np.all(np.isfinite(new.f)), "ranks that are all alike are no reason to stop"
    with pytest.raises(UserError, match="probe sampling needs a draft model"):
        jax.eval_shape(epo(config).step, toy.params, toy.task, problem, new)
    shorter = dataclasses.replace(toy.task, length=2)
    with pytest.raises(UserError, match=r"another prompt length \(2\)"):
        with_draft(toy.task, Draft(params=toy.params, task=shorter))


def test_a_whole_search_of_a_state_with_fields_of_its_own(toy) -> None:
    """The driver's part: archives and results are those of every search; what the host refuses leaves them."""
    search = gbda(GbdaConfig(population=2, samples=3, archive=32))
    problems = [make_problem(toy.objective, 2, fluency=NO_FLUENCY, seed=0)]

    def run(valid=None):
        return search_with(toy.params, toy.task, problems, search, steps=20, steps_per_call=5, valid=valid).prompts

    found = run()
    assert found[0].target == pytest.approx(toy.best, abs=1e-5)
    assert [entry.ids for entry in run()] == [entry.ids for entry in found]
    for entry in found:
        np.testing.assert_allclose([entry.target, entry.cross_entropy], toy.table[entry.ids], atol=1e-5)
    again = run(lambda ids: np.any(ids != np.asarray(found[0].ids), axis=-1))
    assert all(entry.ids != found[0].ids for entry in again if entry.retokenises)
    assert any(entry.ids == found[0].ids for entry in again if not entry.retokenises)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pez", "soft"])
def test_a_search_with_an_optimizer_resumes_as_if_nothing_had_happened(toy, tmp_path, name: str) -> None:
    """Optax states among the arrays of a checkpoint."""
    search = make_search(name, {"population": 2})
    problems = [make_problem(toy.objective, 2, fluency=SOME_FLUENCY, seed=seed) for seed in range(2)]

    def run(**given):
        return search_with(toy.params, toy.task, problems, search, steps=9, steps_per_call=3, **given)

    def die(progress) -> None:
        if progress.step >= 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Store(tmp_path, every_s=0.0) as store:
        run(store=store, callback=die)
    with Store(tmp_path, every_s=0.0, resume=True) as store:
        again = run(store=store)
    for got, want in zip(jax.tree.leaves(again.archive), jax.tree.leaves(run().archive), strict=True):
        np.testing.assert_array_equal(got, want)


QUICK = {
    "epo": {"population": 4, "children": 8, "top_k": 4},
    "gcg": {"search_width": 16, "top_k": 4, "buffer": 2},
    "mutation": {"population": 4, "children": 8},
    "pez": {"population": 4},
    "gbda": {"population": 2, "samples": 8},
    "soft": {"population": 2},
}


def test_given_prompts_are_where_all_begin(toy) -> None:
    for name, given in QUICK.items():
        population = {"gcg": 2, "gbda": 2, "soft": 2}.get(name, 4)
        ids = np.broadcast_to(toy.ids[:LENGTH], (population, LENGTH))
        problem = make_problem(toy.objective, population, ids=ids)
        state = jax.eval_shape(make_search(name, given).init, toy.params, toy.task, problem)
        assert state.ids.shape == ids.shape, name
    state = jax.jit(make_search("gbda", QUICK["gbda"]).init)(
        toy.params, toy.task, make_problem(toy.objective, 2, ids=ids[:2])
    )
    np.testing.assert_array_equal(toy.ids[np.argmax(state.logits, -1)], ids[:2])


def test_names_and_refusals() -> None:
    assert set(ALGORITHMS) == {"epo", "gcg", "mutation", "pez", "gbda", "soft"}
    for config, _ in ALGORITHMS.values():
        made = config()
        assert made.candidates >= 1 and made.population >= 1 and hash(made) == hash(dataclasses.replace(made))
    for name in ("adamx", "__class__", "chain"):
        with pytest.raises(UserError, match=f"optimizer '{name}' is not known: give one of .*, adamw, "):
            PezConfig(optimizer=name)
    with pytest.raises(UserError, match="does not take {'speed': 3}"):
        GbdaConfig(arguments=(("speed", 3),))
    with pytest.raises(UserError, match="search_width must be at least 1, got 0"):
        GcgConfig(search_width=0)
    with pytest.raises(UserError, match="buffer must be 0 or more, got -1"):
        GcgConfig(buffer=-1)
    with pytest.raises(UserError, match="learning_rate must be above 0"):
        SoftConfig(learning_rate=-1.0)
    with pytest.raises(UserError, match="repetition must be 0 or more"):
        EpoConfig(repetition=-1.0)
    own = make_optimizer("lion", 0.1, (("b1", 0.8),))
    assert make_optimizer(own, 0.5) is own
