"""Where free replies lie between plain ones and those in character, and whether they answer their question."""

import numpy as np
import pytest

from jaxsteer.evals import reply_quality as module
from jaxsteer.evals.reply_quality import OTHERS, character_axis, relevance, reply_quality, reply_states
from jaxsteer.models.run import capture
from jaxsteer.personas import Item
from jaxsteer.prompts import encode_turns
from tests.helpers.tiny import tiny_model

SITE = "blocks.1.hook_resid_post"
QUESTIONS = [f"What about number {i}?" for i in range(10)]
SHOWN, PLAIN = ([f"{text} {i}" for i in range(10)] for text in ("Aye, me hearty", "It is a number, namely"))
ITEMS = [
    Item(id=str(i), question=q, matching=a, not_matching=b, group=str(i))
    for i, (q, a, b) in enumerate(zip(QUESTIONS, SHOWN, PLAIN, strict=True))
]


def test_states_are_means_over_the_reply_alone() -> None:
    model = tiny_model()
    turns = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": SHOWN[0]}]
    row = encode_turns(model.tokenizer, turns, generation_prompt=False)
    states = np.asarray(capture(model, row.ids[None], [SITE])[SITE])[0]
    by_hand = states[row.mask("assistant", turns=[-1])].mean(0)
    np.testing.assert_allclose(reply_states(model, QUESTIONS[:1], SHOWN[:1], SITE)[0], by_hand, atol=1e-5)


def test_positions_run_from_plain_to_in_character() -> None:
    model = tiny_model()
    axis = character_axis(model, ITEMS, SITE)
    assert axis.positions(model, QUESTIONS, PLAIN).mean() == pytest.approx(0, abs=1e-6)
    assert axis.positions(model, QUESTIONS, SHOWN).mean() == pytest.approx(1, abs=1e-6)
    found = reply_quality(model, axis, QUESTIONS, SHOWN, [1.0, None, *[0.5] * 8])
    assert found.position == pytest.approx(1, abs=1e-6) and found.position_ci95[0] < 1 < found.position_ci95[1]
    assert found.score == pytest.approx(5 / 9) and 0 <= found.relevant <= 1
    assert reply_quality(model, axis, QUESTIONS, SHOWN, [None] * 10).score is None


def test_relevance_asks_for_the_own_question_among_eight(monkeypatch) -> None:
    model = tiny_model()

    def overlap(params, config, groups, mesh):
        """How many tokens of every answer stand in the text."""
        return np.asarray([[[[np.isin(a, t.context).sum() for a in t.answers] for t in g] for g in groups]], float)

    monkeypatch.setattr(module, "score_texts", overlap)
    assert relevance(model, QUESTIONS, [f"As to your question, {q}" for q in QUESTIONS]).tolist() == [1.0] * 10
    turned = [f"As to your question, {q}" for q in (*QUESTIONS[1:], QUESTIONS[0])]
    assert relevance(model, QUESTIONS, turned).mean() <= 0.5 and len(QUESTIONS) > OTHERS
