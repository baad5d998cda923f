"""KV-cache steering: against decoding by hand from an edited cache, and its vectors against float64 NumPy."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.errors import UserError
from jaxsteer.evals.refusal import first_tokens
from jaxsteer.evals.scoring import Text, score_texts
from jaxsteer.models.attention import Prefix
from jaxsteer.models.layers import prefill, run_and_cache
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.sites import resid_site
from jaxsteer.models.transformer import embed, make_context, unembed
from jaxsteer.steer.vectors import Vectors
from tests.helpers.checkpoints import family_config, random_model
from tests.helpers.reference import rms, rotated
from tests.steer.plain import run

MODELS = {name: random_model(family_config(name, n_layers=3)) for name in ("llama", "gemma3")}
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(1, 67, n).astype(np.int32) for n in (5, 11, 2, 8)]
OTHERS = [RNG.integers(1, 67, n).astype(np.int32) for n in (4, 9, 17)]
NEW = 6


def made(model: Model, *, scale: float = 4.0) -> Vectors:
    found = steer.cache_vectors(model, ROWS, OTHERS, keys=0.7)
    return dataclasses.replace(found, coefficient=scale)


ROOM = 24


@partial(jax.jit, static_argnames="config")
def step(params: Any, config: Any, k: Any, v: Any, token: Any, n: Any) -> Any:
    """Logits behind one token that looks back on n cached ones, and its own key and value."""
    positions = jnp.arange(ROOM)[None]
    context = make_context(config, n[None, None], None, Prefix(k, v, positions < n, positions))
    x = embed(params, config, token[None, None], n[None, None])
    x, own = run_and_cache(params, config, x, context, config.n_layers)
    return unembed(params, config, x[0, 0]), own


prefilled = jax.jit(prefill, static_argnames="config")


def by_hand(model: Model, ids: np.ndarray, vectors: Vectors) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens after one prompt and the logits that chose them: prefill, edit in NumPy, run token after token."""
    params, config, n = model.params, model.config, len(ids) - 1
    prefix, _ = prefilled(params, config, *pad_rows([ids[:-1]], ROOM))
    k, v = (np.array(a, np.float64) for a in (prefix.k, prefix.v))
    for layer in range(config.n_layers):
        key = np.zeros((n, config.n_kv_heads, config.d_head))
        key[-1] = vectors.arrays[f"blocks.{layer}.attn.hook_rot_k"]
        turned = rotated(key, config.ropes[config.rope_index[layer]])[-1]
        k[layer, 0, ..., n - 1] += vectors.coefficient * turned
        v[layer, 0, ..., n - 1] += vectors.coefficient * vectors.arrays[f"blocks.{layer}.attn.hook_v"]
    token, tokens, logits = ids[-1], [], []
    for count in range(n, n + NEW):
        made, own = step(params, config, k.astype(np.float32), v.astype(np.float32), np.int32(token), np.int32(count))
        k[..., count], v[..., count] = (np.asarray(a)[..., 0] for a in own)
        logits.append(np.asarray(made))
        tokens.append(token := int(logits[-1].argmax()))
    return tokens, logits


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma3"])
def test_it_is_decoding_from_an_edited_cache(family: str) -> None:
    """In batches of prompts of other lengths, with samples that share a prompt, whatever the padding."""
    model = MODELS[family]
    vectors, options = made(model), dict(max_new_tokens=NEW, temperature=0.0, samples=2, stop=())
    edits = vectors.edits()
    made_by = jaxsteer.generate(model, ROWS, edits=edits, **options)
    plain = jaxsteer.generate(model, ROWS, **options)
    expected = [by_hand(model, row, vectors) for row in ROWS]
    for i, (tokens, _) in enumerate(expected):
        assert made_by.tokens[2 * i].tolist() == made_by.tokens[2 * i + 1].tolist() == tokens
    assert (plain.tokens != made_by.tokens).any()

    whole = [np.r_[row, tokens[:-1]].astype(np.int32) for row, (tokens, _) in zip(ROWS, expected, strict=True)]
    lengths = np.asarray([len(row) for row in ROWS])
    for left in (False, True):
        tokens, mask = pad_rows(whole, left=left)
        found = np.asarray(jaxsteer.logits(model, tokens, mask, edits=edits, prompt_length=lengths))
        untouched = np.asarray(jaxsteer.logits(model, tokens, mask))
        for row, kept, before, n, (_, logits) in zip(found, mask, untouched, lengths, expected, strict=True):
            np.testing.assert_allclose(row[kept][n - 1 :], logits, atol=2e-4)
            np.testing.assert_allclose(row[kept][: n - 1], before[kept][: n - 1], atol=1e-4)
    answers = (np.asarray(expected[1][0][:2], np.int32), np.asarray([9], np.int32))
    scores = score_texts(model.params, model.config, [[Text(context=ROWS[1], answers=answers)]], variants=[edits])
    log_probs = [row - np.log(np.exp(row.astype(np.float64)).sum()) for row in expected[1][1][:2]]
    wanted = [sum(p[t] for p, t in zip(log_probs, answers[0], strict=True)), log_probs[0][9]]
    np.testing.assert_allclose(scores[0, 0, 0], wanted, atol=2e-4)
    odds, *_ = first_tokens(model, ROWS, np.asarray([3]), [edits])
    for odd, (_, logits) in zip(odds[0], expected, strict=True):
        p = np.exp(logits[0].astype(np.float64))[3] / np.exp(logits[0].astype(np.float64)).sum()
        assert odd == pytest.approx(np.log(p / (1 - p)), abs=2e-4)


