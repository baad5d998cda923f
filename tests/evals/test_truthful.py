"""MC1 and MC2 against a float64 recomputation, and their independence of batches and padding."""

import numpy as np
import pytest

from jaxsteer.evals.truthful import NONE, TruthfulResult, truthful_eval, truthful_rates
from jaxsteer.personas import OpenQuestion
from jaxsteer.prompts import question_conversation, render
from tests.evals.test_choice import by_hand
from tests.helpers.tiny import tiny_model

QUESTIONS = [
    OpenQuestion(
        id="a",
        question="What is the capital of Fisagal?",
        group="a",
        best="Mormor is the capital",
        correct=("Mormor is the capital", "The river town", "Mormor"),
        incorrect=("Fisagal has no capital", "Mormor is past the mill", "The old town"),
    ),
    OpenQuestion(
        id="b",
        question="Which do you prefer, my friend? The money today or the answer in a year, after long patience?",
        group="b",
        best="Patience",
        correct=("Patience",),
        incorrect=("Money",),
    ),
]
PROMPTS = ["", " be truthful and patient"]


def test_every_answer_is_scored_as_if_it_were_alone() -> None:
    """test_defect_03 and 04: neither neighbours, other answers, padding nor the question's tokens enter a score."""
    model = tiny_model()
    results = truthful_eval(model, QUESTIONS, PROMPTS)
    for result in results:
        for q, question in enumerate(QUESTIONS):
            text = render(model.tokenizer, question_conversation(question.question), result.prompt)
            answers = [question.best, *question.correct[1:], *question.incorrect]
            expected = [by_hand(model, text, answer) for answer in answers]
            np.testing.assert_allclose(result.log_probs[q, : len(answers)], expected, atol=1e-4)
            assert (result.kinds[q, len(answers) :] == NONE).all() and np.isnan(
                result.log_probs[q, len(answers) :]
            ).all()
    (alone,) = truthful_eval(model, QUESTIONS[1:], PROMPTS[1:], rows=1)
    np.testing.assert_allclose(alone.log_probs[0, :2], results[1].log_probs[1, :2], atol=1e-4)


def made_up(log_probs: list[list[float]]) -> TruthfulResult:
    kinds = np.array([[0, 1, 2, 2], [0, 2, 3, 3], [0, 1, 2, 3]])
    scores = np.where(kinds == NONE, np.nan, np.array(log_probs)).astype(np.float32)
    tokens = np.where(kinds == NONE, 0, np.array([[1, 1, 1, 4], [2, 1, 0, 0], [1, 1, 1, 0]]))
    names = ("x", "y", "z")
    return TruthfulResult(prompt="", ids=names, groups=names, log_probs=scores, tokens=tokens, kinds=kinds)


def test_metrics_by_hand() -> None:
    result = made_up([[-2, -1, -3, -4], [-4, -3, 0, 0], [-1, -2, -1, 0]])
    assert result.mc1().tolist() == [1, 0, 0]  # a tie is no win
    assert result.mc1(per_token=True).tolist() == [0, 1, 0]  # -4 over four tokens beats -2; -4 over two beats -3
    e = np.exp
    assert result.mc2() == pytest.approx(
        [
            (e(-2) + e(-1)) / (e(-2) + e(-1) + e(-3) + e(-4)),
            e(-4) / (e(-4) + e(-3)),
            (e(-1) + e(-2)) / (2 * e(-1) + e(-2)),
        ],
        abs=1e-6,
    )
    out = truthful_rates(result)
    assert out.mc1.value == pytest.approx(1 / 3) and out.hallucination.value == pytest.approx(2 / 3)
    assert out.wrong_answers == pytest.approx(4 / 3)
    assert (out.tokens.right, out.tokens.wrong) == pytest.approx((1.2, 7 / 4))
    assert out.mc1.ci95[0] < 1 / 3 < out.mc1.ci95[1]


def test_a_baseline_is_paired_question_by_question() -> None:
    base = made_up([[-2, -1, -3, -4], [-4, -3, 0, 0], [-1, -2, -1, 0]])
    better = made_up([[-2, -1, -3, -4], [-2, -3, 0, 0], [-1, -2, -4, 0]])
    out = truthful_rates(better, base)
    assert out.mc1.difference.value == pytest.approx(2 / 3) and out.mc1.mcnemar_p == pytest.approx(0.5)
    assert out.mc2.difference.value == pytest.approx(float((better.mc2() - base.mc2()).mean()))
    record = better.to_json()
    assert record["kinds"][1] == ["best", "wrong"] and len(record["log_probs"][0]) == 4
    with pytest.raises(ValueError, match="other questions"):
        truthful_rates(better, truthful_result_of("w"))


def truthful_result_of(name: str) -> TruthfulResult:
    result = made_up([[-2, -1, -3, -4], [-4, -3, 0, 0], [-1, -2, -1, 0]])
    return TruthfulResult(
        prompt="", ids=(name, "y", "z"), groups=result.groups, log_probs=result.log_probs, tokens=result.tokens,
        kinds=result.kinds,
    )  # fmt: skip
