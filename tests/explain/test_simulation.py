"""Simulation of latents by writers who know, toss a coin or answer nonsense; true values are those of the SAE."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import read_contexts
from jaxsteer.explain.labels import Label
from jaxsteer.explain.simulation import EACH, simulate_labels, simulation_rows, token_values
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.sae import load_sae
from jaxsteer.sae.dictionary import encode
from jaxsteer.sae.texts import documents_of
from jaxsteer.writers.writer import Messages, Rule
from tests.explain.test_labels import world


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxsteer.load("organism:persona")


def pieces(request: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", request, re.MULTILINE)


def label_of(request: str) -> str:
    found = re.search(r"Idea: <(.*?)>\n", request, re.DOTALL)
    assert found is not None
    return found[1]


def knows(messages: Messages) -> str:
    text = messages[0]["content"]
    if "A text in" in text:
        return f"Here: {[10 * int(piece == label_of(text)) for piece in pieces(text)]}"
    return "10" if f"<<{label_of(text)}>>" in text else "0"


def coin(messages: Messages) -> str:
    text = messages[0]["content"]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
    return str(rng.integers(0, 11, len(pieces(text))).tolist()) if "A text in" in text else str(rng.integers(0, 11))


@pytest.mark.parametrize("form", ["all", "token"])
def test_a_writer_who_knows_scores_one_and_a_coin_nothing(model: Model, form: str) -> None:
    latents = 40
    contexts, labels = world(model, latents)
    rows = simulation_rows(contexts, range(latents))
    assert all(len(of) == 2 * EACH == len(set(of)) for of in rows.values())
    at = [int(contexts.tokens[rows[i][0], contexts.places[rows[i][0], i]]) for i in range(latents)]
    values = {i: 3.5 * (contexts.tokens[rows[i]] == at[i]) for i in range(latents)}
    truth = simulate_labels(model, labels, contexts, rows, values, Rule(write=knows), form=form)
    assert [score.correlation for score in truth.scores] == pytest.approx([1.0] * latents)
    assert truth.unread == 0 and truth.scores[0].read == 2 * EACH * contexts.tokens.shape[1]
    chance = simulate_labels(model, labels, contexts, rows, values, Rule(write=coin), form=form)
    assert chance.correlation == pytest.approx(0.0, abs=0.05)  # 40 latents x 120 tokens: a spread of 0.014
    assert chance.ci95 is not None and chance.ci95[0] < 0 < chance.ci95[1]
    flat = Rule(write=lambda m: str([0] * len(pieces(m[0]["content"]))) if form == "all" else "0")
    assert {s.correlation for s in simulate_labels(model, labels, contexts, rows, values, flat, form=form).scores} == {
        0
    }


@pytest.mark.parametrize("form", ["all", "token"])
def test_replies_that_cannot_be_read_are_counted(model: Model, form: str) -> None:
    """Too few numbers, numbers beyond 10, words: none of these counts, and the rest does."""
    contexts, labels = world(model, 3)
    rows = simulation_rows(contexts, range(3))
    values = {i: np.random.default_rng(i).random((2 * EACH, 12)) for i in range(3)}
    bad = iter(["[1, 2]", "[99]", "none", "11"] * 1000)
    count = 0

    def sometimes(messages: Messages) -> str:
        nonlocal count
        count += 1
        return coin(messages) if count % 2 else next(bad)

    some = simulate_labels(model, labels, contexts, rows, values, Rule(write=sometimes), form=form)
    assert some.unread == sum(score.read for score in some.scores) == 3 * 2 * EACH * 12 // 2
    with pytest.raises(UserError, match="no reply of"):
        simulate_labels(model, labels, contexts, rows, values, Rule(write=lambda _: "no"), form=form)
    silent = dict.fromkeys(range(3), np.zeros((2 * EACH, 12)))
    assert simulate_labels(model, labels, contexts, rows, silent, Rule(write=coin), form=form).correlation is None
    nothing = labels.__class__(**{**vars(labels), "labels": (Label(latent=0, label=""),)})
    with pytest.raises(UserError, match="no latent has both"):
        simulate_labels(model, nothing, contexts, rows, values, Rule(write=coin), form=form)


def test_true_values_are_those_of_the_contexts(model: Model) -> None:
    """Their maximum and its place are what the contexts hold, and each is what the SAE makes of the stream."""
    sae = load_sae("organism:persona")
    contexts = read_contexts(model, sae, documents_of(model, seed=3), count=96)
    latents = [int(i) for i in np.argsort(-(contexts.values > 0).sum(0))[[0, 5, 200]]]
    rows = simulation_rows(contexts, latents)
    values = token_values(model, sae, contexts, rows, batch=8)
    for latent, of in values.items():
        np.testing.assert_allclose(of.max(1), contexts.values[rows[latent], latent], rtol=1e-4, atol=1e-4)
        fires = of.max(1) > 0
        assert (of.argmax(1) == contexts.places[rows[latent], latent])[fires].all()
    site = str(sae.config.site_in)
    one = latents[0]
    stream = capture(model, contexts.tokens[rows[one][:1]], [site], np.ones((1, contexts.tokens.shape[1]), bool))[site]
    codes = np.asarray(encode(sae, stream.reshape(1, contexts.tokens.shape[1], -1)))[0, :, one]
    held = values[one][0]
    np.testing.assert_allclose(held[held > 0], codes[held > 0], rtol=1e-4, atol=1e-4)
