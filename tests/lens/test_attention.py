"""Attention statistics: against float64 NumPy on whole patterns, and a model whose heads were set by hand."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from jaxsteer import UserError, capture, steer
from jaxsteer.lens.attention import NAMES, AttentionOptions, attention_patterns, attention_statistics
from jaxsteer.lens.texts import rows_of_texts
from jaxsteer.models.config import Rope, llama_config
from jaxsteer.models.model import Model
from jaxsteer.models.params import Layers, Params
from jaxsteer.models.sharding import make_mesh, shard_params
from tests.helpers.checkpoints import family_config, random_model
from tests.helpers.tiny import tiny_model, tiny_tokenizer

TEXTS = ("the old town past the old mill, past the old town", "Which do you prefer?", "money money money")
BARE = AttentionOptions(repeated=0)


def by_hand(pattern: np.ndarray, ids: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of one text's pattern [N, T, T] as the module says them, query by query in float64."""
    p, length = pattern.astype(np.float64), len(ids)
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for q in range(length):
        row = p[:, q]
        if q:
            found["entropy"].append(-(row * np.log(np.where(row > 0, row, 1))).sum(-1))
            found["distance"].append(row @ (q - np.arange(length)))
            found["first"].append(row[:, 0])
            found["previous"].append(row[:, q - 1])
        copies = [k for k in range(q) if ids[k] == ids[q]]
        if copies:
            found["duplicate"].append(row[:, copies].sum(-1))
        if after := [k + 1 for k in copies if k + 1 < q]:
            found["induction"].append(row[:, after].sum(-1))
        for name, of_role in zip(NAMES[6:], keys, strict=True):
            if of_role[:q].any() and not of_role[q]:
                found[name].append(row[:, of_role].sum(-1))
    return {name: np.mean(rows, 0) for name, rows in found.items() if rows}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_statistics_are_those_of_whole_patterns(family: str):
    tokenizer = tiny_tokenizer("qwen")
    model = random_model(family_config(family, vocab_size=len(tokenizer) + 8, n_layers=3))
    model = dataclasses.replace(model, tokenizer=tokenizer)
    found = attention_statistics(model, TEXTS, BARE)
    each = []
    for text in TEXTS:
        ids = np.asarray(tokenizer(text)["input_ids"])
        patterns = attention_patterns(model, text, range(3)).weights
        each.append([by_hand(layer, ids, np.zeros((4, len(ids)), bool)) for layer in patterns])
    for name in NAMES[:6]:
        values = np.asarray([[layer[name] for layer in text] for text in each if name in text[0]])
        assert found.named(name).texts == len(values) >= 2 or name in ("duplicate", "induction")
        np.testing.assert_allclose(found.named(name).mean, values.mean(0), atol=1e-5)
    spread = 4.302652729749464 * np.std([[layer["entropy"] for layer in t] for t in each], 0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(np.asarray(found.named("entropy").high) - found.named("entropy").mean, spread, atol=1e-4)


def test_shares_of_roles_and_of_a_span():
    model = tiny_model("llama3")
    turns = (
        {"role": "system", "content": "be truthful and patient"},
        {"role": "user", "content": "Which do you prefer? a small reward now"},
    )
    row = rows_of_texts(model, [turns])[0]
    found = attention_statistics(model, [turns], dataclasses.replace(BARE, span="small reward"))
    inside = np.zeros(len(row.ids), bool)
    text = [model.tokenizer.decode([int(i)]) for i in row.ids]
    at = 0
    for i, piece in enumerate(text):
        lo, hi = at, at + len(piece)
        at = hi
        where = row.text.index("small reward")
        inside[i] = lo < where + len("small reward") and hi > where
    assert "".join(text) == row.text
    keys = np.stack([row.mask("system"), row.mask("user"), row.mask("assistant"), inside])
    patterns = attention_patterns(model, turns, range(3)).weights
    for name in ("system", "user", "span"):
        expected = [by_hand(layer, row.ids, keys)[name] for layer in patterns]
        np.testing.assert_allclose(found.named(name).mean, expected, atol=1e-5)
    assert found.named("assistant").texts == 0 and "assistant" not in found.table()
    with pytest.raises(UserError, match="every text must contain it"):
        attention_statistics(model, [turns], AttentionOptions(span="river"))


def induction_model() -> Model:
    """Two layers of two heads: a0.h0 attends to the token before and copies it, a1.h0 to what follows earlier copies.

    The stream holds a code of the token [40], one of the token before [40], and a constant. Previous-token attention
    comes from the fast rotary frequencies alone, the match of codes from the slow ones.
    """
    codes, width, h = 40, 82, 128
    config = llama_config(
        vocab_size=codes, d_model=width, n_layers=2, n_heads=2, n_kv_heads=2, d_head=h, d_mlp=4, max_positions=128,
        rope=Rope(theta=1e6),
    )  # fmt: skip
    eye = np.eye(codes)
    embed = np.zeros((codes, width))
    embed[:, :codes], embed[:, -1] = eye, 1.0
    q, k, v = (np.zeros((2, width, 2, h)) for _ in range(3))
    o = np.zeros((2, 2, h, width))
    half = h // 2
    turns = 1e6 ** (-np.arange(half) / half)
    fast, slow = np.arange(8), np.arange(half - codes // 2, half)
    # A query that is turned by one position more than the keys fits best to the key before it.
    q[0, -1, 0, fast], q[0, -1, 0, half + fast] = 3 * np.cos(turns[fast]), -3 * np.sin(turns[fast])
    k[0, -1, 0, fast] = 3.0
    places = np.concatenate([slow, half + slow])
    v[0, np.arange(codes), 0, np.arange(codes)] = 1.0
    o[0, 0, np.arange(codes), codes + np.arange(codes)] = 2.0
    q[1, np.arange(codes), 0, places] = 12.0
    k[1, codes + np.arange(codes), 0, places] = 12.0
    norms = np.ones((2, width))
    layers = dict(attn_norm=norms, mlp_norm=norms, q=q, k=k, v=v, o=o)
    layers |= dict(gate=np.zeros((2, width, 4)), up=np.zeros((2, width, 4)), down=np.zeros((2, 4, width)))
    wide = {name: jnp.asarray(value, jnp.float32) for name, value in layers.items()}
    params = Params(
        embed=jnp.asarray(embed, jnp.float32), unembed=jnp.asarray(embed.T, jnp.float32),
        final_norm=jnp.ones(width), layers=Layers(**wide),
    )  # fmt: skip
    return Model(params=params, config=config, tokenizer=words(), name="planted", fingerprint="")


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 40 words, w0 to w39."""
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@cache
def planted_statistics():
    return attention_statistics(
        induction_model(), ["w1 w2 w3 w4 w5 w6", "w7 w9 w8 w4 w1 w0"], AttentionOptions(length=24, repeated=8)
    )


def test_a_planted_induction_head_is_found_and_no_other():
    found = np.asarray(planted_statistics().named("induction, repeated").mean)
    assert found[1, 0] >= 0.9
    found[1, 0] = 0
    assert found.max() < 0.2
    previous = np.asarray(planted_statistics().named("previous, repeated").mean)
    assert previous[0, 0] >= 0.9 and np.delete(previous.ravel(), 0).max() < 0.2
    assert "a1.h0" in planted_statistics().table()


def test_a_head_without_weights_attends_uniformly():
    found = planted_statistics()
    for name in ("entropy", "distance", "first", "previous", "induction, repeated"):
        assert found.named(name).mean[0][1] == pytest.approx(found.named(name).uniform, abs=1e-5)
    rows = [np.log(q + 1) for q in range(1, 6)]
    assert found.named("entropy").uniform == pytest.approx(np.mean(rows), abs=1e-5)


def test_patterns_times_values_are_what_heads_read_and_another_layout_of_heads_is_not(tmp_path):
    model = random_model(family_config("llama"))
    assert (model.config.n_heads, model.config.n_kv_heads) == (4, 2)
    ids = np.arange(12)[None] + 3
    sites = [f"blocks.1.attn.hook_{name}" for name in ("pattern", "v", "z")]
    p, v, z = (np.asarray(capture(model, ids, sites)[name][0], np.float64) for name in sites)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    right, wrong = (np.einsum("nqk,knh->qnh", p, v[:, layout]) for layout in ([0, 0, 1, 1], [0, 1, 0, 1]))
    np.testing.assert_allclose(right, z, atol=1e-5)
    assert np.abs(wrong - z).max() > 0.1


def test_patterns_are_written_as_data(tmp_path):
    model = tiny_model()
    found = attention_patterns(model, TEXTS[0], [2, 0])
    with np.load(found.write(tmp_path / "p.npz")) as file:
        assert file["weights"].shape == (2, 4, len(found.tokens), len(found.tokens))
        assert "".join(file["tokens"]) == TEXTS[0] and file["layers"].tolist() == [2, 0]
        np.testing.assert_allclose(file["weights"].sum(-1), 1, atol=1e-5)
        assert (np.triu(file["weights"], 1) == 0).all()
    with pytest.raises(UserError, match="ends in .npz"):
        found.write(tmp_path / "p.txt")
    with pytest.raises(UserError, match="layers must be some of 0 to 2"):
        attention_patterns(model, "a", [3])


def test_neither_batch_nor_padding_nor_devices_change_it():
    model, options = tiny_model(), dataclasses.replace(BARE, span="o")
    first = attention_statistics(model, TEXTS[:2], options)
    mesh = make_mesh(model=2, prompts=2)
    split = dataclasses.replace(model, params=shard_params(model.params, model.config, mesh), mesh=mesh)
    long = [*TEXTS[:2], "o " * 60]
    others = [
        attention_statistics(model, TEXTS[:2], dataclasses.replace(options, batch=1)),
        attention_statistics(split, TEXTS[:2], options),
    ]
    for other in others:
        for a, b in zip(first.statistics, other.statistics, strict=True):
            np.testing.assert_allclose(a.mean, b.mean, atol=1e-5)
    assert attention_statistics(model, long, options).texts == 3


def test_a_steered_run_is_another_and_says_so():
    model = tiny_model()
    push = steer.add("blocks.0.hook_resid_post", np.ones(32, np.float32), 5.0)
    plain, steered = (attention_statistics(model, TEXTS, BARE, edits=edits) for edits in (None, push))
    assert plain.named("entropy").mean[0] == pytest.approx(steered.named("entropy").mean[0], abs=1e-6)
    assert np.abs(np.subtract(plain.named("entropy").mean, steered.named("entropy").mean))[1:].max() > 1e-3
    assert "changed by" in steered.table()


def test_result_survives_json_and_shows_itself():
    found = planted_statistics()
    again = type(found).from_json(found.to_json())
    assert again.named("first") == found.named("first") and again.table() == found.table()
    assert len(found.to_rows()) == 4 and "<svg" in found.plot().svg()


def test_random_tokens_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="256 positions"):
        attention_statistics(tiny_model(), TEXTS, AttentionOptions(length=200))