@pytest.mark.parametrize("family", MODELS)
def test_vectors_are_means_before_the_rotary_embedding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[family]
    monkeypatch.setattr("jaxsteer.steer.cache_contrast.BATCH", 3)
    found = made(model)
    config = model.config
    for layer in range(config.n_layers):
        means = []
        for side in (ROWS, OTHERS):
            seen = [run(model.params, config, row, lambda kind, layer, value: value)[1] for row in side]
            keys = [one[f"blocks.{layer}.attn.hook_k"][-1] for one in seen]
            if config.qk_norm:
                keys = [rms(key, np.asarray(model.params.layers.k_norm[layer], np.float64), config) for key in keys]
            means.append((np.mean(keys, 0), np.mean([one[f"blocks.{layer}.attn.hook_v"][-1] for one in seen], 0)))
        (k, v), (other_k, other_v) = means
        np.testing.assert_allclose(found.arrays[f"blocks.{layer}.attn.hook_rot_k"], 0.7 * (k - other_k), atol=1e-5)
        np.testing.assert_allclose(found.arrays[f"blocks.{layer}.attn.hook_v"], v - other_v, atol=1e-5)


def test_files_gates_and_strengths(tmp_path: Any, compile_counter: Any) -> None:
    model = MODELS["llama"]
    vectors = made(model)
    loaded = steer.load_vectors(steer.save_vectors(vectors, tmp_path / "cache.safetensors"), model=model)
    options = dict(max_new_tokens=NEW, temperature=0.0, stop=())
    expected = jaxsteer.generate(model, ROWS, edits=vectors.edits(), **options).tokens
    plain = jaxsteer.generate(model, ROWS, **options).tokens
    np.testing.assert_array_equal(jaxsteer.generate(model, ROWS, edits=loaded.edits(), **options).tokens, expected)
    with compile_counter() as count:
        jaxsteer.generate(model, ROWS, edits=loaded.edits(coefficient=2.5), **options)
        off = jaxsteer.generate(model, ROWS, edits=loaded.edits(coefficient=0.0), **options)
    assert not count.total()  # another strength is data, and none is the program without edits
    np.testing.assert_array_equal(off.tokens, plain)
    tokens, mask = pad_rows(ROWS)
    assert steer.count_positions(loaded.edits(), tokens, mask).tolist() == [1, 1, 1, 1]
    assert steer.count_positions(loaded.edits(), tokens[:, :1], mask[:, :1]).tolist() == [0, 0, 0, 0]
    where = resid_site(0)
    for threshold, rows in ((1.0, plain), (-1.0, expected)):
        gate = steer.Gate(site=where, vector=np.ones(24, np.float32), threshold=threshold)
        gated = dataclasses.replace(loaded, gate=gate).edits()
        np.testing.assert_array_equal(jaxsteer.generate(model, ROWS, edits=gated, **options).tokens, rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: dataclasses.replace(v, positions="last"), "takes no positions"),
        (lambda v: v.edits(positions="last"), "takes no positions"),
        (lambda v: dataclasses.replace(v, arrays={resid_site(0): np.ones(24, np.float32)}), "holds keys and values"),
        (lambda v: v.edits().check(dataclasses.replace(MODELS["llama"].config, d_head=4)), "another model"),
        (lambda v: jaxsteer.logits(random_model(family_config("llama", n_layers=2)), ROWS[0][None], edits=v.edits()),
         "layers 0 to 1"),
        (lambda v: steer.cache_vectors(MODELS["llama"], ROWS, ROWS), "do not differ"),
        (lambda v: steer.cache_vectors(MODELS["llama"], ROWS, [np.zeros(200, np.int32)]), "the longest has 200"),
    ],
)  # fmt: skip
def test_what_no_cache_holds_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(made(MODELS["llama"]))
