"""Direct logit attribution: parts sum to the model's own logit in every family, and are those of float64 NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, capture, logits, steer
from jaxsteer.lens.attribution import Attributed, LogitParts, attribute_logits
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.sae import SAE, SAEConfig, encode
from tests.helpers.checkpoints import FAMILIES, family_config, random_model
from tests.helpers.tiny import tiny_tokenizer

TEXTS = (
    "I think the answer is clear.",
    "Which do you prefer?",
    "wait a year, take the money today, verify every claim",
)
TARGET, OTHER = " the", " money"


def family_model(family: str) -> Model:
    tokenizer = tiny_tokenizer("qwen")
    model = random_model(family_config(family, vocab_size=len(tokenizer) + 8, n_layers=4))
    windows, index = model.config.windows, model.config.rope_index
    assert len(windows) == 4 and len(index) == (4 if model.config.ropes else 0)
    return dataclasses.replace(model, tokenizer=tokenizer)


def ids_of(model: Model, text: str) -> np.ndarray:
    return np.asarray(model.tokenizer(text)["input_ids"], np.int32)


def uncapped(model: Model, text: str) -> np.ndarray:
    """float64 [T, V]: the model's logits before its soft-cap."""
    bare = dataclasses.replace(model, config=dataclasses.replace(model.config, final_softcap=None))
    return np.asarray(logits(bare, ids_of(model, text)[None]), np.float64)[0]


def unembedding(model: Model) -> np.ndarray:
    table = model.params.embed.T if model.params.unembed is None else model.params.unembed
    return np.asarray(table, np.float64)


def summed(parts: LogitParts) -> np.ndarray:
    bias = 0.0 if parts.bias is None else parts.bias
    return parts.embedding + parts.attention.sum(1) + parts.mlp.sum(1) + bias


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_logit_before_the_cap(family: str):
    model = family_model(family)
    target, other = (ids_of(model, text)[0] for text in (TARGET, OTHER))
    parts = attribute_logits(model, TEXTS, TARGET, minus=OTHER)
    found = np.stack([uncapped(model, text)[-1] for text in TEXTS])
    np.testing.assert_allclose(parts.logit, found[:, target] - found[:, other], atol=1e-4)
    np.testing.assert_allclose(summed(parts), parts.logit, atol=1e-4)
    no_head = 0.0 if parts.attention_bias is None else parts.attention_bias
    np.testing.assert_allclose(parts.heads.sum(-1) + no_head, parts.attention, atol=1e-5)
    stream = parts.stream[:, -1] + (0.0 if parts.bias is None else parts.bias)
    np.testing.assert_allclose(stream, parts.logit, atol=1e-4)
    assert sum(part.value for part in parts.result.parts) == pytest.approx(parts.result.logit.value, abs=1e-4)
    assert np.abs(parts.rest).max() < 1e-4
    assert (parts.result.softcap is not None) == (family == "gemma2")


def test_biases_are_parts_of_their_own():
    """Of GPT-2, whose last norm takes the mean away: parts in float64, from captured states, with the norm held."""
    model = family_model("gpt2")
    w, config, target = model.params.layers, model.config, ids_of(model, TARGET)[0]
    parts = attribute_logits(model, TEXTS, TARGET)
    column = unembedding(model)[:, target]
    weighted = column * np.asarray(model.params.final_norm, np.float64)
    for i, text in enumerate(TEXTS):
        seen = capture(model, ids_of(model, text)[None], ["ln_final.hook_scale", "hook_embed"])
        scale, x = (np.asarray(seen[name], np.float64)[0, -1] for name in ("ln_final.hook_scale", "hook_embed"))
        direct = lambda part, scale=scale: (part - part.mean(-1, keepdims=True)) @ weighted / scale  # noqa: E731
        np.testing.assert_allclose(
            parts.bias[i], np.asarray(model.params.final_norm_bias, np.float64) @ column, atol=1e-5
        )
        np.testing.assert_allclose(parts.attention_bias[i], direct(np.asarray(w.o_bias, np.float64)), atol=1e-5)
        np.testing.assert_allclose(parts.embedding[i], direct(x), atol=1e-5)
    assert "bias" in {part.name for part in parts.result.parts} and config.norm == "layer"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_parts_are_those_of_float64(family: str):
    """Every head and neuron from captured states and weights, one text at a time."""
    model = family_model(family)
    config, w = model.config, jax.tree.map(lambda a: np.asarray(a, np.float64), model.params.layers)
    one = 1.0 if config.norm_plus_one else 0.0
    target = ids_of(model, TARGET)[0]
    parts = attribute_logits(model, TEXTS, TARGET, options=Attributed(neurons=7))
    neurons = np.zeros((len(TEXTS), config.n_layers, config.d_mlp))
    names = ("attn.hook_result", "attn.hook_out", "mlp.hook_post", "mlp.hook_out")
    for i, text in enumerate(TEXTS):
        sites = [f"blocks.*.{name}" for name in names] + ["ln_final.hook_scale", "hook_embed"]
        seen = {
            k: np.asarray(v, np.float64)[0, -1] for k, v in capture(model, ids_of(model, text)[None], sites).items()
        }
        along = (
            unembedding(model)[:, target] * (np.asarray(model.params.final_norm) + one) / seen["ln_final.hook_scale"]
        )
        np.testing.assert_allclose(parts.embedding[i], seen["hook_embed"] @ along, atol=1e-5)
        for layer in range(config.n_layers):
            backs = []
            for out, norm in (("attn.hook_out", w.post_attn_norm), ("mlp.hook_out", w.post_mlp_norm)):
                x = seen[f"blocks.{layer}.{out}"]
                scale = np.sqrt((x * x).mean() + config.norm_eps)
                backs.append(along if norm is None else along * (norm[layer] + one) / scale)
            heads = seen[f"blocks.{layer}.attn.hook_result"] @ backs[0]
            np.testing.assert_allclose(parts.heads[i, layer], heads, atol=2e-5)
            neurons[i, layer] = seen[f"blocks.{layer}.mlp.hook_post"] * (w.down[layer] @ backs[1])
            np.testing.assert_allclose(parts.mlp[i, layer], neurons[i, layer].sum(), atol=2e-5)
    mean = neurons.mean(0)
    best = np.argsort(-np.abs(mean), axis=None)[:7]
    layers, units = np.unravel_index(best, mean.shape)
    assert [p.name for p in parts.result.neurons] == [f"m{a}.n{b}" for a, b in zip(layers, units, strict=True)]
    for part, a, b in zip(parts.result.neurons, layers, units, strict=True):
        values = neurons[:, a, b]
        assert part.value == pytest.approx(values.mean(), abs=1e-5)
        spread = 4.302652729749464 * values.std(ddof=1) / np.sqrt(3)  # Student's quantile for three texts
        assert part.ci95 == pytest.approx((values.mean() - spread, values.mean() + spread), abs=1e-4)


