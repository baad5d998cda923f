"""Detection without a judge: latents whose meaning is known, and controls that know nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import Contexts
from jaxsteer.explain.detection import aurocs, detect
from jaxsteer.explain.explanations import Explanations
from jaxsteer.explain.vocabulary import Vocabulary

LATENTS, WORDS, TOP = 40, 200, 3


def known_world(count: int = 1200) -> tuple[Explanations, Contexts, np.ndarray]:
    """Each latent fires at any of three words of its own, and explanations name two of them and one that is wrong."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(
        words=tuple(f"word{i}" for i in range(WORDS)), tokens=tuple((i,) for i in range(WORDS)), source="given"
    )
    meaning = np.arange(LATENTS * 3).reshape(LATENTS, 3)
    tokens = rng.integers(0, WORDS, (count, 20)).astype(np.int32)
    values, places = np.zeros((count, LATENTS), np.float32), np.zeros((count, LATENTS), np.int16)
    for latent, own in enumerate(meaning):
        hit = np.isin(tokens, own)
        values[:, latent], places[:, latent] = hit.any(1) * rng.uniform(1, 2, count), hit.argmax(1)
    told = meaning.copy()
    told[:, 2] = rng.integers(LATENTS * 3, WORDS, LATENTS)
    found = Explanations(
        words=told.astype(np.int32), scores=np.tile(np.float32([3, 2, 0.1]), (LATENTS, 1)),
        information=np.ones(LATENTS, np.float32), vocabulary=vocabulary, model="m", fingerprint="f", sae="s",
        digest="d", site="blocks.0.hook_resid_post", side="decoder", posterior="bayes", temperature=1.0,
    )  # fmt: skip
    near = (np.arange(LATENTS)[:, None] + np.arange(1, 4)) % LATENTS
    return found, Contexts(tokens=tokens, values=values, places=places), near


def test_known_meanings_are_detected_and_controls_are_not() -> None:
    found, contexts, near = known_world()
    result = detect(found, contexts, near, plain=found.words)
    by = {score.words: score for score in result.scores}
    # two of three words are named: a context that fires by the third alone cannot be told
    exact = np.asarray([
        mannwhitneyu_auroc(present_score(found, contexts, latent), contexts.values[:, latent] > 0)
        for latent in range(LATENTS)
    ])  # fmt: skip
    assert by["mutual information"].auroc == pytest.approx(exact.mean(), abs=0.02)
    assert by["strongest tokens"].auroc >= 0.99
    assert by["random words"].auroc == pytest.approx(0.5, abs=0.03)
    assert by["another latent's"].auroc == pytest.approx(0.5, abs=0.03)
    assert by["mutual information"].hard == pytest.approx(by["mutual information"].auroc, abs=0.03)
    assert (result.latents, result.rare, result.silent) == (LATENTS, 0, 0)
    told = found.words.copy()
    told[:, 2] = np.arange(LATENTS) * 3 + 2
    whole = Explanations(**{**vars(found), "words": told})
    assert detect(whole, contexts, near).scores[0].auroc >= 0.99
    assert "mutual information" in result.table()


def present_score(found: Explanations, contexts: Contexts, latent: int) -> np.ndarray:
    return sum(
        weight * (contexts.tokens == word).any(1)
        for word, weight in zip(found.words[latent], found.scores[latent], strict=True)
    )


def mannwhitneyu_auroc(score: np.ndarray, positive: np.ndarray) -> float:
    up, down = score[positive], score[~positive]
    return float(mannwhitneyu(up, down).statistic / (len(up) * len(down)))


def test_aurocs_are_those_of_mann_and_whitney() -> None:
    """With ties, and with rows that do not count."""
    rng = np.random.default_rng(1)
    score, positive = rng.integers(0, 5, (300, 4)).astype(float), rng.random((300, 4)) < 0.3
    counted = rng.random((300, 4)) < 0.7
    for column, value in enumerate(aurocs(score, positive, counted)):
        inside = counted[:, column]
        assert value == pytest.approx(mannwhitneyu_auroc(score[inside, column], positive[inside, column]))
    assert np.isnan(aurocs(score[:, :1], np.zeros((300, 1), bool))[0])


def test_silent_latents_are_counted_and_bad_contexts_refused() -> None:
    found, contexts, near = known_world()
    quiet = contexts.values.copy()
    quiet[:, :4] = 0
    quiet[50:, 4] = 0
    quiet[: len(quiet) // 2, 4] = 0
    result = detect(found, Contexts(tokens=contexts.tokens, values=quiet, places=contexts.places), near)
    assert (result.silent, result.latents) == (5, LATENTS - 5)
    assert set(result.each) == {str(i) for i in range(5, LATENTS)}
    with pytest.raises(UserError, match="of 39 latents"):
        detect(found, Contexts(tokens=contexts.tokens, values=quiet[:, 1:], places=contexts.places[:, 1:]), near)
    with pytest.raises(UserError, match="read more"):
        detect(found, contexts.part(np.arange(12)), near)


def test_words_of_several_tokens_must_stand_together() -> None:
    vocabulary = Vocabulary(words=("ab", "a"), tokens=((1, 2), (1,)), source="given")
    contexts = Contexts(
        tokens=np.asarray([[1, 2, 3], [2, 1, 3], [3, 1, 2], [3, 3, -1]], np.int32),
        values=np.zeros((4, 1), np.float32), places=np.zeros((4, 1), np.int16),
    )  # fmt: skip
    assert contexts.words(vocabulary).tolist() == [[True, True], [False, True], [True, True], [False, False]]
