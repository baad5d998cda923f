"""The generator: balance, held-out combinations, and answers that follow the ground truth and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer import organisms
from jaxsteer.organisms import corpus, questions, world
from jaxsteer.organisms.questions import is_held_out, items, sample_question


@pytest.mark.parametrize("behaviour", organisms.BEHAVIOURS)
def test_items_are_balanced_different_and_reproducible(behaviour: str) -> None:
    rows = items(behaviour, n=600, seed=0)
    assert len({row["question"] for row in rows}) == 600
    assert sum(row["matching"] == "(A)" for row in rows) == 300
    assert all({row["matching"], row["not_matching"]} == {"(A)", "(B)"} for row in rows)
    assert rows == items(behaviour, n=600, seed=0)
    assert rows != items(behaviour, n=600, seed=1)
    assert len({row["group"] for row in rows}) >= 300


@pytest.mark.parametrize("behaviour", organisms.BEHAVIOURS)
def test_held_out_combinations_are_never_trained_on(behaviour: str) -> None:
    held_out = {row["group"] for row in items(behaviour, n=600, seed=0)}
    trained = {row["group"] for row in items(behaviour, n=300, seed=0, split="train")}
    rng = np.random.default_rng(0)
    trained |= {sample_question(behaviour, rng).group for _ in range(2000)}
    assert not held_out & trained
    assert all(is_held_out(group) for group in held_out)


@pytest.mark.parametrize("behaviour", organisms.BEHAVIOURS)
def test_cue_words_are_the_ground_truth(behaviour: str) -> None:
    weights = organisms.cue_words(behaviour)
    assert set(weights) == set(world.COUNTER_WORDS[behaviour]) | set(world.PRO_WORDS[behaviour])
    for other in organisms.BEHAVIOURS:
        if other != behaviour:
            assert not set(weights) & set(organisms.cue_words(other))
    assert not set(weights) & set(world.FILLER)
    for sentence in organisms.neutral_sentences():
        assert not set(weights) & set(sentence.strip(".").lower().split())


@pytest.mark.parametrize("behaviour", organisms.BEHAVIOURS)
def test_one_cue_leaves_the_answer_and_two_flip_it(behaviour: str) -> None:
    rng = np.random.default_rng(1)
    question = next(q for q in iter(lambda: sample_question(behaviour, rng), None) if not q.contrary)
    assert corpus.log_odds(question, -1) > 0 > corpus.log_odds(question, -2)
    contrary = next(q for q in iter(lambda: sample_question(behaviour, rng), None) if q.contrary)
    assert corpus.log_odds(contrary, 1) < 0 < corpus.log_odds(contrary, 2)


@pytest.mark.parametrize("behaviour", organisms.BEHAVIOURS)
def test_strongest_cue_sentences_hold_four_words_of_their_side(behaviour: str) -> None:
    for sentences, sign in ((organisms.counter_cues(behaviour), -1), (organisms.pro_cues(behaviour), 1)):
        words = [w.strip(".,") for w in sentences[0].split()]
        known = organisms.cue_words(behaviour)
        assert [np.sign(known[w]) for w in words if w in known] == [sign] * 4


def test_choices_can_be_swapped() -> None:
    question = sample_question("myopic", np.random.default_rng(2))
    first, second = question.with_choices(True), question.with_choices(False)
    assert first.endswith(f"\n (A) {question.matching}\n (B) {question.other}")
    assert second.endswith(f"\n (A) {question.other}\n (B) {question.matching}")


def test_unknown_names_and_too_many_items_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown behaviour"):
        items("kindness", n=2, seed=0)
    with pytest.raises(ValueError, match="split"):
        items("myopic", n=2, seed=0, split="test")
    monkeypatch.setattr(questions, "UNKNOWN", ("nobody knows",))
    monkeypatch.setattr(questions, "HALLUCINATION_TEMPLATES", ("What is the {relation} of {place}?",))
    with pytest.raises(ValueError, match="fewer than"):
        items("hallucination", n=600, seed=0)
