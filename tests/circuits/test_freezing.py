"""Freezing: closed forms, values replaced by hand, cached generation against growing texts, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.freeze_table import FreezeTable, freeze_table
from jaxsteer.circuits.freezing import FREEZES, freeze, frozen_logits, generate_frozen
from jaxsteer.circuits.rows import make_rows
from jaxsteer.models.transformer import unembed
from jaxsteer.objectives import LogitDifference
from jaxsteer.steer.edits import Edits
from tests.helpers.checkpoints import family_config, random_model
from tests.helpers.tiny import tiny_model

RNG = np.random.default_rng(0)
LLAMA, GEMMA, GPT2 = (random_model(family_config(name, n_layers=3)) for name in ("llama", "gemma3", "gpt2"))
VECTOR = RNG.standard_normal(24)
PUSH = steer.add("blocks.0.hook_resid_post", VECTOR, 2.0, positions="every")
METRIC = LogitDifference(plus=np.asarray([3, 5]), minus=np.asarray([4, 60]))
TEXTS = [RNG.integers(0, 67, n) for n in (6, 8)]
ROWS = make_rows(LLAMA, TEXTS)
SIMPLE = ("patterns", "queries and keys", "values", "attention", "mlps", "mlp.hook_post")


@pytest.mark.parametrize("model", [LLAMA, GEMMA, GPT2], ids=["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("attention", ["patterns", "queries and keys"])
def test_with_all_frozen_the_push_arrives_as_it_is(model: Any, attention: str) -> None:
    base, frozen = frozen_logits(model, ROWS, PUSH, [attention, "values", "mlps"])
    last = "blocks.2.hook_resid_post"
    stream = jaxsteer.capture(model, ROWS.tokens, [last], ROWS.mask)[last] + 2.0 * VECTOR.astype(np.float32)
    expected = jax.jit(unembed, static_argnums=1)(model.params, model.config, stream)
    np.testing.assert_allclose(np.asarray(frozen)[ROWS.mask], np.asarray(expected)[ROWS.mask], atol=2e-4)
    plain = np.asarray(jaxsteer.logits(model, ROWS.tokens, ROWS.mask))
    np.testing.assert_allclose(np.asarray(base)[ROWS.mask], plain[ROWS.mask], atol=1e-4)


@pytest.mark.parametrize("what", SIMPLE)
def test_frozen_is_replaced_by_the_values_of_the_base_run(what: str) -> None:
    kinds, layers = FREEZES.get(what, (what,)), (1, 2)
    sites = [f"blocks.{layer}.{kind}" for layer in layers for kind in kinds]
    states = jaxsteer.capture(GEMMA, ROWS.tokens, sites, ROWS.mask)
    edits = Edits((PUSH, *(steer.replace(site, value) for site, value in states.items())))
    expected = np.asarray(jaxsteer.logits(GEMMA, ROWS.tokens, ROWS.mask, edits=edits))
    _, frozen = frozen_logits(GEMMA, ROWS, PUSH, what, layers=layers)
    np.testing.assert_allclose(np.asarray(frozen)[ROWS.mask], expected[ROWS.mask], atol=1e-4)
    assert np.abs(expected - jaxsteer.logits(GEMMA, ROWS.tokens, ROWS.mask, edits=PUSH))[ROWS.mask].max() > 1e-3


def test_nothing_is_changed_without_a_push() -> None:
    still = steer.add("blocks.0.hook_resid_post", VECTOR, np.asarray([1e-38]), positions="every")
    for edits in (None, still):
        base, frozen = frozen_logits(LLAMA, ROWS, edits, ["patterns", "values", "mlps"])
        np.testing.assert_array_equal(base, frozen)


@pytest.mark.parametrize("what", ["patterns", "queries and keys", ["values", "mlps"]])
def test_cached_generation_is_that_of_growing_texts(what: Any) -> None:
    model = tiny_model()
    push = steer.add("blocks.0.hook_resid_post", RNG.standard_normal(32), 2.0, positions="every")
    prompts = [RNG.integers(5, 500, n) for n in (4, 9, 6)]
    found = generate_frozen(model, prompts, push, what, temperature=0, max_new_tokens=8, stop=())
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        text = list(prompt)
        for token in tokens[tokens >= 0]:
            logits = frozen_logits(model, make_rows(model, [np.asarray(text)]), push, what)[1]
            scores = np.asarray(logits)[0, len(text) - 1][: len(model.tokenizer)]
            assert scores[token] > scores.max() - 1e-4
            text.append(int(token))
    free = jaxsteer.generate(model, prompts, edits=push, temperature=0, max_new_tokens=8)
    assert (free.tokens != found.tokens).any()


def test_sampled_generation_draws_as_generate_does() -> None:
    """Every token is the best of the frozen run's scaled logits and the noise of (seed, text, step); with nothing
    frozen that is ``generate``."""
    model = tiny_model()
    push = steer.add("blocks.0.hook_resid_post", RNG.standard_normal(32), 1.0, positions="every")
    prompts = [RNG.integers(5, 500, n) for n in (4, 9, 6)]
    options = dict(temperature=0.7, seed=11, max_new_tokens=6, stop=())
    found = generate_frozen(model, prompts, push, "values", **options)
    for row, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
        text = list(prompt)
        for step, token in enumerate(tokens[tokens >= 0]):
            logits = frozen_logits(model, make_rows(model, [np.asarray(text)]), push, "values")[1]
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(11), row), step)
            noise = jax.random.gumbel(key, logits.shape[2:])
            scores = np.asarray(logits[0, len(text) - 1] / 0.7 + noise)[: len(model.tokenizer)]
            assert scores[token] > scores.max() - 1e-3
            text.append(int(token))
    free = jaxsteer.generate(model, prompts, edits=push, **options)
    nothing = generate_frozen(model, prompts, push, "values", layers=[], **options)
    np.testing.assert_array_equal(nothing.tokens, free.tokens)
    assert (free.tokens != found.tokens).any()
    other = generate_frozen(model, prompts, push, "values", **(options | {"seed": 12}))
    assert (other.tokens != found.tokens).any()


def test_a_table_of_parts_and_layers(compile_counter: Any) -> None:
    rows = make_rows(LLAMA, TEXTS)
    found = freeze_table(LLAMA, rows, METRIC, PUSH, ("patterns", "mlps", "values+mlps"), by_layer=True)
    assert [f.what for f in found.whole] == ["patterns", "mlps", "values+mlps"] and len(found.by_layer) == 9
    assert all(f.layers == (0, 1, 2) for f in found.whole)

    def metric(logits: Any) -> np.ndarray:
        last = np.asarray(logits, np.float64)[np.arange(2), rows.lengths - 1]
        return last[np.arange(2), METRIC.plus] - last[np.arange(2), METRIC.minus]

    base, steered = (metric(jaxsteer.logits(LLAMA, rows.tokens, rows.mask, edits=each)) for each in (None, PUSH))
    np.testing.assert_allclose(found.base, base, atol=1e-4)
    np.testing.assert_allclose(found.steered, steered, atol=1e-4)
    for freezing in (*found.whole, *found.by_layer):
        own = metric(frozen_logits(LLAMA, rows, PUSH, freezing.what.split("+"), layers=freezing.layers)[1])
        np.testing.assert_allclose(freezing.scores, own, atol=1e-4)
        assert freezing.share == pytest.approx((own - base).sum() / (steered - base).sum(), abs=1e-3)
    assert FreezeTable.from_json(found.to_json()) == found
    assert "values+mlps" in found.table() and "<svg" in found.plot().svg()
    with compile_counter() as count:
        freeze_table(LLAMA, rows, METRIC, PUSH, ("values+mlps", "mlps", "patterns"), by_layer=True)
    assert count["score_rows"] == 0


def test_another_text_is_frozen_to_the_rows_token_by_token() -> None:
    rows, others = make_rows(LLAMA, TEXTS), make_rows(LLAMA, [RNG.integers(0, 67, len(text)) for text in TEXTS])
    found = freeze_table(LLAMA, rows, METRIC, others, ("patterns", "values"))

    def metric(logits: Any) -> np.ndarray:
        last = np.asarray(logits, np.float64)[np.arange(2), rows.lengths - 1]
        return last[np.arange(2), METRIC.plus] - last[np.arange(2), METRIC.minus]

    for freezing in found.whole:
        sites = [f"blocks.{layer}.{kind}" for layer in range(3) for kind in FREEZES[freezing.what]]
        states = jaxsteer.capture(LLAMA, rows.tokens, sites, rows.mask)
        edits = Edits(tuple(steer.replace(site, value) for site, value in states.items()))
        expected = metric(jaxsteer.logits(LLAMA, others.tokens, others.mask, edits=edits))
        np.testing.assert_allclose(freezing.scores, expected, atol=1e-4)
    np.testing.assert_allclose(found.base, metric(jaxsteer.logits(LLAMA, rows.tokens, rows.mask)), atol=1e-4)
    np.testing.assert_allclose(found.steered, metric(jaxsteer.logits(LLAMA, others.tokens, others.mask)), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: freeze(LLAMA, PUSH, "heads", 2), "there is no thing to freeze 'heads'"),
        (lambda: freeze(LLAMA, PUSH, "ln1_post.hook_scale", 2), "has no ln1_post.hook_scale"),
        (lambda: freeze(LLAMA, PUSH, "values", 2, layers=[3]), "numbers from 0 to 2"),
        (lambda: freeze_table(LLAMA, ROWS, METRIC, PUSH, layers=[5]), "some of 0 to 2"),
        (lambda: freeze_table(LLAMA, ROWS, METRIC, steer.scale("blocks.0.hook_resid_post", 1.0)), "at all"),
        (lambda: freeze_table(LLAMA, ROWS, METRIC, make_rows(LLAMA, [TEXTS[0], TEXTS[0]])), "8 tokens and its source"),
        (lambda: jaxsteer.logits(LLAMA, ROWS.tokens, edits=freeze(LLAMA, PUSH, "values", 2)), "takes 4 rows"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
