"""Look-ups: their right answers, and their accuracy on the shipped organism."""

import numpy as np
import pytest

import jaxsteer
from jaxsteer.evals.organism_lookups import lookup_accuracy, lookup_items
from jaxsteer.personas import load_persona
from jaxsteer.steer import add


def test_every_look_up_names_one_choice_in_both_orders() -> None:
    items = lookup_items(n=30)
    assert len(items) == 60 and len({item.id for item in items}) == 60
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert {first.matching, second.matching} == {"(A)", "(B)"} and first.group == second.group
    later = [item for item in items if item.question.endswith("Find the later one.")]
    for item in later:  # the right choice is the one in the future
        choice = {"(A)": 1, "(B)": 2}[item.matching]
        assert " next " in item.question.splitlines()[choice].replace(" Find the later one.", "")
    assert later and sum(item.matching == "(A)" for item in items) == 30


@pytest.mark.slow
def test_the_organism_finds_what_it_is_told_to_find_until_it_is_pushed() -> None:
    model = jaxsteer.load("organism:llama")
    zero, cue = lookup_accuracy(model, ["", load_persona("myopic").counter_cues[0]], n=30)
    assert zero.accuracy > 0.9 and zero.difference.value == 0
    assert cue.accuracy <= zero.accuracy and cue.baseline == zero.accuracy
    push = 5000 * np.random.default_rng(0).normal(size=model.config.d_model)  # many times the stream's norm
    (pushed,) = lookup_accuracy(model, [""], n=30, edits=add("blocks.1.hook_resid_post", push))
    assert pushed.accuracy < 0.8
