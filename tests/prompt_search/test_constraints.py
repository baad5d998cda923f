"""Repetition, copies and banned texts, against a few lines of Python."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.prompt_search.constraints import repeats, repetition, text_filter
from jaxsteer.prompts import Conversation, build_slots, prompt_text
from tests.helpers.tiny import tiny_tokenizer


def test_repetition_is_the_formula_of_flrt() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (50, 9)).astype(np.int32)
    want = [sum(max(count - 1, 0) ** 1.5 for count in Counter(row).values()) / 9 for row in ids.tolist()]
    np.testing.assert_allclose(jax.jit(repetition)(ids), want, rtol=1e-6)
    np.testing.assert_array_equal(repetition(jnp.arange(6)[None]), [0.0])


def test_repeats_marks_what_was_there_before() -> None:
    ids = np.random.default_rng(1).integers(0, 2, (40, 3)).astype(np.int32)
    seen = {(0, 1, 1)}
    want = []
    for row in map(tuple, ids.tolist()):
        want.append(row in seen)
        seen.add(row)
    np.testing.assert_array_equal(jax.jit(repeats)(ids, np.asarray([[0, 1, 1]], np.int32)), want)
    assert not np.any(repeats(jnp.arange(12).reshape(4, 3)))


@pytest.mark.parametrize("banned", [(), ("LAST", "  "), ("ing val",)])
def test_text_filter_bans_texts_however_they_are_spelt(banned: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer()
    slots = build_slots(tokenizer, [Conversation(text="Well {prompt} so.")], 3)
    texts = [" lasting value", " you are a", " the last", " think the answer"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    rows = np.asarray([row[:3] for row in rows if len(row) >= 3], np.int32)
    good = text_filter(tokenizer, slots, banned)(rows)
    plain = text_filter(tokenizer, slots)(rows)
    for row, ok, before in zip(rows, good, plain, strict=True):
        text = prompt_text(tokenizer, row).casefold()
        assert ok == (before and not any(word.casefold() in text for word in banned))
    assert plain.any()