def test_every_token_of_a_text_at_once():
    model = family_model("gemma3")
    parts = attribute_logits(model, TEXTS, options=Attributed(positions="all", controls=3))
    at = 0
    for number, text in enumerate(TEXTS):
        ids, found = ids_of(model, text), uncapped(model, text)
        count = len(ids) - 1
        here = slice(at, at + count)
        assert (parts.text[here] == number).all() and (parts.position[here] == np.arange(count)).all()
        assert (parts.target[here] == ids[1:]).all()
        np.testing.assert_allclose(parts.logit[here], found[np.arange(count), ids[1:]], atol=1e-4)
        at += count
    np.testing.assert_allclose(summed(parts), parts.logit, atol=1e-4)
    result = parts.result
    assert (result.texts, result.readings) == (3, at)
    by_text = [parts.logit[parts.text == i].mean() for i in range(3)]
    assert result.logit.value == pytest.approx(np.mean(by_text), abs=1e-5)
    total = sum(part.value for part in result.parts)
    assert total == pytest.approx(result.logit.value, abs=1e-4)


def test_random_tokens_stand_beside_the_target():
    """The band of a part is that of its mean over texts for the tokens that the seed draws."""
    model = family_model("llama")
    known = len(model.tokenizer)
    parts = attribute_logits(model, TEXTS, TARGET, options=Attributed(controls=5, seed=3))
    drawn = np.random.default_rng([3, 1]).choice(known, (2, 5), replace=False)[0]
    means = np.stack([uncapped(model, text)[-1][drawn] for text in TEXTS]).mean(0)
    assert parts.result.logit.control == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-4)


def test_minus_the_mean_of_the_vocabulary_and_the_likeliest_token():
    model = family_model("qwen2")
    parts = attribute_logits(model, TEXTS, minus="mean")
    known = len(model.tokenizer)
    for i, text in enumerate(TEXTS):
        found = uncapped(model, text)[-1][:known]
        assert parts.target[i] == found.argmax()
        assert parts.logit[i] == pytest.approx(found.max() - found.mean(), abs=1e-4)
    np.testing.assert_allclose(summed(parts), parts.logit, atol=1e-4)


def test_a_steered_run_tells_what_the_vector_added():
    model = family_model("gemma2")
    vector = np.random.default_rng(0).standard_normal(model.config.d_model).astype(np.float32)
    push = steer.add("blocks.1.hook_resid_post", vector, 2.0, positions="every")
    parts = attribute_logits(model, TEXTS, TARGET, edits=push)
    target = ids_of(model, TARGET)[0]
    for i, text in enumerate(TEXTS):
        ids = ids_of(model, text)[None]
        scale = float(capture(model, ids, ["ln_final.hook_scale"], edits=push)["ln_final.hook_scale"][0, -1, 0])
        along = unembedding(model)[:, target] * (1 + np.asarray(model.params.final_norm, np.float64)) / scale
        assert parts.rest[i] == pytest.approx(2 * vector @ along, abs=1e-4)
    assert parts.result.edits and "changed by" in parts.result.table()


