"""Prompts of different lengths in one program: scores, gradients and texts are those of their own length."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.objectives import Projection, TargetLogProb, as_pytree, needs
from jaxsteer.prompt_search import Store, TokenMask, make_problem, make_search, make_task, rescore, score
from jaxsteer.prompt_search.algorithms.proposals import proposals, proposals_and_insertions
from jaxsteer.prompt_search.constraints import repetition, text_filter
from jaxsteer.prompt_search.lengths import DELETE, INSERT, SWAP, Mutations, apply_mutations, draw_mutations
from jaxsteer.prompt_search.population import random_ids
from jaxsteer.prompts import (
    PAD,
    Conversation,
    Placement,
    allowed_tokens,
    build_slots,
    first_allowed,
    prompt_text,
    question_conversation,
    retokenises_many,
    with_target,
)
from tests.helpers.tiny import tiny_model
from tests.prompt_search.setting import QUESTIONS, gemma_like, search_with

LEAST, MOST = 2, 6
scored = jax.jit(score)


def spans(reads):
    """Reads of the prompt as a whole: its mean, what is attended to, and the text's first token."""
    pattern = reads["blocks.1.attn.hook_pattern"]
    to = jnp.sum(pattern * (reads.keys("prompt") + 2.0 * reads.keys("first"))[:, None], axis=(1, 2))
    return reads.span_mean("blocks.0.hook_resid_post", "prompt")[:, 0] + to + reads.logits[:, 3]


def pattern(reads):
    """What is attended to, from a tail that looks back on the prompt."""
    to = reads["blocks.1.attn.hook_pattern"] * reads.keys("prompt")[:, None]
    return jnp.sum(to, axis=(1, 2)) + reads.logits[:, 5]


CASES = {
    "windows, suffix": ("organism", "suffix", "projection"),
    "system": ("llama3", "system", "pattern"),
    "bare": ("qwen", "bare", "spans"),
    "target": ("llama3", "suffix", "target"),
}


@functools.cache
def setting(case: str):
    """Model with windows of 4 tokens, slots of every length, objective, and the tasks: of the range, and of each."""
    kind, slot, what = CASES[case]
    model = tiny_model(kind)
    config = gemma_like(model.config)
    if slot == "bare":
        conversations, read = [Conversation(text="{prompt}")], "slot_last"
    else:
        conversations = [
            question_conversation(q, Placement(slot=slot), alternatives=("(A)", "(B)")) for q in QUESTIONS[:2]
        ]
        read = "input_last"
    delta = jax.random.normal(jax.random.key(7), (config.d_model,))
    objective = {
        "projection": Projection(delta=delta, site="blocks.1.hook_resid_post"),
        "pattern": pattern,
        "spans": spans,
        "target": TargetLogProb(),
    }[what]
    allowed = allowed_tokens(model.tokenizer, config.vocab_size, word_initial=slot != "system")

    def slots_of(length: int):
        slots = build_slots(model.tokenizer, conversations, length, read=read)
        return with_target(model.tokenizer, slots, " (B)") if what == "target" else slots

    def task_of(length: int, least: int | None = None):
        slots = slots_of(length)
        return make_task(
            model.params, config, slots, needs=needs(objective, config), batch=8, least=least,
            allowed=TokenMask(allowed, first_allowed(model.tokenizer, slots, allowed)),
        )  # fmt: skip

    return dataclasses.replace(model, config=config), slots_of, as_pytree(objective), task_of


def shorter(ids, length: int):
    """The last ``length`` tokens of the prompts, padded."""
    return jnp.where(jnp.arange(MOST) < MOST - length, PAD, ids)


