"""The scores of the inner loop against float64 NumPy on the public functions' outputs, and the token gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models import transformer as tf
from jaxsteer.models.layers import run_layers
from jaxsteer.objectives import Projection, as_pytree, needs
from jaxsteer.prompt_search import make_task, rescore
from jaxsteer.prompt_search import score as score_op_by_op
from jaxsteer.prompt_search.algorithms.proposals import proposals
from jaxsteer.prompts import prompt_text
from tests.prompt_search.setting import gemma_like, random_prompts, setting

score = jax.jit(score_op_by_op)


def by_hand(s, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f, x) of prompts from ``jaxsteer.logits`` and ``jaxsteer.capture`` on whole sequences, in float64."""
    rows = [
        [np.concatenate([before, row, after]) for before, after in zip(s.slots.before, s.slots.after, strict=True)]
        for row in ids
    ]
    width = max(len(tokens) for row in rows for tokens in row)
    flat = [tokens for row in rows for tokens in row]
    tokens = jnp.asarray([np.pad(t, (0, width - len(t))) for t in flat], jnp.int32)
    mask = jnp.asarray([np.arange(width) < len(t) for t in flat])
    site = s.objective.site
    stream = np.asarray(jaxsteer.capture(s.model, tokens, [site], mask)[site], np.float64)
    logits = np.asarray(jaxsteer.logits(s.model, tokens, mask), np.float64)
    f, x = np.zeros(len(flat)), np.zeros(len(flat))
    for n in range(len(flat)):
        prompt, c = divmod(n, len(s.slots.before))
        start = len(s.slots.before[c])
        f[n] = stream[n, start + s.slots.read_index[c]] @ s.delta.astype(np.float64)
        nll = []
        for j, token in enumerate(ids[prompt]):
            if start + j > 0:
                row = logits[n, start + j - 1]
                nll.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[token])
        x[n] = np.mean(nll)
    return f.reshape(len(ids), -1).mean(1), x.reshape(len(ids), -1).mean(1)


