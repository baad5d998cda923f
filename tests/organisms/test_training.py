"""A few steps of the real training on a tiny model: deterministic, learning, and written as a loadable directory."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.config import GLOBAL_WINDOW
from jaxsteer.models.layers import run_layers
from jaxsteer.models.transformer import embed, make_context, unembed
from jaxsteer.organisms import corpus
from jaxsteer.organisms.architectures import RECIPES, Recipe, initial_params, organism_config
from jaxsteer.organisms.tokenizer import build_tokenizer
from jaxsteer.organisms.train import STATE_FILE, Batches, LetterLoss, train_organism, train_params

TINY = Recipe(
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    d_mlp=16,
    tokens_per_batch=256,
    loss_positions=64,
    warmup=2,
    chunk=2,
    circuit_steps=4,
    persona_steps=4,
    lengths=(64,),
)


@pytest.fixture(scope="module")
def encoder() -> corpus.Encoder:
    return corpus.Encoder(build_tokenizer(corpus.sample_texts(n=500)))


def test_same_seed_gives_the_same_losses_and_weights(encoder: corpus.Encoder) -> None:
    seen: list[list[tuple]] = []
    results = []
    for _ in range(2):
        log: list[tuple] = []
        params, _ = train_params(
            encoder, seed=3, recipe=TINY, progress=lambda i, log=log: log.append((i["step"], i["loss"]))
        )
        seen.append(log)
        results.append(params)
    assert seen[0] == seen[1]
    assert seen[0][-1][0] == 8
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_batches_score_the_letters_first(encoder: corpus.Encoder) -> None:
    batch, kinds = Batches(encoder, Recipe(tokens_per_batch=512, loss_positions=256), 0).next({"persona": 1.0})
    targets = np.asarray(batch.tokens).reshape(-1)[np.asarray(batch.positions) + 1]
    letters = {encoder("A")[0], encoder("B")[0]}
    assert 0 < len(kinds) <= batch.tokens.shape[0]  # documents with a forced answer score no letter
    assert set(targets[: len(kinds)].tolist()) <= letters
    np.testing.assert_array_equal(np.asarray(batch.weights)[: len(kinds)], corpus.LETTER_WEIGHT)
    losses = LetterLoss()
    losses.add(np.arange(len(kinds), dtype=float), ["myopic"] * len(kinds))
    assert losses.means() == {"myopic": (len(kinds) - 1) / 2}


class Stopped(Exception):
    pass


def test_an_interrupted_run_goes_on_as_if_it_had_never_stopped(encoder: corpus.Encoder, tmp_path) -> None:
    whole, _ = train_params(encoder, seed=3, recipe=TINY)
    for stop in (2, 6):  # before and after the change of phase

        def interrupt(state: dict, stop: int = stop) -> None:
            if state["step"] == stop:
                raise Stopped

        file = tmp_path / f"{stop}.state"
        with pytest.raises(Stopped):
            train_params(encoder, seed=3, recipe=TINY, progress=interrupt, state_file=file)
        seen: list[int] = []
        resumed, _ = train_params(
            encoder, seed=3, recipe=TINY, progress=lambda s, seen=seen: seen.append(s["step"]), state_file=file
        )
        assert seen == list(range(stop + 2, 9, 2))
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(UserError, match="another training run"):
        train_params(encoder, seed=4, recipe=TINY, state_file=tmp_path / "6.state")
    whole_file = (tmp_path / "6.state").read_bytes()
    other = save({"0": np.zeros(3, np.float32)}, metadata={})
    for damaged, said in (
        (whole_file[:1000], "not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
        (other, "no state of this training"),
    ):
        (tmp_path / "6.state").write_bytes(damaged)
        with pytest.raises(UserError, match=said):
            train_params(encoder, seed=3, recipe=TINY, state_file=tmp_path / "6.state")


@pytest.mark.parametrize("architecture", RECIPES)
def test_an_untrained_model_knows_its_own_tokens_and_changes_nothing(architecture: str) -> None:
    """Blocks start as (nearly) the identity, and the likeliest next token is the last one, at modest logits."""
    config = organism_config(dataclasses.replace(RECIPES[architecture], vocab_size=64))
    params = initial_params(config, 0)
    tokens = jax.numpy.arange(64)[None]
    before = embed(params, config, tokens, tokens)
    after = run_layers(params, config, before, make_context(config, tokens), 0, config.n_layers)
    assert 0.6 < float(before.std()) < 0.8
    assert float(jax.numpy.abs(after - before).mean() / jax.numpy.abs(before).mean()) < 0.5
    logits = np.asarray(unembed(params, config, before)[0])
    assert (logits.argmax(-1) == np.arange(64)).all()
    assert 1 < (np.diag(logits) - logits.mean(-1)).mean() < 10


def test_families_have_their_own_features() -> None:
    llama, qwen, gemma = (organism_config(RECIPES[name]) for name in ("llama", "qwen2", "gemma3"))
    assert not (llama.qkv_bias or llama.tied_embeddings or llama.windowed)
    assert qwen.qkv_bias and qwen.tied_embeddings and qwen.n_kv_heads < qwen.n_heads
    assert gemma.norm_plus_one and gemma.post_norms and gemma.qk_norm and gemma.embed_scale and gemma.tied_embeddings
    assert gemma.query_scale != gemma.d_head**-0.5
    assert gemma.windows[0] < min(RECIPES["gemma3"].lengths) < gemma.windows[-1] == GLOBAL_WINDOW
    assert len(set(gemma.ropes[i] for i in gemma.rope_index)) == 2


TINY_RECIPES = {
    "llama": TINY,
    "persona": dataclasses.replace(
        TINY, corpus="persona", vocab_size=2048, lengths=(96,), chunk=1, circuit_steps=0, persona_steps=1
    ),
    "qwen2": dataclasses.replace(TINY, architecture="qwen2", strays=True, chunk=1, circuit_steps=1, persona_steps=1),
    "gemma3": dataclasses.replace(
        TINY, architecture="gemma3", n_layers=2, windows=(16,), strays=True, chunk=1, circuit_steps=1, persona_steps=1
    ),
}


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("llama", "llama"), ("persona", "llama"), ("qwen2", "qwen2"), ("gemma3", "gemma3_text")],
)
def test_training_writes_a_hugging_face_directory(
    architecture: str, family: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "sample_texts", functools.partial(corpus.sample_texts, n=500))  # one program for all
    recipe = TINY_RECIPES[architecture]
    last: list = []
    out = train_organism(tmp_path / "organism", seed=0, recipe=recipe, progress=lambda s: last.append(s["params"]))
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"chat_template.jinja", "generation_config.json"} <= names
    assert STATE_FILE not in names
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == family
    assert config["vocab_size"] == len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"])
    model = jaxsteer.load(out, dtype="float32")
    written = dataclasses.replace(recipe, vocab_size=config["vocab_size"])
    assert model.config == organism_config(written)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(last[-1]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b.astype("bfloat16").astype("float32")))
