"""Target answers in token space: the same ids as the whole text, for every habit of templates."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompts import (
    Conversation,
    Placement,
    build_slots,
    encode,
    prompt_text,
    question_conversation,
    retokenises,
    with_target,
)
from tests.helpers.tiny import KINDS, tiny_tokenizer

QUESTION = "Which do you prefer?"
PROMPT = " please be truthful"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", ["suffix", "system"])
def test_a_target_is_what_the_whole_text_says(kind: str, slot: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    conversations = [
        question_conversation(QUESTION, Placement(slot=slot), alternatives=("(A)", "(B)")),
        question_conversation("Do you agree?", Placement(slot=slot)),
    ]
    targets = [" (B)", "careful people check what is known"]
    slots = with_target(tokenizer, build_slots(tokenizer, conversations, 4), targets)
    for c, target in enumerate(targets):
        whole = Conversation(messages=conversations[c].messages, answer=target)
        prompt = slots_prompt(tokenizer, slots)
        want = encode(tokenizer, whole, prompt_text(tokenizer, prompt))
        np.testing.assert_array_equal(
            np.concatenate([slots.before[c], prompt, slots.closing[c], slots.target[c]]), want
        )
    assert 1 <= len(slots.target[0]) < len(slots.target[1])


def slots_prompt(tokenizer, slots) -> np.ndarray:  # noqa: ANN001
    """Some prompt that re-tokenises."""
    rng = np.random.default_rng(0)
    while True:
        ids = rng.integers(300, len(tokenizer), slots.length).astype(np.int32)
        if retokenises(tokenizer, slots, ids):
            return ids


def test_one_target_for_all_contexts_or_one_for_each() -> None:
    tokenizer = tiny_tokenizer()
    slots = build_slots(tokenizer, [question_conversation(QUESTION)] * 3, 4)
    assert len({tuple(ids) for ids in with_target(tokenizer, slots, "I agree").target}) == 1
    with pytest.raises(UserError, match="2 targets were given for 3 contexts"):
        with_target(tokenizer, slots, ["a", "b"])
    with pytest.raises(UserError, match="target answer is empty"):
        with_target(tokenizer, slots, " ")
    with pytest.raises(UserError, match=r"needs \d+ tokens with its prompt and target"):
        with_target(tokenizer, slots, "I agree", max_positions=12)


def test_a_target_must_continue_the_input() -> None:
    """Where the answer is decided at " (", the input cannot go on with a word."""
    tokenizer = tiny_tokenizer()
    conversation = question_conversation(QUESTION, alternatives=("(A)", "(B)"))
    slots = build_slots(tokenizer, [conversation], 4)
    if len(slots.closing[0]) > len(build_slots(tokenizer, [question_conversation(QUESTION)], 4).closing[0]):
        with pytest.raises(UserError, match="does not continue the input"):
            with_target(tokenizer, slots, "happy")


def test_a_target_right_behind_the_prompt_takes_part_in_tokenisation() -> None:
    """Without any text in between, the prompt's end and the target may merge: then the prompt does not re-tokenise."""
    tokenizer = tiny_tokenizer()
    slots = build_slots(tokenizer, [Conversation(text="I think {prompt}")], 2)
    assert not len(slots.closing[0])
    aimed = with_target(tokenizer, slots, " people")
    good = tokenizer.encode(" careful money", add_special_tokens=False)
    assert len(good) == 2 and retokenises(tokenizer, slots, good) and retokenises(tokenizer, aimed, good)
