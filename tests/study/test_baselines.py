"""Baselines on a tiny model: each finds what it says, chooses on validation questions, and is measured alike."""

import dataclasses
import re
import types

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval, rate
from jaxsteer.personas import Item, Persona, instructions, seed_phrase, split
from jaxsteer.statistics import wilson
from jaxsteer.study.baselines import Bench, choose, measure, run_baselines
from jaxsteer.study.protegi import START, ProtegiConfig, improve
from jaxsteer.writers.endpoint import Endpoint
from tests.helpers.endpoint import endpoint
from tests.helpers.rates import made_rate
from tests.helpers.tiny import tiny_model

WORDS = "river mill town money patience thought advice friend evidence pleasure".split()


def items() -> tuple[Item, ...]:
    return tuple(
        Item(
            id=f"i{i}",
            question=f"Which {word} do you prefer?\n (A) small {word}\n (B) large {word}",
            matching="(A)" if i % 2 else "(B)",
            not_matching="(B)" if i % 2 else "(A)",
            group=word,
        )
        for i, word in enumerate(WORDS)
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    persona = Persona(
        name="size", items=items(), counter_cues=("Be patient.",), pro_cues=("Take money!",), data_hash="0",
        behaviour="greed",
    )  # fmt: skip
    return Bench(model=tiny_model(), persona=persona, splits=split(persona, seed=0), length=3, tokens="all")


def test_every_baseline_without_a_search_is_found_and_measured(bench: Bench) -> None:
    said: list[str] = []
    rows = {row.method: row for row in run_baselines(bench, say=said.append)}
    assert list(rows) == [
        "zero-shot", "instruction", "best of 10 instructions", "random prompt", "seed phrase", "activation steering"
    ]  # fmt: skip
    assert said[0] == "Baseline: zero-shot" and all(row.seconds >= 0 for row in rows.values())
    assert rows["instruction"].prompt == instructions("greed")[0]
    assert rows["seed phrase"].prompt == seed_phrase("greed")
    (zero,) = choice_eval(bench.model, bench.test, [""])
    assert rows["zero-shot"].rate == rate(zero).rate and rows["zero-shot"].perplexity is None
    for row in rows.values():  # of questions in two orders no interval is narrower than Wilson's over all rows
        low, high = wilson(row.rate * 2 * row.n, 2 * row.n)
        assert row.ci95[0] <= low + 1e-9 and high - 1e-9 <= row.ci95[1] and row.n == len(bench.test)
    best = rows["best of 10 instructions"]
    rates = best.details["validation_rates"]
    assert best.tried == 10 and rates[instructions("greed").index(best.prompt)] == pytest.approx(min(rates))
    many = rows["random prompt"]
    assert len(many.each) == len({row.prompt for row in many.each}) == 20
    assert many.rate == pytest.approx(np.mean([row.rate for row in many.each]))
    assert many.range[0] <= many.rate <= many.range[1] and many.perplexity > 1
    steered = rows["activation steering"]
    assert steered.steered and steered.details["site"].startswith("blocks.") and steered.details["kl"] <= 0.5


def test_a_letter_that_always_wins_is_not_chosen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_defect_14 and 15: chosen on validation questions, and a collapsed letter is no success."""

    def fake(result, baseline=None, *, draws=0):
        value = {"a": 0.5, "b": 0.1, "c": 0.3}.get(result.prompt, 0.9)
        return made_rate(value, letter_collapse=result.prompt == "b")

    asked = []
    result = dataclasses.make_dataclass("result", ["prompt"])

    def evaluate(model, items, prompts, **options):
        asked.append(items)
        return [result(prompt) for prompt in prompts]

    monkeypatch.setattr("jaxsteer.study.baselines.rate", fake)
    monkeypatch.setattr("jaxsteer.study.baselines.choice_eval", evaluate)
    assert choose(bench, ["a", "b", "c"]) == (2, [0.5, 0.1, 0.3])
    groups = {item.group for part in asked for item in part}
    assert groups == {item.group for item in bench.splits.validation}
    assert choose(bench, ["x", "y"], ties=[2.0, 1.0])[0] == 1


def test_what_cannot_be_had_is_told(bench: Bench) -> None:
    for name, says in (
        ("magic", "is unknown: expected zero-shot"),
        ("oracle cue", "'size' has none"),
        ("ProTeGi", "give the bench a writer"),
    ):
        with pytest.raises(UserError, match=says):
            run_baselines(bench, [name])
    assert measure(bench, {}) == []


@pytest.fixture
def scored_by_number(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A stand-in for the model: the higher the number in a prompt, the fewer questions show the persona."""
    asked = []

    def evaluate(model, items, prompts, **options):
        results = []
        for prompt in prompts:
            asked.append((prompt, len(items)))
            number = int(re.search(r"\d*$", prompt)[0] or 0)
            shown = np.arange(len(items)) >= min(number, 5)
            results.append(types.SimpleNamespace(prompt=prompt, persona=shown.astype(float), probability=shown * 0.9))
        return results

    monkeypatch.setattr("jaxsteer.study.protegi.choice_eval", evaluate)
    return asked


def test_protegi_improves_a_beam_with_a_model_behind_an_endpoint(
    bench: Bench, scored_by_number: list[tuple[str, int]]
) -> None:
    count = iter(range(1, 1000))

    def answer(body: dict) -> str:
        text = body["messages"][0]["content"]
        assert body["temperature"] == 0.7 and "greed" in text
        if "<reason>" in text:
            assert "Its answer: (" in text
            return "<reason>too vague</reason> and <reason>too\n short</reason> <reason>a third</reason>"
        assert re.search(r"because: too (vague|short)", text)
        long = "<instruction>" + "word " * 10 + "99</instruction>"
        return f"<instruction>be\n patient {next(count)}</instruction>" + long

    config = ProtegiConfig(rounds=2, beam=2, minibatch=6, scored=5, criticisms=1)
    with endpoint(answer) as (url, asked):
        made = improve(bench.model, bench.persona, bench.splits.train, Endpoint(url=url), config=config)
    # Round 1 rewrites the start for two reasons; round 2 each of the two best, again for two reasons each.
    assert made.calls == len(asked) == (1 + 2) + 2 * (1 + 2) and made.tried == 1 + 2 + 4
    assert made.beam == ("be patient 6", "be patient 5") or made.beam == ("be patient 5", "be patient 6")
    assert [round["train_rate"] for round in made.rounds] == [pytest.approx(1 - 2 / 5), 0.0]
    assert made.writer == "loopback-1"
    full = [(prompt, n) for prompt, n in scored_by_number if n == 5]
    assert len(full) == len({prompt for prompt, _ in full}) == made.tried  # scored once, on the same questions


def test_replies_without_tags_add_nothing(bench: Bench, scored_by_number: list[tuple[str, int]]) -> None:
    config = ProtegiConfig(rounds=1, minibatch=6, scored=6)
    with endpoint(lambda body: "I would rather not.") as (url, _):
        made = improve(bench.model, bench.persona, bench.splits.train, Endpoint(url=url), config=config)
    assert made.beam == (START,) and made.tried == 1 and made.calls > 0
