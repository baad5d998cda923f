"""The logit lens: against float64, the model's own output, other batches and other devices; what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, lens, steer
from jaxsteer.lens import logit_lens
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.models.taps import Tap
from jaxsteer.models.transformer import direction_logits, unembed
from tests.helpers.checkpoints import FAMILIES, family_config, random_model
from tests.helpers.reference import normed
from tests.helpers.tiny import tiny_model

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 67, n) for n in (7, 19, 11)]
TOKENS = RNG.integers(0, 67, (2, 9))


def model_of(family: str, dtype: str = "float32", **changes: Any) -> Any:
    model = random_model(family_config(family, **changes))
    return dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(dtype), model.params))


def oracle(model: Any, state: Any) -> np.ndarray:
    """Log-probabilities of states through the final norm and the unembedding, in float64."""
    config, params = model.config, model.params
    bias = None if params.final_norm_bias is None else np.asarray(params.final_norm_bias, np.float64)
    x = normed(np.asarray(state, np.float64), np.asarray(params.final_norm, np.float64), bias, config)
    table = np.asarray(params.embed, np.float64).T if params.unembed is None else np.asarray(params.unembed, np.float64)
    logits = x @ table
    if config.final_softcap:
        logits = config.final_softcap * np.tanh(logits / config.final_softcap)
    logits -= logits.max(-1, keepdims=True)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_place_is_the_model_bit_for_bit(family: str, dtype: str) -> None:
    model = model_of(family, dtype)
    found = lens.site_logits(model, TOKENS, sites=["blocks.0.hook_resid_mid", "blocks.-1.hook_resid_post"])
    *_, last = found
    assert list(found) == ["blocks.0.hook_resid_mid", last]
    np.testing.assert_array_equal(found[last], jaxsteer.logits(model, TOKENS))
    reading = lens.read(model, list(TOKENS))
    assert not reading.cells.kl[-1].any() and (reading.cells.kl[:-1] > 1e-3).any()
    assert reading.summary[-1].agrees == 1.0 and reading.summary[-1].kl == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_place_of_every_organism_of_a_family(family: str, dtype: str) -> None:
    """Those that ship: scaled embeddings and tied weights as they are trained."""
    shipped = {"llama": "llama", "qwen2": "qwen2", "gemma3": "gemma3"}
    if family not in shipped:
        pytest.skip("no organism of this family ships")
    model = jaxsteer.load(f"organism:{shipped[family]}", dtype=dtype)
    tokens = np.asarray(model.tokenizer("the old harbour and the mill", add_special_tokens=False)["input_ids"])[None]
    *_, last = (found := lens.site_logits(model, tokens))
    np.testing.assert_array_equal(found[last], jaxsteer.logits(model, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_float64(family: str) -> None:
    model, top, chosen = model_of(family), 5, (3, 60)
    sites = ["hook_embed", "blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
    reading = lens.read(model, TEXTS, sites=sites, tokens=chosen, top=top)
    assert reading.places == (*sites, f"blocks.{model.config.n_layers - 1}.hook_resid_post")
    for number, ids in enumerate(TEXTS):
        cells = reading.at(number)
        np.testing.assert_array_equal(cells.ids, ids)
        run = jaxsteer.run(model, ids[None], sites=reading.places)
        output = oracle(model, run.states[reading.places[-1]][0])
        for s, place in enumerate(reading.places):
            log_p = oracle(model, run.states[place][0])
            np.testing.assert_allclose(cells.entropy[s], -(np.exp(log_p) * log_p).sum(-1), atol=2e-4)
            np.testing.assert_allclose(cells.kl[s], (np.exp(output) * (output - log_p)).sum(-1), atol=3e-4)
            np.testing.assert_allclose(cells.top_log_probs[s], -np.sort(-log_p)[:, :top], atol=3e-4)
            np.testing.assert_allclose(
                np.take_along_axis(log_p, cells.top_ids[s], -1), cells.top_log_probs[s], atol=3e-4
            )
            np.testing.assert_allclose(cells.chosen_log_probs[s], log_p[:, chosen], atol=3e-4)
            np.testing.assert_allclose(cells.next_log_prob[s, :-1], log_p[np.arange(len(ids) - 1), ids[1:]], atol=3e-4)
            for c, token in enumerate(chosen):  # close calls may fall either way
                more, less = ((log_p > log_p[:, [token]] + d).sum(-1) for d in (1e-3, -1e-3))
                assert ((more <= cells.chosen_ranks[s, :, c]) & (cells.chosen_ranks[s, :, c] <= less)).all()
        assert np.isnan(cells.next_log_prob[:, -1]).all() and (cells.next_rank[:, -1] == -1).all()
    means = [reading.at(i).kl[0].mean() for i in range(3)]
    first = reading.summary[0]
    assert first.kl == pytest.approx(np.mean(means), rel=1e-5) and first.kl_ci95 is not None
    assert first.kl_ci95[0] < first.kl < first.kl_ci95[1]
    losses = [-np.nanmean(reading.at(i).next_log_prob[0]) for i in range(3)]
    assert first.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_frozen_scale_the_lens_is_linear(family: str) -> None:
    """What a vector adds to the logits is its own lens, where the final norm goes on dividing by what it divided by."""
    model = model_of(family)
    config, params = model.config, model.params
    h = jaxsteer.capture(model, TOKENS, ["blocks.*.hook_resid_post"])
    vector = jnp.asarray(RNG.standard_normal(config.d_model), jnp.float32)
    for state in h.values():
        scale = jnp.sqrt(jnp.mean(jnp.square(state), -1, keepdims=True) + config.norm_eps)
        frozen = Tap(frozenset({"ln_final.hook_scale"}), lambda kind, layer, value, scale=scale: scale)
        before, after = (unembed(params, config, x, frozen) for x in (state, state + vector))
        if config.final_softcap:  # what stands before the cap
            before, after = (config.final_softcap * jnp.arctanh(x / config.final_softcap) for x in (before, after))
        np.testing.assert_allclose(after - before, direction_logits(params, config, vector / scale), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_add_up_to_what_attention_writes(family: str) -> None:
    model = model_of(family, n_layers=3)
    heads = logit_lens.find_places(["blocks.1.attn.hook_result"], model.config)[:-1]
    whole = logit_lens.find_places(["blocks.1.hook_attn_out"], model.config)[:1]
    assert [place.name for place in heads] == [f"blocks.1.attn.hook_result[{i}]" for i in range(4)]
    [(_, [rows])] = logit_lens.batches(model, [logit_lens.encoded(model, list(TOKENS))], 5)
    states = np.asarray(logit_lens.states_at(model.params, model.config, rows, None, (*heads, *whole)))
    np.testing.assert_allclose(states[1:5].sum(0), states[5], atol=1e-5)
    reading = lens.read(model, list(TOKENS), sites="blocks.1.attn.hook_result", top=3)
    log_p = oracle(model, states[2])
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    np.testing.assert_allclose(reading.cells.entropy[1], entropy[:, :9].ravel(), atol=1e-4)


def test_batches_padding_and_devices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma3", n_layers=3)
    together = lens.read(model, TEXTS, tokens=[1]).cells
    alone = [lens.read(model, ids, tokens=[1]).cells for ids in TEXTS]
    mesh = make_mesh(prompts=4, model=2)
    spread = dataclasses.replace(model, mesh=mesh, params=shard_params(model.params, model.config, mesh))
    others = [lens.read(spread, TEXTS, tokens=[1]).cells]
    monkeypatch.setattr(logit_lens, "VOCABULARY_BLOCK", 67 * 4 * 2)  # a few tokens at a time
    monkeypatch.setattr(logit_lens, "STATES", 1)  # and one row
    others.append(lens.read(model, TEXTS, tokens=[1]).cells)
    for name in ("kl", "entropy", "top_log_probs", "next_log_prob", "chosen_log_probs"):
        first = getattr(together, name)
        np.testing.assert_allclose(np.concatenate([getattr(c, name) for c in alone], 1), first, atol=1e-5)
        for other in others:
            np.testing.assert_allclose(getattr(other, name), first, atol=1e-5)


def test_logits_of_all_places_are_never_held() -> None:
    model, count = model_of("llama", vocab_size=4000), 4
    places = logit_lens.find_places(lens.logit_lens.EVERY, model.config)
    texts = logit_lens.encoded(model, [RNG.integers(0, 67, 96)] * count)
    [(_, [rows])] = logit_lens.batches(model, [texts], len(places))
    step = 4
    compiled = logit_lens._read.lower(
        model.params, model.config, rows, None, None, np.zeros(0, np.int32), places=places, top=2, step=step
    ).compile()
    every = 4 * len(places) * count * 96 * 4000
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * every


def test_a_steered_run() -> None:
    model = model_of("qwen3")
    edit = steer.add("blocks.1.hook_resid_post", RNG.standard_normal(24), 2.0, positions="every")
    plain, steered = lens.read(model, list(TOKENS)), lens.read(model, list(TOKENS), edits=edit)
    np.testing.assert_array_equal(plain.cells.entropy[1], steered.cells.entropy[1])  # below the edit
    logits = jax.nn.log_softmax(jaxsteer.logits(model, TOKENS, edits=edit))
    found = np.take_along_axis(np.asarray(logits).reshape(-1, 67), steered.cells.top_ids[-1], -1)
    np.testing.assert_allclose(found, steered.cells.top_log_probs[-1], atol=1e-5)
    assert steered.steered and "Steered by" in steered.table() and not plain.steered
    assert not steered.cells.kl[-1].any()


def test_texts_conversations_and_words() -> None:
    model = tiny_model()
    chat = [{"role": "user", "content": "Which do you prefer?"}]
    reading = lens.read(model, [chat, "I think the answer"], top=2)
    ids = reading.at(0).ids
    assert reading.texts[0].tokens == tuple(model.tokenizer.decode([int(i)]) for i in ids)
    table = reading.table()
    assert "2 texts" in table and "blocks.2.hook_resid_post" in table
    again = lens.LensReading.from_json(reading.to_json())
    np.testing.assert_array_equal(again.cells.top_ids, reading.cells.top_ids)
    assert again.table() == table and len(reading.to_rows()) == 4 * len(reading.cells.ids)
    for shown in ("kl", "probability", "entropy"):
        assert reading.plot(shown=shown).svg().startswith("<svg")
    with pytest.raises(UserError, match="a map shows kl, entropy, probability, got 'rank'"):
        reading.plot(shown="rank")
    with pytest.raises(UserError, match="texts 0 to 1, got 2"):
        reading.grid(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "blocks.0.mlp.hook_post"}, "no lens reads 'blocks.0.mlp.hook_post': it is neither the residual"),
        ({"sites": "blocks.0.attn.hook_out"}, "neither the residual stream nor what is added"),
        ({"sites": "blocks.9.hook_resid_post"}, "beyond the last layer"),
        ({"tokens": [67]}, "tokens must be ids from 0 to 66"),
        ({"top": 0}, "top must be at least 1"),
        ({"edits": steer.add("ln_final.hook_normalized", np.ones(24))}, "these edits act on the final norm"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lens.read(model_of("llama"), TEXTS, **options)


def test_texts_that_are_refused() -> None:
    model = model_of("llama")
    for texts, message in (
        ([np.zeros(0, np.int32)], "texts of 1 to 128 tokens, got 0 to 0"),
        ([np.zeros(129, np.int32)], "got 129 to 129"),
        ([np.asarray([70])], "token ids must be below 67, got 70"),
        ([], "No prompt was given"),
    ):
        with pytest.raises(UserError, match=message):
            lens.read(model, texts)
    broken: Params = jax.tree.map(lambda a: a * 1e30, model.params)
    with pytest.raises(UserError, match="NaN or infinite"):
        lens.read(dataclasses.replace(model, params=broken), TEXTS)
