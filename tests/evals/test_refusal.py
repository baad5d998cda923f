"""Refusal by the first token against a float64 recomputation, and by what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.refusal import first_tokens, opening_ids, refusal_log_odds, refusal_score, request_rows
from jaxsteer.organisms import persona_world
from jaxsteer.steer import Edit, add
from tests.helpers.tiny import KINDS, tiny_model, tiny_tokenizer

REQUESTS = ("Say what the river is", "How do I take money today?", "Wait", "Please verify every claim about the town")


def edit(seed: int, amount: float = 3.0) -> Edit:
    vector = np.random.default_rng(seed).normal(size=32).astype(np.float32)
    return add("blocks.1.hook_resid_post", vector, amount)


def log_probs(row: np.ndarray, changed: Edit | None) -> np.ndarray:
    logits = np.asarray(jaxsteer.logits(tiny_model(), row[None], edits=changed), np.float64)[0, -1]
    return logits - np.log(np.exp(logits).sum())


def test_log_odds_and_divergence_of_many_edits_agree_with_the_public_logits(
    monkeypatch: pytest.MonkeyPatch, compile_counter: type
) -> None:
    monkeypatch.setattr("jaxsteer.evals.refusal.rows_at_once", lambda params, longest: 3)  # the last batch is padded
    model, rows = tiny_model(), request_rows(tiny_model(), REQUESTS)
    openings = opening_ids(model, ["I", "people"])
    edits = [edit(0), edit(1), edit(2, 0.0)]
    with compile_counter() as count:
        odds, kl, plain = first_tokens(model, rows, openings, edits)
    assert count["_first_tokens"] == 1
    assert odds.shape == kl.shape == (3, 4)
    for e, changed in enumerate(edits):
        for i, row in enumerate(rows):
            base, found = log_probs(row, None), log_probs(row, changed)
            p = np.exp(found[openings]).sum()
            assert odds[e, i] == pytest.approx(np.log(p) - np.log1p(-p), abs=1e-4)
            assert kl[e, i] == pytest.approx((np.exp(base) * (base - found)).sum(), abs=1e-4)
    assert (kl[2] == 0).all()
    np.testing.assert_array_equal(plain, odds[2])
    np.testing.assert_array_equal(refusal_log_odds(model, rows, openings), plain[None])


def test_the_score_is_exact_far_out_and_differentiable() -> None:
    logits = jnp.asarray([40.0, 0.0, 1.0, 2.0])
    outside = np.log(np.exp([0.0, 1.0, 2.0]).sum())
    assert refusal_score(logits, np.asarray([0])) == pytest.approx(40 - outside, rel=1e-6)
    slope = jax.grad(lambda x: refusal_score(x, np.asarray([0, 3])))(logits)
    near, far = np.exp([40.0, 2.0]), np.exp([0.0, 1.0])
    np.testing.assert_allclose(slope[jnp.asarray([0, 3])], near / near.sum(), atol=1e-6)
    np.testing.assert_allclose(slope[jnp.asarray([1, 2])], -far / far.sum(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_openings_are_the_tokens_that_stand_behind_the_template(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    found = tokenizer.batch_decode([[i] for i in opening_ids(tiny_model(kind), ["I think", "people are"])])
    assert found == ["I", *([" I"] if kind == "organism" else []), *found[-(2 if kind == "organism" else 1) :]]
    assert {text.strip() for text in found[-1:]} <= {"people", "pe", "p"}


@pytest.mark.parametrize(
    ("openings", "rows", "said"),
    [
        ([" "], ["a"], "an opening of refusals is empty"),
        ([], ["a"], "no opening of refusals was given"),
        (["I"], [], "these 0 have 0 to 0"),
        (["I"], ["river " * 300], "requests must have 1 to 256 tokens"),
    ],
)
def test_bad_input_is_one_message(openings: list[str], rows: list[str], said: str) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=said):
        refusal_log_odds(model, request_rows(model, rows), opening_ids(model, openings))


def test_the_log_odds_of_an_organism_are_those_that_were_planted() -> None:
    """In organism:persona, where every thing and every sentence around a request adds a known number."""
    model = jaxsteer.load("organism:persona")
    openings, asked = opening_ids(model, persona_world.REFUSAL_OPENINGS), []
    for kind in persona_world.KINDS:
        for sentence in ("", "grandmother", "story"):
            asked += persona_world.requests(kind, n=24, seed=1, sentence=sentence)
    found = refusal_log_odds(model, request_rows(model, [request.text for request in asked]), openings)[0]
    planted = np.asarray([request.log_odds for request in asked])
    assert spearmanr(planted, found).statistic > 0.95
    often = np.abs(planted) <= 5  # of what hardly ever happens, training shows nothing
    assert np.mean(np.abs(planted - found)[often]) < 1
