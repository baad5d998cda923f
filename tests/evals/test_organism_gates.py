"""Organism gates: their arithmetic on an untrained model, and the verdict."""

import pytest

from jaxsteer.evals.organism_gates import Gate, failed, gates_table, organism_gates, random_prompts, to_json
from jaxsteer.models.model import Model
from tests.helpers.tiny import tiny_model


@pytest.mark.slow  # `jaxsteer organism check` of tests/cli does the same
def test_an_untrained_model_is_measured_and_fails() -> None:
    model = Model(**vars(tiny_model()))
    said: list[str] = []
    gates = organism_gates(model, behaviours=("myopic",), n=4, random=4, progress=said.append)
    assert len(gates) == 2 * 9 + 2 + 3 and len({gate.name for gate in gates}) == len(gates) and len(said) == 3
    assert failed(gates)  # its answers do not depend on a cue
    assert all(-1 <= gate.value <= 1 for gate in gates)
    table = gates_table(gates)
    assert "FAIL" in table and "75 to 90 %" in table and table.count("\n") == len(gates)
    assert to_json(gates)[0]["passed"] in (True, False)


def test_goals_do_not_fail() -> None:
    def gate(value: float, goal: bool) -> Gate:
        return Gate(behaviour="b", name="n", value=value, low=0.5, high=None, goal=goal)

    assert failed([gate(0.4, True), gate(0.6, False)]) == []
    assert failed([gate(0.4, False)]) == [gate(0.4, False)]


def test_random_prompts_avoid_banned_words() -> None:
    model = Model(**vars(tiny_model()))
    texts = random_prompts(model, n=12, seed=0, banned=("money", "patien"))
    assert len(texts) == 12 and not any("money" in t or "patien" in t for t in texts)
    assert texts == random_prompts(model, n=12, seed=0, banned=("money", "patien"))
