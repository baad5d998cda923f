"""Edits of tiny models: constraints that hold in the model itself, what the search for values finds, invariances."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, capture, logits, make_mesh
from jaxsteer.checkpoints.deltas import applied
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import shard_params
from jaxsteer.prompts import encode_texts
from jaxsteer.rewrite.covariance import Convergence, Covariance
from jaxsteer.rewrite.editing import EditOptions, default_layers, edit, layers_of, low_rank
from jaxsteer.rewrite.facts import Fact
from jaxsteer.rewrite.keys import subject_states
from jaxsteer.rewrite.lowrank import at_layer, of_each_row
from jaxsteer.rewrite.rows import fact_row, model_prefixes
from jaxsteer.rewrite.values import ValueOptions, wanted_values
from tests.helpers.checkpoints import FAMILIES, family_config, random_params
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.rewrite.conftest import FACTS

OPTIONS = EditOptions(layers=(1,), prefixes=4)
SITE = "blocks.1.hook_resid_post"


def covariance(model: Model, layer: int) -> Covariance:
    """Of made-up keys: what they are of does not matter to the algebra."""
    keys = np.random.default_rng(layer).standard_normal((400, model.config.d_mlp)) * np.linspace(0.2, 2, 1)
    return Covariance(
        layer=layer, matrix=np.float32(keys.T @ keys / 400), tokens=400,
        curve=(Convergence(tokens=400, change=0.1, rank=10.0),), model=model.name, fingerprint=model.fingerprint,
        text="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(model: Model):
    return edit(model, FACTS, {1: covariance(model, 1)}, options=OPTIONS)


def log_prob(model: Model, fact: Fact, answer: str, prefix: str = "", edits=None) -> float:
    """Mean log-probability per token, from the model's logits."""
    row = fact_row(model, fact, answer, prefix=prefix)
    found = np.asarray(jax.nn.log_softmax(logits(model, row.ids[None], edits=edits)))[0]
    return float(np.mean([found[at - 1, row.ids[at]] for at in range(row.answer, len(row.ids))]))


def test_the_subjects_last_token_is_found_in_any_text(model: Model):
    for fact in FACTS:
        for prefix in ("", "It is late. "):
            row = fact_row(model, fact, fact.target_new, prefix=prefix)
            said = model.tokenizer.decode(row.ids[: row.subject + 1], skip_special_tokens=True)
            assert said.endswith(fact.subject) and said == f"{prefix}what is the capital of {fact.subject}"
            assert model.tokenizer.decode(row.ids[row.answer :]) == f" {fact.target_new}"
            assert row.ids[0] == model.tokenizer.bos_token_id
    accented = dataclasses.replace(FACTS[0], subject="Crème Brûlée 😀")
    row = fact_row(model, accented)
    assert model.tokenizer.decode(row.ids[: row.subject + 1]).endswith("Brûlée 😀")