@pytest.mark.parametrize("contexts", [0, 1, 3])
@pytest.mark.parametrize("kind", ["organism", "qwen"])
def test_scores_equal_float64_recomputation(contexts: int, kind: str) -> None:
    s = setting(contexts=contexts, kind=kind)
    ids = random_prompts(s.task, 5)
    f, x = score(s.model.params, s.task, s.objective, ids)
    want_f, want_x = by_hand(s, np.asarray(ids))
    np.testing.assert_allclose(f, want_f, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(x, want_x, atol=1e-4)


def test_defect_01_labels_are_not_shifted_twice() -> None:
    """Fluency of a one-token prompt is the log-probability of that token right after its context."""
    s = setting(contexts=1, length=1)
    token = int(s.task.ids[3])
    _, x = score(s.model.params, s.task, s.objective, jnp.asarray([[token]]))
    before = jnp.asarray(s.slots.before[0])[None]
    log_probs = jax.nn.log_softmax(jaxsteer.logits(s.model, before)[0, -1])
    assert float(x[0]) == pytest.approx(-float(log_probs[token]), abs=1e-5)


def test_defect_02_first_token_is_scored_after_bos_and_not_without() -> None:
    """With a BOS all tokens count; in a model without BOS the first has nothing to be predicted from."""
    assert setting(contexts=0, kind="llama3").task.scores_first
    assert not setting(contexts=0, kind="qwen").task.scores_first


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"])
def test_any_depth_can_be_read(site: str) -> None:
    s = setting(site=site)
    ids = random_prompts(s.task, 3)
    f, x = score(s.model.params, s.task, s.objective, ids)
    want_f, want_x = by_hand(s, np.asarray(ids))
    np.testing.assert_allclose(f, want_f, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(x, want_x, atol=1e-4)


@pytest.mark.slow
def test_parents_are_differentiated_a_batch_at_a_time() -> None:
    """Five parents in three batches: the proposals of all at once, with less scratch."""
    proposed = jax.jit(proposals, static_argnums=5)
    found, scratch = [], []
    for batch in (2, 8):
        s = setting(batch=batch)
        given = s.model.params, s.task, s.objective, random_prompts(s.task, 5), jnp.linspace(0.1, 2.0, 5)
        compiled = proposed.lower(*given, 6).compile()
        found.append(np.asarray(compiled(*given)))
        scratch.append(compiled.memory_analysis().temp_size_in_bytes)
    assert (found[0] == found[1]).mean() > 0.95  # near ties may swap
    assert scratch[0] < 0.7 * scratch[1]


def test_batching_changes_nothing() -> None:
    """The same prompts alone, in other company and in other micro-batches."""
    small, large = setting(batch=2), setting(batch=16)
    ids = random_prompts(small.task, 11)
    f, x = score(small.model.params, small.task, small.objective, ids)
    again_f, again_x = score(large.model.params, large.task, large.objective, ids)
    np.testing.assert_allclose(f, again_f, rtol=2e-6, atol=2e-6)  # other shapes may sum in another order: a few ulps
    np.testing.assert_allclose(x, again_x, rtol=2e-6, atol=2e-6)
    one_f, _ = score(small.model.params, small.task, small.objective, ids[4:5])
    assert float(one_f[0]) == pytest.approx(float(f[4]), rel=2e-6)


def test_text_gives_the_scores_of_the_ids() -> None:
    s = setting()
    ids = random_prompts(s.task, 3)
    f, x = score(s.model.params, s.task, s.objective, ids)
    texts = [prompt_text(s.model.tokenizer, row) for row in np.asarray(ids)]
    again = rescore(s.model, s.slots, s.objective, s.needs, texts)
    np.testing.assert_allclose([r.target for r in again], f, atol=1e-4)
    np.testing.assert_allclose([r.cross_entropy for r in again], x, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_proposals_are_the_best_first_order_changes(family: str) -> None:
    """Against the gradient with respect to a one-hot that is both input and label, by brute force.

    The Gemma-like case has an embedding multiplier: leaving it out of the chain rule is defect 26.
    """
    s = setting(contexts=2, length=4)
    config, params = s.model.config, s.model.params
    if family == "gemma":
        config = gemma_like(config)
    task = make_task(params, config, s.slots, needs=s.needs, allowed=s.allowed, batch=8)
    ids = random_prompts(task, 2)
    fluency = jnp.asarray([0.5, 3.0])
    k = 12
    got = jax.jit(proposals, static_argnums=5)(params, task, s.objective, ids, fluency, k)

    def loss(onehot: jax.Array) -> jax.Array:
        total = 0.0
        for before, after, read in zip(s.slots.before, s.slots.after, s.slots.read_index, strict=True):
            head, tail = (
                jnp.broadcast_to(params.embed[part], (2, len(part), config.d_model)) for part in (before, after)
            )
            table = jnp.concatenate([head, onehot @ params.embed, tail], axis=1)
            x = tf.scale_embeddings(table, config)
            context = tf.make_context(config, jnp.arange(x.shape[1])[None])
            middle = run_layers(params, config, x, context, 0, 2)
            f = middle[:, len(before) + read] @ s.objective.delta
            logits = tf.unembed(params, config, run_layers(params, config, middle, context, 2, config.n_layers))
            window = jax.nn.log_softmax(logits[:, len(before) - 1 : len(before) - 1 + onehot.shape[1]])
            x_c = -jnp.mean(jnp.sum(window * onehot, -1), axis=-1)
            total = total + (-f + fluency * x_c) / len(s.slots.before)
        return total.sum()

    onehot = jax.nn.one_hot(ids, config.vocab_size)
    gradient = np.array(jax.jit(jax.grad(loss))(onehot), np.float64)
    gradient[..., ~np.asarray(s.allowed)] = np.inf
    for p, j in np.ndindex(*ids.shape):
        gradient[p, j, int(ids[p, j])] = np.inf
        want = np.sort(gradient[p, j])[:k]
        np.testing.assert_allclose(np.sort(gradient[p, j][np.asarray(got[p, j])]), want, atol=2e-4)
        assert int(ids[p, j]) not in np.asarray(got[p, j])
        assert np.asarray(s.allowed)[np.asarray(got[p, j])].all()


def test_scores_of_a_gemma_like_model_match_too() -> None:
    s = setting()
    model = dataclasses.replace(jaxsteer.Model(**{**vars(s.model)}), config=gemma_like(s.model.config))
    s.model = model
    s.task = make_task(model.params, model.config, s.slots, needs=s.needs, allowed=s.allowed, batch=8)
    ids = random_prompts(s.task, 3)
    f, x = score(model.params, s.task, s.objective, ids)
    want_f, want_x = by_hand(s, np.asarray(ids))
    np.testing.assert_allclose(f, want_f, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(x, want_x, atol=1e-4)


def test_a_custom_objective_may_read_logits_and_several_sites() -> None:
    s = setting(contexts=2)
    letter = s.model.tokenizer.convert_tokens_to_ids("A")

    def wants_letter(reads):
        return jax.nn.log_softmax(reads.logits)[:, letter] + 0.1 * reads["blocks.0.hook_resid_post"][:, 0]

    wanted = needs(wants_letter, s.model.config)
    assert wanted.logits and wanted.sites == ("blocks.0.hook_resid_post",)
    task = make_task(s.model.params, s.model.config, s.slots, needs=wanted, allowed=s.allowed, batch=8)
    ids = random_prompts(task, 2)
    f, _ = score(s.model.params, task, as_pytree(wants_letter), ids)
    want = []
    for before, after, read in zip(s.slots.before, s.slots.after, s.slots.read_index, strict=True):
        tokens = jnp.asarray(np.concatenate([before, np.asarray(ids[0]), after]))[None]
        at = len(before) + read
        log_prob = jax.nn.log_softmax(jaxsteer.logits(s.model, tokens)[0, at])[letter]
        stream = jaxsteer.capture(s.model, tokens, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
        want.append(float(log_prob) + 0.1 * float(stream[0, at, 0]))
    assert float(f[0]) == pytest.approx(np.mean(want), abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (lambda reads: reads["blocks.9.hook_resid_post"][:, 0], "beyond the last layer"),
        (lambda reads: reads["blocks.1.attn.hook_zz"][:, 0], "names no place"),
        (lambda reads: reads["blocks.1.hook_resid_post"], "one float per row"),
        (lambda reads: jnp.zeros(3), "reads nothing"),
    ],
)
def test_objectives_that_cannot_work_are_refused(objective, says: str) -> None:
    with pytest.raises(UserError, match=says):
        needs(objective, setting().model.config)


def test_what_does_not_fit_is_refused() -> None:
    s = setting(contexts=1)
    tight = dataclasses.replace(s.model.config, max_positions=10)
    with pytest.raises(UserError, match="10 positions"):
        make_task(s.model.params, tight, s.slots, needs=s.needs, allowed=s.allowed)
    with pytest.raises(UserError, match="loosen the token filter"):
        make_task(s.model.params, s.model.config, s.slots, needs=s.needs, allowed=np.zeros_like(s.allowed))


def test_nothing_above_the_deepest_read_runs_for_an_objective_alone() -> None:
    """A direction at block 0 needs one block: its gradient does not touch the weights of later ones."""
    s = setting(site="blocks.0.hook_resid_post")
    ids = random_prompts(s.task, 2)

    def target(params):
        return score(params, s.task, s.objective, ids)[0].sum()

    grads = jax.jit(jax.grad(target))(s.model.params)
    assert float(jnp.abs(grads.layers.up[0]).max()) > 0
    assert float(jnp.abs(grads.layers.up[1:]).max()) == 0
    assert isinstance(s.objective, Projection)