@pytest.mark.parametrize("case", [*list(CASES)[:3], pytest.param("target", marks=pytest.mark.slow)])
def test_scores_are_those_of_a_search_of_that_length(case: str) -> None:
    model, _, objective, task_of = setting(case)
    task, own = task_of(MOST, LEAST), task_of(3)
    assert task.varies and task.slot_once == (case == "system")
    ids = random_ids(jax.random.key(1), task_of(MOST), 3)
    rows = jnp.concatenate([shorter(ids, n) for n in (3, LEAST, MOST)])
    f, x = scored(model.params, task, objective, rows)
    assert len(np.unique(f)) == 9
    want_f, want_x = scored(model.params, own, objective, ids[:, -3:])
    np.testing.assert_allclose(f[:3], want_f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x[:3], want_x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["windows, suffix", "bare"])
def test_gradients_propose_what_they_do_at_that_length(case: str) -> None:
    model, _, objective, task_of = setting(case)
    ids, fluency = random_ids(jax.random.key(1), task_of(MOST), 2), jnp.asarray([0.5, 3.0])
    got, drawn = jax.jit(proposals_and_insertions, static_argnums=(5, 7))(
        model.params, task_of(MOST, LEAST), objective, shorter(ids, 4), fluency, 5, jax.random.key(2), 3
    )
    want = jax.jit(proposals, static_argnums=5)(model.params, task_of(4), objective, ids[:, -4:], fluency, 5)
    assert (np.asarray(got)[:, -4:] == np.asarray(want)).mean() > 0.95  # near ties may swap
    task = task_of(MOST)
    assert task.allowed[drawn].all() and task.allowed_first[drawn[:, MOST - 4]].all()
    assert all(len(set(row)) == 3 for row in np.asarray(drawn).reshape(-1, 3).tolist())


def test_edits_do_what_lists_do() -> None:
    parents = jnp.asarray([[PAD, PAD, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6], [PAD, PAD, PAD, PAD, 3, 4]])
    at = jnp.asarray([[2, 3, 5, 2, 4], [0, 5, 3, 0, 5], [4, 5, 4, 5, 4]])
    kind = jnp.asarray([[INSERT, INSERT, INSERT, DELETE, DELETE], [SWAP, SWAP, SWAP, DELETE, DELETE], [INSERT] * 5])
    got = np.asarray(apply_mutations(parents, Mutations(at, kind), jnp.full((3, 5), 99))).reshape(3, 5, 6)
    for parent, row in enumerate(got):
        for child, ids in enumerate(row):
            want = [int(i) for i in parents[parent] if i != PAD]
            where = int(at[parent, child]) - (6 - len(want))
            operator = int(kind[parent, child])
            want[where : where + (operator != INSERT)] = [] if operator == DELETE else [99]
            assert ids.tolist() == [PAD] * (6 - len(want)) + want


def test_edits_keep_to_the_range_and_to_what_may_stand_first() -> None:
    _, _, _, task_of = setting("windows, suffix")
    task = task_of(MOST, LEAST)
    inner = int(task.ids[0])
    task = task.replace(allowed_first=task.allowed_first.at[inner].set(False))
    full = jnp.full(MOST, task.ids[1]).at[MOST - LEAST].set(inner)  # second of a prompt of LEAST + 1 tokens
    parents = jnp.stack([shorter(full, n) for n in (LEAST, LEAST + 1, LEAST + 2, MOST)])
    edits = draw_mutations(jax.random.key(4), task, parents, 400)
    kinds = [np.bincount(row, minlength=3) / 400 for row in np.asarray(edits.kind)]
    assert kinds[0][DELETE] == 0 and kinds[3][INSERT] == 0
    assert 0.15 < kinds[1][DELETE] < 0.35 and 0.15 < kinds[2][INSERT] < 0.35 and kinds[2][SWAP] > 0.4
    children = np.asarray(apply_mutations(parents, edits, jnp.full((4, 400), int(task.ids[2]))))
    length = (children != PAD).sum(1)
    assert set(length) == {2, 3, 4, 5, 6} and (children[:, -1] != PAD).all()
    first = children[np.arange(len(children)), MOST - length]
    assert not (first[400:] == inner).any()  # the shortest parent begins with it