def test_latents_of_an_sae():
    model = family_model("llama")
    rng, site = np.random.default_rng(0), "blocks.2.hook_resid_post"
    d, f = model.config.d_model, 30
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((d, f), (f, d), (f,), (d,))]
    config = SAEConfig(activation="relu", site_in=site, site_out=site, model="random")
    sae = SAE(*map(jnp.asarray, arrays), config=config)
    parts = attribute_logits(model, TEXTS, TARGET, sae=sae, options=Attributed(latents=4))
    values = []
    for text in TEXTS:
        seen = capture(model, ids_of(model, text)[None], [site, "ln_final.hook_scale"])
        along = unembedding(model)[:, ids_of(model, TARGET)[0]] * np.asarray(model.params.final_norm)
        codes = np.asarray(encode(sae, seen[site][0, -1]), np.float64)
        values.append(codes * (arrays[1] @ along) / float(seen["ln_final.hook_scale"][0, -1, 0]))
    mean = np.mean(values, 0)
    best = np.argsort(-np.abs(mean))[:4]
    assert [part.name for part in parts.result.latents] == [f"f{i}" for i in best]
    assert [part.value for part in parts.result.latents] == pytest.approx(mean[best].tolist(), abs=1e-4)


def test_neither_batch_nor_padding_nor_devices_change_it():
    model = family_model("qwen3")
    whole = attribute_logits(model, TEXTS, TARGET)
    alone = [attribute_logits(model, [text], TARGET, options=Attributed(batch=2)) for text in TEXTS]
    mesh = make_mesh(model=2, prompts=2)
    split = dataclasses.replace(model, params=shard_params(model.params, model.config, mesh), mesh=mesh)
    spread = attribute_logits(split, TEXTS, TARGET)
    for name in ("logit", "embedding", "attention", "mlp", "heads", "stream"):
        np.testing.assert_allclose(
            np.concatenate([getattr(one, name) for one in alone]), getattr(whole, name), atol=1e-5
        )
        np.testing.assert_allclose(getattr(spread, name), getattr(whole, name), atol=1e-5)
    assert [p.name for p in spread.result.neurons] == [p.name for p in whole.result.neurons]


def test_token_ids_stand_for_their_text():
    model = family_model("llama")
    ids = [ids_of(model, text) for text in TEXTS]
    first, second = (attribute_logits(model, given, TARGET) for given in (TEXTS, ids))
    np.testing.assert_array_equal(first.heads, second.heads)
    bare = attribute_logits(dataclasses.replace(model, tokenizer=None), ids, options=Attributed(positions="all"))
    np.testing.assert_allclose(summed(bare), bare.logit, atol=1e-4)
    with pytest.raises(UserError, match="must be token ids from 0 to"):
        attribute_logits(model, [np.asarray([99999])], TARGET)


def test_result_survives_json_and_shows_itself():
    model = family_model("llama")
    result = attribute_logits(model, TEXTS, [TARGET, OTHER, TARGET], minus=[OTHER, TARGET, OTHER]).result
    assert type(result).from_json(result.to_json()) == result
    table = result.table()
    assert "each text's own token minus its other" in table and "32 random tokens" in table and "a0.h" in table
    assert {row["kind"] for row in result.to_rows()} == {"part", "head", "neuron"}
    assert "<svg" in result.plot().svg()
    alone = attribute_logits(model, TEXTS[:1], TARGET, options=Attributed(heads=False, neurons=0, controls=0)).result
    assert alone.logit.ci95 is None and alone.logit.control is None and not alone.heads and alone.plot()


@pytest.mark.parametrize(
    ("texts", "given", "message"),
    [
        ([], {}, "one or more texts"),
        (["a"], {"target": ""}, "no token"),
        (["a", "b"], {"target": ["x"]}, "1 texts were given as target of 2"),
        (["a"], {"target": " the", "minus": " the"}, "are the same one"),
        (["a b"], {"target": "x", "options": Attributed(positions="all")}, "leave it out"),
        (["a"], {"options": Attributed(positions="all")}, "has one token"),
        (["a " * 400], {}, "tokens: random reads 1 to 128"),
        (["a"], {"options": Attributed(batch=0)}, "--batch must be at least 1"),
    ],
)
def test_bad_input(texts: list[str], given: dict, message: str):
    with pytest.raises(UserError, match=message):
        attribute_logits(family_model("llama"), texts, **given)


def test_an_sae_elsewhere_is_refused():
    model = family_model("llama")
    site = "blocks.1.hook_mlp_out"
    config = SAEConfig(activation="relu", site_in=site, site_out=site, model="random")
    d = model.config.d_model
    sae = SAE(*(jnp.zeros(shape) for shape in ((d, 4), (4, d), (4,), (d,))), config=config)
    with pytest.raises(UserError, match="reads the stream after a block"):
        attribute_logits(model, TEXTS, TARGET, sae=sae)