def test_prefixes_are_the_models_own_and_follow_from_the_seed(model: Model):
    first, again, other = (model_prefixes(model, count=6, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 7 and first[0] == ""
    assert all(prefix.endswith(". ") for prefix in first[1:]) and first[1].startswith("The")


def test_after_rome_every_mean_key_gives_its_value_exactly(model: Model, made):
    keys = subject_states(model, FACTS, made.prefixes, 1).keys
    np.testing.assert_allclose(keys, made.keys)
    before = np.asarray(model.params.layers.down[1], np.float64)
    after = np.asarray(applied(model, made.delta).params.layers.down[1], np.float64)
    wanted = made.keys @ before + made.values.change
    error = np.linalg.norm(made.keys @ after - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert error.max() < 1e-4
    np.testing.assert_allclose(made.keys @ before, made.values.output, rtol=1e-3, atol=1e-4)  # v0 = W k*
    assert made.reached.max() < 1e-6
    for layer in (0, 2):
        np.testing.assert_array_equal(
            applied(model, made.delta).params.layers.down[layer], model.params.layers.down[layer]
        )


def test_rewritten_models_say_the_new_answers(model: Model, made):
    after = applied(model, made.delta)
    for fact in (FACTS[0], FACTS[2]):  # which end with their subjects; a random model hardly looks back
        assert log_prob(after, fact, fact.target_new) > log_prob(model, fact, fact.target_new) + 1.5


def test_values_are_changes_that_the_model_itself_confirms(model: Model, made):
    """The reported probability is that of the model whose MLP output is changed by d at that token, head and tail."""
    fact, change = FACTS[1], made.values.change[1]
    found = []
    for prefix in made.prefixes:
        row = fact_row(model, fact, fact.target_new, prefix=prefix)
        states = np.asarray(capture(model, row.ids[None], ["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"])[0]
        key = states[row.subject]
        only = np.zeros_like(states[0])
        only[:] = key / (key @ key)  # left: of all keys of the row only this one is not orthogonal after projection
        basis = np.linalg.qr(states[np.arange(len(states)) != row.subject].T)[0]
        direction = key - basis @ (basis.T @ key)
        edits = at_layer(1, (direction / (direction @ key))[:, None], change[None])
        found.append(log_prob(model, fact, fact.target_new, prefix, edits))
    assert np.exp(np.mean(found)) == pytest.approx(made.values.probability[1], rel=1e-3)


def test_values_stay_in_their_ball_and_rest_when_they_are_good_enough(model: Model):
    prefixes = ("", "It is late. ")
    tight = wanted_values(model, FACTS, prefixes, 1, options=ValueOptions(radius=0.3))
    sizes = np.linalg.norm(tight.change, axis=1) / np.linalg.norm(tight.output, axis=1)
    assert sizes.max() <= 0.3 + 1e-5 and tight.steps.max() == 60
    enough = float(tight.loss.min()) - 0.2
    lax = wanted_values(model, FACTS, prefixes, 1, options=ValueOptions(enough=enough))
    free = wanted_values(model, FACTS, prefixes, 1, options=ValueOptions(enough=0.0))
    rested = lax.steps < 60
    assert rested.any() and (lax.loss[rested] < enough).all() and (lax.steps[rested] > 0).all()
    assert (free.loss < lax.loss)[rested].all() and (free.steps == 60).all()
    assert (free.loss < tight.loss).all()


def test_a_fact_is_sought_alike_alone_and_among_others(model: Model, made):
    prefixes = made.prefixes
    for number, fact in enumerate(FACTS):
        alone = wanted_values(model, [fact], prefixes, 1)
        assert np.linalg.norm(alone.change[0] - made.values.change[number]) < 0.02 * np.linalg.norm(alone.change[0])
        assert alone.probability[0] == pytest.approx(made.values.probability[number], rel=1e-2)
        keys = subject_states(model, [fact], prefixes, 1).keys
        np.testing.assert_allclose(keys[0], made.keys[number], rtol=1e-4, atol=1e-5)


def test_devices_do_not_matter(model: Model, made):
    mesh = make_mesh(prompts=2, model=4)
    spread = dataclasses.replace(model, mesh=mesh, params=shard_params(model.params, model.config, mesh))
    found = edit(spread, FACTS, {1: covariance(model, 1)}, options=OPTIONS)
    assert found.prefixes == made.prefixes
    np.testing.assert_allclose(found.keys, made.keys, rtol=1e-3, atol=1e-4)
    scale = np.linalg.norm(made.values.change, axis=1)
    assert (np.linalg.norm(found.values.change - made.values.change, axis=1) < 0.02 * scale).all()
    after = applied(spread, found.delta)
    assert after.params.layers.down.sharding == spread.params.layers.down.sharding
    for fact in FACTS:
        assert log_prob(after, fact, fact.target_new) == pytest.approx(
            log_prob(applied(model, made.delta), fact, fact.target_new), abs=0.05
        )


def test_memit_of_one_fact_and_one_layer_comes_to_rome(model: Model):
    rome = edit(model, FACTS[:1], {1: covariance(model, 1)}, options=OPTIONS)
    options = dataclasses.replace(OPTIONS, method="memit", mu=1e-7)
    memit = edit(model, FACTS[:1], {1: covariance(model, 1)}, options=options)
    changes = [np.matmul(*one.delta.factors[1]) for one in (rome, memit)]
    assert np.linalg.norm(changes[0] - changes[1]) < 1e-4 * np.linalg.norm(changes[0])
    strong = edit(model, FACTS[:1], {1: covariance(model, 1)}, options=dataclasses.replace(options, mu=1e3))
    assert strong.reached[0] > 0.5 > memit.reached[0]


def test_memit_over_layers_gives_the_stream_what_it_was_to_gain(model: Model):
    options = EditOptions(method="memit", layers=(0, 1), mu=1e-6, prefixes=0)
    made = edit(model, FACTS, {layer: covariance(model, layer) for layer in range(2)}, options=options)
    assert made.layers == (0, 1) and set(made.delta.factors) == {0, 1} and made.reached.max() < 1e-3
    after = applied(model, made.delta)
    for fact, change in zip(FACTS, made.values.change, strict=True):
        row = fact_row(model, fact)
        states = (capture(m, row.ids[None], [SITE])[SITE] for m in (model, after))
        old, new = (np.asarray(state)[0, row.subject] for state in states)
        np.testing.assert_allclose(new - old, change, atol=2e-3 * np.linalg.norm(change))
    edits = low_rank(model, made.delta.factors, (0, 1, 2))  # none of the last one
    ids = encode_texts(model.tokenizer, ["what is the capital of Fisagal?"])[0][None]
    np.testing.assert_allclose(logits(model, ids, edits=edits), logits(after, ids), rtol=1e-3, atol=1e-3)


def test_rows_can_have_a_change_each(model: Model):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 64)) / 8, rng.standard_normal((2, 32))
    ids = np.repeat(encode_texts(model.tokenizer, ["wait a year, take the money"])[0][None], 2, 0)
    both = logits(model, ids, edits=of_each_row(1, jnp.asarray(left), jnp.asarray(right)))
    for row in range(2):
        one = logits(model, ids[:1], edits=at_layer(1, left[row][:, None], right[row][None]))
        np.testing.assert_allclose(both[row], one[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(both[0], both[1], atol=0.1)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "gemma3" else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_is_rewritten(family: str):
    tokenizer = tiny_tokenizer("gemma" if family.startswith("gemma") else "llama3")
    config = family_config(family, vocab_size=len(tokenizer) + 16, final_softcap=None)
    model = Model(params=random_params(config), config=config, tokenizer=tokenizer, name=family, fingerprint="f" * 64)
    made = edit(model, FACTS[:2], {1: covariance(model, 1)}, options=dataclasses.replace(OPTIONS, prefixes=2))
    before, after = (np.asarray(m.params.layers.down[1], np.float64) for m in (model, applied(model, made.delta)))
    wanted = made.keys @ before + made.values.change
    assert np.linalg.norm(made.keys @ after - wanted) < 1e-4 * np.linalg.norm(wanted)
    gains = [
        log_prob(applied(model, made.delta), f, f.target_new) - log_prob(model, f, f.target_new) for f in FACTS[:2]
    ]
    assert min(gains) > 0.3
    if config.post_norms:
        with pytest.raises(UserError, match="normalises what its MLPs give"):
            layers_of(model, EditOptions(method="memit", layers=(1, 2)))


def test_default_layers_stand_at_the_papers_depth():
    assert default_layers(tiny_model("llama3", n_layers=32), "rome") == (5,)
    assert default_layers(tiny_model("llama3", n_layers=32), "memit") == (4, 5, 6, 7, 8)
    assert default_layers(tiny_model("llama3"), "memit") == (0, 1)


def test_what_cannot_be_edited_says_why(model: Model):
    ready = {1: covariance(model, 1)}
    with pytest.raises(UserError, match="nothing to rewrite"):
        edit(model, [], ready, options=OPTIONS)
    with pytest.raises(UserError, match="rome changes one block"):
        edit(model, FACTS, ready, options=EditOptions(layers=(0, 1)))
    with pytest.raises(UserError, match="there is no block 9"):
        edit(model, FACTS, ready, options=EditOptions(layers=(9,)))
    with pytest.raises(UserError, match="no covariance of block 2"):
        edit(model, FACTS, ready, options=EditOptions(layers=(2,)))
    with pytest.raises(UserError, match="the covariance of block 1 is of tiny-llama3"):
        edit(dataclasses.replace(model, fingerprint="a" * 64), FACTS, ready, options=OPTIONS)
    with pytest.raises(UserError, match="positions end at 256"):
        edit(model, [dataclasses.replace(FACTS[0], target_new="a year " * 300)], ready, options=OPTIONS)
    twice = [FACTS[0], dataclasses.replace(FACTS[0], target_new="money")]
    with pytest.raises(UserError, match="too alike"):
        edit(model, twice, ready, options=OPTIONS)
