"""States at the decision token and what is computed from them, against plain float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.decision_states import active_latents, decision_states, divergence, jaccard, share_of_way
from jaxsteer.organisms import organism_sae_dir
from jaxsteer.personas import load_persona, search_conversations
from jaxsteer.prompts import encode

SITES = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def case():
    model = jaxsteer.load("organism:llama")
    items = load_persona("myopic").items[:3]
    texts = ["", " Please be patient.", " river"]
    return model, items, texts, decision_states(model, items, texts, SITES)


def test_states_are_those_at_the_last_token_before_the_answer(case):
    model, items, texts, found = case
    assert found.shape == (3, 2, 6, model.config.d_model)
    conversation = search_conversations(items, "decision")[3][0]
    ids = encode(model.tokenizer, conversation, texts[1])
    alone = jaxsteer.capture(model, ids[None], SITES)
    for at, site in enumerate(SITES):
        np.testing.assert_allclose(found[1, at, 3], alone[site][0, -1], rtol=2e-4, atol=2e-4)


def test_divergence_is_the_mean_over_rows(case):
    _, _, _, found = case
    got = divergence(found[1], found[0])
    for layer in range(2):
        cosines, norms = [], []
        for a, b in zip(found[1, layer].astype(np.float64), found[0, layer].astype(np.float64), strict=True):
            cosines.append(math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b)))
            norms.append(math.sqrt(math.fsum((a - b) ** 2)) / math.sqrt(math.fsum(b * b)))
        assert got.cosine[layer] == pytest.approx(math.fsum(cosines) / 6, abs=1e-12)
        assert got.relative_norm[layer] == pytest.approx(math.fsum(norms) / 6, abs=1e-12)
    same = divergence(found[0], found[0])
    np.testing.assert_allclose(same.cosine, 1, atol=1e-12)
    assert not same.relative_norm.any()
    with pytest.raises(ValueError, match="zero"):
        divergence(np.zeros((1, 1, 4)), np.ones((1, 1, 4)))


def test_share_of_way():
    start, end = np.asarray([[0.0, 0.0], [2.0, 0.0]]), np.asarray([[5.0, 0.0]])
    assert share_of_way(start, start, end) == 0
    assert share_of_way(end, start, end) == 1
    assert share_of_way(np.asarray([[3.0, 77.0]]), start, end) == pytest.approx(0.5)  # beside the way does not count
    with pytest.raises(ValueError, match="no way"):
        share_of_way(start, end, end)


def test_latents_that_are_on_in_half_of_the_rows(case):
    model, _, _, found = case
    sae = jaxsteer.load_sae(organism_sae_dir("llama"))
    states = found[:, 1].reshape(-1, model.config.d_model)
    got = active_latents(sae, states, share=0.5, batch=4)  # 18 rows: the last batch is not full
    codes = np.asarray(jaxsteer.sae.encode(sae, states))
    np.testing.assert_array_equal(got, (codes != 0).mean(0) >= 0.5)
    assert 0 < got.sum() < active_latents(sae, states, share=1 / 18).sum()


def test_jaccard():
    assert jaccard([1, 2, 3], [2, 3, 4, 5]) == pytest.approx(2 / 5)
    assert jaccard(np.asarray([7]), [7]) == 1 and jaccard([1], []) == 0
    assert jaccard([], []) is None


def test_nothing_to_read(case):
    model, items, _, _ = case
    with pytest.raises(UserError, match="0 questions"):
        decision_states(model, [], [""], SITES)
    with pytest.raises(UserError, match="cannot be read"):
        decision_states(model, items, [""], ["blocks.0.attn.hook_q"])