def test_random_prompts_have_all_lengths_and_repetition_counts_tokens() -> None:
    _, _, _, task_of = setting("windows, suffix")
    task = task_of(MOST, LEAST)
    ids = np.asarray(random_ids(jax.random.key(0), task, 64))
    pads = (ids == PAD).sum(1)
    assert set(pads) == set(range(MOST - LEAST + 1))
    assert (np.diff((ids == PAD).astype(int), axis=1) <= 0).all()  # at the start and nowhere else
    assert task.allowed_first[ids[np.arange(64), pads]].all()
    rows = jnp.asarray([[PAD, PAD, PAD, 4, 4, 7], [4, 4, 7, 8, 9, 10]])
    np.testing.assert_allclose(repetition(rows), [1 / 3, 1 / 6])


def run_of(algorithm: str, given: dict, **more):
    model, slots_of, objective, task_of = setting("system")
    task, slots = task_of(MOST, LEAST), slots_of(MOST)
    problems = [make_problem(objective, 3, seed=seed) for seed in range(2)]
    return search_with(
        model.params, task, problems, make_search(algorithm, given), steps=4,
        valid=text_filter(model.tokenizer, slots), **more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["epo", "mutation"])
def test_a_search_finds_prompts_of_several_lengths_with_the_scores_of_their_texts(algorithm: str) -> None:
    model, slots_of, objective, task_of = setting("system")
    given = {"population": 3, "children": 6, **({"top_k": 8} if algorithm == "epo" else {})}
    result = run_of(algorithm, given)
    good = [found for found in result.prompts if found.retokenises]
    assert good and all(LEAST <= len(found.ids) <= MOST and min(found.ids) >= 0 for found in result.prompts)
    alive = np.isfinite(result.archive.f)
    assert len({(row != PAD).sum() for row in result.archive.ids[alive]}) > 1
    slots = slots_of(MOST)
    assert all(retokenises_many(model.tokenizer, slots, np.asarray([found.ids]))[0] for found in good)
    texts = [prompt_text(model.tokenizer, found.ids) for found in good]
    again = rescore(model, slots, objective, task_of(MOST).needs, texts)
    np.testing.assert_allclose([r.target for r in again], [found.target for found in good], atol=1e-4)
    np.testing.assert_allclose([r.cross_entropy for r in again], [found.cross_entropy for found in good], atol=1e-4)


@pytest.mark.slow
def test_a_search_that_is_cut_off_goes_on_to_the_same_prompts(tmp_path) -> None:
    def end(progress) -> None:
        raise SystemExit

    given = {"population": 3, "children": 6, "top_k": 8}
    whole = run_of("epo", given, steps_per_call=2)
    with pytest.raises(SystemExit), Store(tmp_path, every_s=0.0) as store:
        looks = iter([lambda _: None, end])
        run_of("epo", given, steps_per_call=2, store=store, callback=lambda progress: next(looks)(progress))
    steps = []
    with Store(tmp_path, resume=True) as store:
        again = run_of("epo", given, steps_per_call=2, store=store, callback=lambda p: steps.append(p.step))
    assert steps == [4] and again.prompts == whole.prompts
    np.testing.assert_array_equal(again.archive.ids, whole.archive.ids)


@pytest.mark.parametrize(
    ("algorithm", "given"), [("gcg", {}), ("pez", {}), ("gbda", {}), ("soft", {}), ("mutation", {"replace": 2})]
)
def test_what_keeps_the_length_is_refused(algorithm: str, given: dict) -> None:
    model, _, objective, task_of = setting("windows, suffix")
    search, task = make_search(algorithm, given), task_of(MOST, LEAST)
    population = {"gcg": 1, "soft": 1}.get(algorithm, 16)
    problem = make_problem(objective, population)
    with pytest.raises(UserError, match=r"2 to 6 tokens"):
        state = jax.eval_shape(search.init, model.params, task, problem)
        jax.eval_shape(search.step, model.params, task, problem, state)


def test_ranges_that_are_none_are_refused() -> None:
    for least in (0, 7):
        with pytest.raises(UserError, match="6 tokens"):
            setting("bare")[3](MOST, least)
