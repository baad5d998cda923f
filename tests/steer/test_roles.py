"""Edits of conversations touch the tokens of the roles and turns that they name: when run, and while decoding."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.models.roles import stack_rendered
from jaxsteer.prompts import encode_turns
from jaxsteer.prompts.generate import generate, stream
from tests.helpers.tiny import tiny_model

SITE = "blocks.1.hook_resid_post"
LONG = [
    {"role": role, "content": content}
    for role, content in (
        ("system", "You are a helpful assistant."),
        ("user", "What is the capital of Fisagal?"),
        ("assistant", "Mormor, past the mill."),
        ("user", "Do you agree?"),
    )
]
SHORT = [{"role": "user", "content": "Hello there, my friend"}]
CHOICES: list[dict[str, Any]] = [
    dict(positions="user"),
    dict(positions="response"),
    dict(positions="assistant", turns=[2]),
    dict(turns=[-1]),
    dict(positions="all", turns=[0, -2], special=False),
]


def by_hand(row: Any, choice: dict[str, Any]) -> np.ndarray:
    """The tokens of a choice, from the labels of the tokens alone."""
    names = {"user": ["user"], "response": ["assistant"], "assistant": ["assistant"]}.get(
        choice.get("positions", ""), []
    )
    mask = row.mask(*names, turns=choice.get("turns"))
    if not choice.get("special", True):
        mask &= ~row.mask("template")
    return mask & (np.arange(len(mask)) > 0)


@pytest.mark.parametrize("kind", ["organism", "gemma"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_what_is_captured_moves_at_the_tokens_of_the_role(kind: str, choice: dict[str, Any]) -> None:
    model = tiny_model(kind)
    rows = [encode_turns(model.tokenizer, turns) for turns in (LONG, SHORT)]
    tokens, mask, roles = stack_rendered(rows)
    vector = np.random.default_rng(0).standard_normal(model.config.d_model).astype(np.float32)
    edit = steer.add(SITE, vector, 2.0, positions=steer.select(**choice))
    before = jaxsteer.capture(model, tokens, [SITE], mask)[SITE]
    after = jaxsteer.capture(model, tokens, [SITE], mask, edits=edit, roles=roles)[SITE]
    for b, row in enumerate(rows):
        expected = np.where(by_hand(row, choice)[:, None], 2 * vector, 0)
        np.testing.assert_allclose((after - before)[b, : len(row.ids)], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"roles are those of tokens \[2, 1\]"):
        jaxsteer.logits(
            model, tokens, mask, edits=edit, roles=jax.tree.map(lambda a: a[:, :1] if a.ndim > 1 else a, roles)
        )


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_decoded_tokens_are_those_of_the_whole_conversation(choice: dict[str, Any]) -> None:
    """Conversations beside each other: what is decoded belongs to the assistant's last turn."""
    model = tiny_model()
    vector = np.random.default_rng(1).standard_normal(model.config.d_model).astype(np.float32)
    edit = steer.add(SITE, vector, 4.0, positions=steer.select(**choice))
    settings = dict(temperature=0, max_new_tokens=12)
    made = generate(model, [LONG, SHORT], edits=edit, **settings)
    prompts = [encode_turns(model.tokenizer, turns) for turns in (LONG, SHORT)]
    rows = [row.answered(ids[ids >= 0]) for row, ids in zip(prompts, made.tokens, strict=True)]
    tokens, mask, roles = stack_rendered(rows)
    logits = np.array(jaxsteer.logits(model, tokens, mask, edits=edit, roles=roles))
    logits[..., len(model.tokenizer) :] = -np.inf
    for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert (
            logits[b, len(prompt.ids) - 1 : len(row.ids) - 1].argmax(-1).tolist() == row.ids[len(prompt.ids) :].tolist()
        )
    assert (made.tokens != generate(model, [LONG, SHORT], **settings).tokens).any()
    assert "".join(stream(model, LONG, edits=edit, **settings)) == made.texts[0]


def test_texts_that_are_no_conversations_have_a_prompt_and_a_response() -> None:
    model = tiny_model()
    vector = np.random.default_rng(1).standard_normal(model.config.d_model).astype(np.float32)
    settings = dict(temperature=0, max_new_tokens=12)
    response, user = (steer.add(SITE, vector, 4.0, positions=name) for name in ("response", "user"))
    together = generate(model, [LONG, "The river"], edits=response, **settings)
    assert together.texts[1] == generate(model, "The river", edits=response, **settings).texts[0]
    with pytest.raises(UserError, match="whose each token is"):
        generate(model, "The river", edits=user, **settings)


def test_a_template_that_rewrites_what_is_said_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    tokenizer = type(model.tokenizer)(tokenizer_object=model.tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}"
    model = jaxsteer.Model(**{**vars(model), "tokenizer": tokenizer})
    edit = steer.scale(SITE, 2.0, positions="response")
    assert generate(model, SHORT, edits=edit, max_new_tokens=2).tokens.shape == (1, 2)
    assert "prompt 0: whose its tokens are is not known" in caplog.text
