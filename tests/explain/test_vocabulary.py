"""Which words explain: a model's own, a list, a text; files of explanations."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import neighbours, read_contexts
from jaxsteer.explain.detection import detect
from jaxsteer.explain.explanations import Explanations, digest_of, load_explanations
from jaxsteer.explain.vocabulary import CONTINUED, FRAMES, Vocabulary, word_vectors
from jaxsteer.explain.words import explain_words, latent_vectors
from jaxsteer.models.model import Model
from jaxsteer.sae import load_sae
from jaxsteer.sae.dictionary import SAE
from jaxsteer.sae.texts import documents_of
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxsteer.load("organism:persona")


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae("organism:persona")


@pytest.fixture(scope="module")
def texts(model: Model) -> list[str]:
    documents = documents_of(model, seed=5)
    return [model.tokenizer.decode(documents(i), skip_special_tokens=True) for i in range(300)]


@pytest.fixture(scope="module")
def found(model: Model, sae: SAE, texts: list[str]) -> Explanations:
    return explain_words(model, sae, Vocabulary.of_text(model, texts, size=400), name="organism:persona")


def test_words_of_a_text_stand_by_frequency(model: Model) -> None:
    vocabulary = Vocabulary.of_text(model, ["The fog, the Fog and a storm; the end"], size=3)
    assert vocabulary.words == ("the", "fog", "and")
    assert vocabulary.superficial.all()
    with pytest.raises(UserError, match="hold no words"):
        Vocabulary.of_text(model, ["1 2 ."])


def test_lists_of_words(model: Model) -> None:
    vocabulary = Vocabulary.of_words(model, ["fog", " Fog", "steps"])
    assert vocabulary.words == ("fog", "steps") and vocabulary.repeated == 1
    assert vocabulary.index("FOG") == 0
    for bad, says in (([], "empty"), ([""], "is no word")):
        with pytest.raises(UserError, match=says):
            Vocabulary.of_words(model, bad)
    with pytest.raises(UserError, match="none of the 2 words"):
        vocabulary.index("pirate")


def test_words_that_cannot_be_spelt_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    core = Tokenizer(models.WordLevel({"?": 0, "fog": 1, "rain": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    knows_two = dataclasses.replace(tiny_model(), tokenizer=tokenizer)
    found = Vocabulary.of_words(knows_two, ["fog", "schooner", "rain", "gale"])
    assert (found.words, found.unspelt) == (("fog", "rain"), 2)
    assert "cannot spell 2 of the words" in caplog.text and "'schooner', 'gale'" in caplog.text
    assert Vocabulary.of_text(knows_two, ["fog gale fog"]).unspelt == 1
    with pytest.raises(UserError, match="cannot spell any of the 2 words: 'schooner'"):
        Vocabulary.of_words(knows_two, ["schooner", "gale"])


def test_vectors_are_means_of_the_unembedding(model: Model) -> None:
    vocabulary = Vocabulary.of_words(model, ["fog", "steps", "hello"])
    table = np.asarray(model.params.embed if model.params.unembed is None else model.params.unembed.T, np.float64)
    for word, ids in zip(word_vectors(model, vocabulary), vocabulary.tokens, strict=True):
        np.testing.assert_allclose(word, table[list(ids)].mean(0), rtol=1e-5, atol=1e-6)
    assert len(vocabulary.tokens[2]) > 1


def test_pieces_and_odd_rows_stay_out_of_a_models_own_words(model: Model) -> None:
    """Kept are tokens behind which, in some frame, no rest of a word is expected, with rows of ordinary norm."""
    plain = Vocabulary.of_model(model, size=300)
    pieces = model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))
    inside = np.asarray(
        [p[0] != "Ġ" and p[0].isalpha() for p in pieces] + [False] * (model.config.vocab_size - len(pieces))
    )

    def share(token: int, frame: str) -> float:
        text = model.tokenizer("<|begin|>" + frame, add_special_tokens=False)["input_ids"]
        logits = np.asarray(jaxsteer.logits(model, np.asarray([[*text, token]], np.int32)), np.float64)[0, -1]
        odds = np.exp(logits - logits.max())
        return float(odds[inside].sum() / odds.sum())

    least = {
        i: min(share(i, frame) for frame in FRAMES) for i, p in enumerate(pieces) if re.fullmatch("Ġ[a-zA-Z]{2,}", p)
    }
    kept = {ids[0] for ids in plain.tokens}
    assert all(least[i] < CONTINUED for i in kept)
    assert plain.fragments == sum(value >= CONTINUED for value in least.values()) > 0
    at = plain.tokens[10][0]
    assert model.params.unembed is not None
    params = dataclasses.replace(model.params, unembed=model.params.unembed.at[:, at].multiply(1e-6))
    unseen = Vocabulary.of_model(dataclasses.replace(model, params=params), size=300)
    assert plain.words[10] not in unseen.words and unseen.odd > plain.odd


def test_latents_of_another_width_are_refused(model: Model, sae: SAE) -> None:
    narrow = dataclasses.replace(sae, W_dec=sae.W_dec[:, :64])
    with pytest.raises(UserError, match="width 64"):
        latent_vectors(model, narrow)
    with pytest.raises(UserError, match="temperature"):
        explain_words(model, sae, Vocabulary.of_words(model, ["fog", "steps"]), temperature=0.0)


def test_a_file_of_explanations_comes_back(found: Explanations, sae: SAE, tmp_path: Path) -> None:
    found.save(tmp_path / "e.safetensors")
    again = load_explanations(tmp_path / "e.safetensors")
    assert np.array_equal(again.words, found.words) and np.array_equal(again.scores, found.scores)
    assert again.vocabulary == found.vocabulary and again.digest == digest_of(sae)
    again.check_sae(sae)
    with pytest.raises(UserError, match="not of the SAE"):
        again.check_sae(dataclasses.replace(sae, W_dec=sae.W_dec * jnp.float32(1.5)))
    damaged = dataclasses.replace(found, words=found.words + 10_000)
    damaged.save(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="damaged"):
        load_explanations(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="no latent 99999"):
        found.of(99999)


def test_latents_are_found_by_their_words(found: Explanations) -> None:
    """Every latent comes back for its own strongest word, and nothing for a word that is not there."""
    assert 0 < found.mutual_information < found.bound
    for latent in (0, 17, 100):
        (word,) = found.of(latent, 1)
        hits = found.find(word, top=len(found))
        assert latent in [hit.latent for hit in hits]
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    with pytest.raises(UserError, match="none of the words"):
        found.find("zzzz")


def test_words_of_a_real_sae_tell_where_its_latents_fire(model: Model, sae: SAE, found: Explanations) -> None:
    """On the organism: better than the words of other latents, which are at chance."""
    contexts = read_contexts(model, sae, documents_of(model, seed=77), count=600)
    result = detect(found, contexts, neighbours(sae, 10))
    by = {score.words: score for score in result.scores}
    assert by["another latent's"].auroc_ci95 is not None and by["mutual information"].auroc_ci95 is not None
    assert by["mutual information"].auroc_ci95[0] > by["another latent's"].auroc_ci95[1]


def test_neighbours_are_those_of_the_largest_cosine(sae: SAE) -> None:
    rows = np.asarray(sae.W_dec, np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = units @ units.T
    np.fill_diagonal(cosine, -np.inf)
    near = neighbours(sae, 3)
    np.testing.assert_allclose(
        np.take_along_axis(cosine, near, 1), np.sort(cosine, axis=1)[:, :-4:-1], rtol=1e-5, atol=1e-6
    )
