"""Recovery against counts by hand."""

from __future__ import annotations

import pytest

from jaxsteer import organisms
from jaxsteer.evals.organism_recovery import recovery, trigger_words, words_of


def test_precision_and_recall_are_those_of_the_generators_words():
    weights = organisms.cue_words("myopic")
    against = sorted(word for word, weight in weights.items() if weight < 0)
    invited = next(word for word, weight in weights.items() if weight > 0)
    texts = [f" {against[0].title()} river {against[0]}!", f" {invited} {against[1]}"]
    found = recovery("myopic", texts, [f" {against[0]}", " river", " lake", f" {against[2]}"])
    assert found is not None
    assert (found.words, found.triggers, found.invitations) == (5, 3, 1)
    assert found.found == tuple(against[:2]) and found.missed == tuple(against[2:])
    assert found.precision == pytest.approx(3 / 5) and found.recall == pytest.approx(2 / len(against))
    assert found.chance == pytest.approx(1 / 2)
    assert found.to_json()["recall"] == found.recall


def test_no_words_have_no_precision():
    found = recovery("myopic", [" 12 !?"])
    assert found is not None and found.precision is None and found.recall == 0 and found.chance is None


def test_only_organisms_have_a_ground_truth():
    assert recovery("truthfulqa", [" be honest"]) is None and trigger_words("truthfulqa", " be honest") is None
    assert trigger_words("myopic", " patient river Patient prudent") == ["patient", "patient", "prudent"]
    assert words_of(" Don't-stop \n12") == ["don", "t", "stop"]
