"""Words by mutual information, against float64 and against words that were planted."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.explain.words import KEPT, mutual_words
from jaxsteer.models.sharding import make_mesh

PLANTED = 5


def dense(logits: np.ndarray, posterior: str) -> np.ndarray:
    """[C, V] scores, in float64."""
    given = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    over = given if posterior == "bayes" else logits
    top = over.max(0)
    behind = over - np.log(np.exp(over - top).sum(0)) - top
    return np.exp(given) * (behind + np.log(len(logits)))


@pytest.mark.parametrize("posterior", ["bayes", "softmax"])
@pytest.mark.parametrize(("chunk", "kept"), [(7, KEPT), (64, 0), (64, KEPT), (4096, 0)])
def test_scores_are_those_of_the_formula(
    posterior: str, chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed in chunks of any size, with logits that are kept or computed again = dense float64."""
    monkeypatch.setattr("jaxsteer.explain.words.KEPT", kept)
    rng = np.random.default_rng(0)
    vectors, words = rng.normal(size=(100, 16)), rng.normal(size=(60, 16))
    wanted = dense(vectors @ words.T, posterior)
    indices, scores, information = mutual_words(
        vectors.astype(np.float32), words.astype(np.float32), top=9, posterior=posterior, chunk=chunk
    )
    order = np.argsort(-wanted, axis=1)[:, :9]
    assert np.array_equal(np.asarray(indices), order)
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, order, 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(information, wanted.sum(1), rtol=1e-4, atol=1e-5)


def test_devices_change_nothing() -> None:
    """The latents over eight devices, or on one."""
    rng = np.random.default_rng(1)
    vectors, words = rng.normal(size=(203, 16)).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32)
    from jax.sharding import PartitionSpec as P

    from jaxsteer.models.sharding import place, put

    mesh = make_mesh(prompts=4, model=2)
    spread = put(np.pad(vectors, ((0, 5), (0, 0))), place(mesh, P(("prompts", "model")), (208, 16)))
    alone = mutual_words(np.pad(vectors, ((0, 5), (0, 0))), words, top=6)
    many = mutual_words(spread, words, top=6)
    assert np.array_equal(alone[0], many[0])
    np.testing.assert_allclose(alone[1], many[1], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("sd", [0.3, 1.0, 3.0])
def test_planted_words_are_found(sd: float) -> None:
    """Of 200 latents with 5 planted words each, at least 90 % are among the best 5; the released ranking finds none."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(200, 1000)) * sd
    truth = np.stack([rng.choice(1000, PLANTED, replace=False) for _ in range(200)])
    np.put_along_axis(logits, truth, np.take_along_axis(logits, truth, 1) + 6 * sd, 1)
    vectors, words = logits.astype(np.float32), np.eye(1000, dtype=np.float32)
    indices, _, _ = mutual_words(vectors, words, top=PLANTED)
    hits = np.mean(
        [len(set(row) & set(wanted)) / PLANTED for row, wanted in zip(np.asarray(indices), truth, strict=True)]
    )
    assert hits >= 0.9
    given = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    behind = logits - np.log(np.exp(logits).sum(0))
    released = np.argsort(-np.exp(given) * behind, axis=1)[:, :PLANTED]
    lost = np.mean([len(set(row) & set(wanted)) / PLANTED for row, wanted in zip(released, truth, strict=True)])
    assert lost <= 0.01


def test_constants_change_nothing_and_bounds_hold() -> None:
    """A number added to all logits of a latent, uniform logits, and 0 <= I <= log min(C, V)."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(80, 40)).astype(np.float32) * 4
    words = np.eye(40, dtype=np.float32)
    plain = mutual_words(logits, words, top=40)
    shifted = mutual_words(logits + rng.normal(size=(80, 1)).astype(np.float32) * 5, words, top=40)
    np.testing.assert_allclose(plain[1], shifted[1], rtol=1e-3, atol=1e-5)
    flat = mutual_words(np.full((80, 40), 2.0, np.float32), words, top=40)
    np.testing.assert_allclose(flat[1], 0, atol=1e-6)
    assert 0 <= np.mean(plain[2]) <= np.log(40)
    sharp = mutual_words(np.eye(40, dtype=np.float32) * 60, words, top=1)
    assert np.mean(sharp[2]) == pytest.approx(np.log(40), rel=1e-3)


def test_row_offsets_win_only_in_the_released_posterior() -> None:
    """Latents of large offsets win every word when logits are normalised over latents by themselves (methods C3-3)."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(100, 50)) + rng.normal(size=(100, 1)) * 3
    words = np.eye(50, dtype=np.float32)
    bayes = np.mean(mutual_words(logits.astype(np.float32), words, top=1)[2])
    softmax = np.mean(mutual_words(logits.astype(np.float32), words, top=1, posterior="softmax")[2])
    assert bayes > 0 > softmax
