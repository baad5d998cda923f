"""Soft prompts as tokens: they stand where a prompt stands, are read and never written, and survive their file."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.models.layers import forward
from jaxsteer.prompts import Placement, build_slots, prompt_text, question_conversation
from jaxsteer.prompts.conversation import encode
from jaxsteer.prompts.soft import SoftPrompt, load_soft, placed, save_soft, with_soft
from tests.helpers.tiny import KINDS, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def soft_of(model, rows) -> SoftPrompt:
    return SoftPrompt(
        embeddings=np.asarray(rows, np.float32), model=model.name, fingerprint=model.fingerprint, metadata={"why": "x"}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_its_text_takes_the_place_of_a_prompt_in_every_template(kind: str) -> None:
    model = tiny_model(kind)
    steered, text = with_soft(model, soft_of(model, np.ones((3, 32))))
    for style, slot in [("chat", "suffix"), ("chat", "prefix"), ("chat", "system"), ("plain", "suffix")]:
        conversation = question_conversation(
            "Do you agree?", Placement(style=style, slot=slot), alternatives=("(A)", "(B)")
        )
        slots = build_slots(model.tokenizer, [conversation], 3)
        got = encode(steered.tokenizer, conversation, text)
        start = len(slots.before[0])
        np.testing.assert_array_equal(got[:start], slots.before[0])
        np.testing.assert_array_equal(got[start + 3 :], slots.closing[0])
        assert (got[start : start + 3] >= len(model.tokenizer)).all()
        assert encode(model.tokenizer, conversation, "clear").max() < len(model.tokenizer), (
            "the first model is as it was"
        )


def test_embeddings_of_tokens_do_what_the_tokens_do_and_cannot_be_written(model) -> None:
    conversation = question_conversation("Do you agree?")
    slots = build_slots(model.tokenizer, [conversation], 3)
    words = np.asarray(model.tokenizer(" the answer is")["input_ids"][-3:], np.int32)
    steered, text = with_soft(model, soft_of(model, np.asarray(model.params.embed)[words]))
    plain = encode(model.tokenizer, conversation, prompt_text(model.tokenizer, words))
    soft = encode(steered.tokenizer, conversation, text)
    assert len(plain) == len(soft) and (plain != soft).sum() == 3 == slots.length
    run = jax.jit(forward, static_argnums=1)
    want, got = run(model.params, model.config, plain[None]), run(steered.params, steered.config, soft[None])
    assert got.shape == want.shape, "no logits for the new tokens"
    np.testing.assert_allclose(got, want, atol=1e-5)
    other, _ = with_soft(model, soft_of(model, 3 * np.asarray(model.params.embed)[words]))
    assert np.abs(run(other.params, other.config, soft[None]) - want).max() > 1e-2


def test_file_round_trip_and_refusals(model, tmp_path) -> None:
    soft = soft_of(model, np.arange(64).reshape(2, 32))
    again = load_soft(save_soft(soft, tmp_path / "made" / "soft.safetensors"))
    np.testing.assert_array_equal(again.embeddings, soft.embeddings)
    assert (again.model, again.fingerprint, dict(again.metadata)) == (model.name, model.fingerprint, {"why": "x"})
    with pytest.raises(UserError, match="there is no soft prompt"):
        load_soft(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"12345678nonsense")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_soft(tmp_path / "bad")
    with pytest.raises(UserError, match="width 16, but tiny-organism has 32"):
        with_soft(model, soft_of(model, np.ones((2, 16))))
    strange = dataclasses.replace(soft, fingerprint="1" * 64)
    with pytest.raises(UserError, match="any_weights"):
        with_soft(model, strange)
    with_soft(model, strange, any_weights=True)


def test_two_soft_prompts_side_by_side(model) -> None:
    once, first = with_soft(model, soft_of(model, np.ones((2, 32))))
    twice, second = with_soft(once, soft_of(model, 2 * np.ones((2, 32))))
    ids = twice.tokenizer(first + second, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == 4
    np.testing.assert_array_equal(np.asarray(twice.params.embed)[ids][:, 0], jnp.asarray([1.0, 1.0, 2.0, 2.0]))


def test_placed() -> None:
    assert placed("Is it {prompt} so?", "X") == "Is it X so?"
    assert placed("Is it so?", "X") == "Is it so? X"
    assert placed("", "X") == "X"
    system, user = {"role": "system", "content": "Be {prompt}."}, {"role": "user", "content": "Well?"}
    assert [m["content"] for m in placed([system, user], "X")] == ["Be X.", "Well?"]
    assert [m["content"] for m in placed([user], "X")] == ["Well? X"]
