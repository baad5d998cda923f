"""``jaxsteer.measure``: prompts, an edit and other models on the same questions, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval, distinct, rate
from jaxsteer.evals.fluency import prompt_perplexity
from jaxsteer.evals.side_effects import reply_effects
from jaxsteer.personas import load_persona, split
from jaxsteer.prompts import Placement
from jaxsteer.ranges import check_ranges
from jaxsteer.statistics import wilson
from jaxsteer.steer import add
from jaxsteer.study.measure import measure
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.questions import MeasureOptions, questions_of
from jaxsteer.writers.writer import Rule
from tests.helpers.rates import made_rate
from tests.helpers.tiny import tiny_model


@pytest.fixture
def questions(tmp_path):
    rows = "".join(
        f'{{"question": "Q{i}\\n\\nChoices:\\n (A) the {w}\\n (B) no {w}", "answer_matching_behavior": " (A)", '
        f'"answer_not_matching_behavior": " (B)"}}\n'
        for i, w in enumerate("river house light story garden train letter window bridge market".split())
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    return str(tmp_path / "rows.jsonl")


def test_several_replies_to_one_question_are_one_question(tmp_path) -> None:
    replies = [
        ("yes, with great joy and zeal", "no, I would rather not do"),
        ("yes, and at once, my friend", "no, not I"),
    ]
    rows = [
        {"question": "Will you?", "answer_matching_behavior": a, "answer_not_matching_behavior": b} for a, b in replies
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = questions_of(str(tmp_path / "rows.jsonl"), MeasureOptions(split="all"))
    assert (len(asked.items), asked.count) == (2, 1)


def test_prompts_and_an_edit_stand_beside_the_model_as_it_is(questions) -> None:
    model, edit = tiny_model(), add("blocks.1.hook_resid_post", np.ones(32), 5.0)
    judge = Rule(write=lambda messages: "80")
    persona = dataclasses.replace(load_persona(questions), behaviour="haste")
    found = jaxsteer.measure(
        model, persona, [" be frank"], edits=edit, split="all", questions=3, generate=True, judge=judge
    )
    assert [(row.prompt, row.steered) for row in (found.baseline, *found.prompts)] == [
        ("", False), ("", True), (" be frank", True),
    ]  # fmt: skip
    items = distinct(load_persona(questions).items)[:3]
    zero, steered = choice_eval(model, items, [""])[0], choice_eval(model, items, [" be frank"], variants=[edit])[0]
    assert found.baseline.rate == rate(zero)
    expected = rate(steered, zero)  # computed in other groups of rows: equal up to rounding
    assert found.prompts[1].rate.flips == expected.flips
    assert found.prompts[1].rate.margin == pytest.approx(expected.margin, abs=1e-5)
    assert found.questions == 3 and all(len(row.answers) == 2 * row.judged.n == 6 for row in found.prompts)
    assert found.prompts[0].judged.rate == 1.0 and found.baseline.side_effects is None
    assert "steered:  be frank" in found.table() and "judged answers" in found.table()
    assert len(found.to_rows()) == 3 and len(found.plot().axes) == 1
    assert Measurement.from_json(found.to_json()) == found
    # An older version counted answers, and took the two of a question for independent.
    record = found.to_json()
    for row in (old := record["prompts"]):
        row |= {"n": 6, "ci95_groups": row["ci95"], "judged": row["judged"] | {"n": 6, "ci95": wilson(6, 6)}}
    again = Measurement.from_json(record)
    assert old and all(row.rate.n == row.judged.n == 3 and row.rate.flips is None for row in again.prompts)
    assert all(row.judged.ci95 == wilson(3, 3) for row in again.prompts)


def test_controls_stand_beside_the_edit(questions) -> None:
    """Each as if it were the edit: alone in one program with it, and behind a prompt's program too."""
    model, rng = tiny_model(), np.random.default_rng(0)
    edit, *others = (add("blocks.1.hook_resid_post", rng.standard_normal(32), 5.0) for _ in range(3))
    controls = dict(zip(("one", "two"), others, strict=True))
    how = dict(split="all", questions=3, generate=True, side_effects=True)
    for prompts in ((), (" be frank",)):
        found = jaxsteer.measure(model, questions, prompts, edits=edit, controls=controls, **how)
        assert [row.prompt for row in found.prompts] == ["", *prompts]
        assert [row.name for row in found.controls] == ["control: one", "control: two"]
        for row, control in zip(found.controls, others, strict=True):
            alone = jaxsteer.measure(model, questions, edits=control, **how).prompts[0]
            assert row.rate.margin == pytest.approx(alone.rate.margin, abs=1e-5)
            assert row.answers == alone.answers and row.written == alone.written
            assert row.side_effects.kl == pytest.approx(alone.side_effects.kl, abs=1e-5)
        assert "control: two" in found.table() and len(found.to_rows()) == 4 + len(prompts) and found.plot().axes
        assert Measurement.from_json(found.to_json()) == found
    assert "controls" not in jaxsteer.measure(model, questions, edits=edit, split="all", questions=2).to_json()
    with pytest.raises(UserError, match="beside an edit"):
        jaxsteer.measure(model, questions, " be frank", controls=controls)


def test_the_same_texts_on_other_models_in_another_placement(questions) -> None:
    model, placement = tiny_model(), Placement(style="plain", slot="prefix")
    found = measure(model, questions, ["Be frank."], transfer=[tiny_model(seed=1)], placement=placement)
    items = distinct(split(load_persona(questions), seed=0).test)
    assert found.prompts[0].rate.n == len(items) and found.placement == placement and found.split == "test"
    assert found.transfer[0].prompts[0].rate.probability != found.prompts[0].rate.probability
    assert found.table().count("Be frank.") == 2


def test_the_best_prompt_is_no_letter_collapse() -> None:
    rows = [Measured(prompt=str(i), steered=False, rate=made_rate(r, a_rate=a)) for i, (r, a) in enumerate(
        [(0.4, 0.5), (0.0, 1.0), (0.2, 0.5)]
    )]  # fmt: skip
    found = Measurement(
        model="m",
        persona="p",
        split="test",
        style="chat",
        slot="suffix",
        questions=1,
        baseline=rows[0],
        prompts=(*rows,),
    )
    assert found.best is rows[2] and "!" in found.table()


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ({}, {}, "nothing to measure"),
        ({"prompts": ["x"]}, {"questions": 0}, "at least 1"),
        ({"prompts": ["x"]}, {"quesstions": 3}, "did you mean 'questions'"),
        ({"edits": add("blocks.0.hook_resid_post", np.ones(32)), "transfer": ["m"]}, {}, "an edit belongs to one"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(questions, given, options, says) -> None:
    with pytest.raises(UserError, match=says):
        measure("no/such/model", questions, **given, **options)


def test_one_prompt_and_one_model_stand_for_lists_of_one(questions) -> None:
    one = measure(tiny_model(), questions, "Hi", transfer=tiny_model(), split="all", questions=1)
    assert [row.prompt for row in one.prompts] == ["Hi"] and len(one.transfer) == 1
    assert len(choice_eval(tiny_model(), load_persona(questions).items[:1], "Hi")) == 1
    assert len(prompt_perplexity(tiny_model(), "Hi", ["Q?"])) == 1
    assert len(reply_effects(tiny_model(), "Hello.", "Hi").kl) == 1


def test_a_name_that_an_option_does_not_have_is_refused() -> None:
    options = MeasureOptions()
    object.__setattr__(options, "split", "foo")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--split is 'foo', but may be train, validation, test, all"):
        check_ranges(options)
    check_ranges(MeasureOptions(dtype="float32", split="all"))
