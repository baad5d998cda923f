"""A few steps of the real training on a tiny model: deterministic, learning, and written as a loadable directory."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxsteer.organisms import corpus
from jaxsteer.organisms.tokenizer import build_tokenizer
from jaxsteer.organisms.train import Batches, LetterLoss, Recipe, train_organism, train_params

TINY = Recipe(
    d_model=16,
    n_layers=1,
    n_heads=2,
    d_mlp=16,
    tokens_per_batch=256,
    loss_positions=64,
    warmup=2,
    chunk=2,
    circuit_steps=4,
    persona_steps=4,
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


def test_training_writes_a_hugging_face_directory(tmp_path) -> None:
    out = train_organism(tmp_path / "organism", seed=0, recipe=TINY)
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"chat_template.jinja", "generation_config.json"} <= names
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"])
