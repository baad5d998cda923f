"""The token mask: what a prompt may be made of."""

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.prompts import allowed_tokens, listed_tokens
from jaxsteer.prompts.tokens import RESERVED, printable
from tests.helpers.tiny import KINDS, SPECIAL, tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_special_padded_and_broken_tokens_are_never_allowed(kind):
    tokenizer = tiny_tokenizer(kind)
    known = len(tokenizer)
    mask = allowed_tokens(tokenizer, known + 40)
    assert mask.dtype == bool and mask.shape == (known + 40,)
    assert not mask[known:].any()  # test_defect_31: rows of a padded table
    assert not mask[tokenizer.convert_tokens_to_ids(SPECIAL)].any()
    for i in np.flatnonzero(mask):
        text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        assert "\ufffd" not in text and text.isprintable()
    newline, half_character = tokenizer.convert_tokens_to_ids(["Ċ", "Ã"])
    assert not mask[newline] and not mask[half_character]


def test_added_and_reserved_tokens_are_never_allowed():
    base = tiny_tokenizer()
    tokenizer = type(base)(tokenizer_object=base.backend_tokenizer)
    tokenizer.add_tokens(["myword", "<unused7>"])
    mask = allowed_tokens(tokenizer, len(tokenizer))
    assert not mask[tokenizer.convert_tokens_to_ids(["myword", "<unused7>"])].any()
    for name in ("<unused99>", "<|reserved_special_token_5|>", "[unused1]", "<extra_id_0>", "[PAD]"):
        assert RESERVED.match(name)
    for name in ("Ġreserved", "unused", "<", "<table>", "[maskwork", "<p>"):
        assert not RESERVED.match(name)


def texts(tokenizer, mask):
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in np.flatnonzero(mask)]


def test_options_narrow_the_mask():
    tokenizer = tiny_tokenizer()
    everything = allowed_tokens(tokenizer, len(tokenizer), ban_answer_tokens=False)
    words = allowed_tokens(tokenizer, len(tokenizer), word_initial=True)
    assert 0 < words.sum() < everything.sum()
    assert all(t[0] == " " and t[1:].isalpha() for t in texts(tokenizer, words))
    assert all(t.isascii() for t in texts(tokenizer, allowed_tokens(tokenizer, len(tokenizer), ascii_only=True)))
    no_frank = texts(tokenizer, allowed_tokens(tokenizer, len(tokenizer), banned=["FRANK"]))
    assert " frank" in texts(tokenizer, everything) and " frank" not in no_frank


def test_answers_cannot_be_named():
    tokenizer = tiny_tokenizer()
    free = set(texts(tokenizer, allowed_tokens(tokenizer, len(tokenizer), ban_answer_tokens=False)))
    banned = free - set(texts(tokenizer, allowed_tokens(tokenizer, len(tokenizer))))
    assert {"A", "B", " A", "C"} <= banned
    assert {t.strip().lower() for t in banned if len(t.strip()) > 3} <= {"agree", "disagree"}
    assert " a" not in banned and "I" not in banned


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(UserError, match="leaves none"):
        allowed_tokens(tiny_tokenizer(), 300, word_initial=True, banned=list("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize("text", ["", "\n", "a\tb", "\ufffd", "\u200b", "\ue000", "\ufeff"])
def test_unprintable_text(text):
    assert not printable(text)
    assert printable(" é") and printable(" 你好")


def test_listed_tokens_are_those_of_the_texts():
    tokenizer = tiny_tokenizer()
    allowed = allowed_tokens(tokenizer, len(tokenizer) + 8)
    assert sorted(texts(tokenizer, listed_tokens(tokenizer, allowed, ["frank", " honest"]))) == [" frank", " honest"]
    assert sorted(texts(tokenizer, listed_tokens(tokenizer, allowed, ["t"]))) == [" t", "t"]
    for text, message in (
        ("frankhonest", r"spells it ' f?.*' \+ "),
        ("<|end|>", "no prompt may use"),
        ("A", "an answer's letter"),
    ):
        with pytest.raises(UserError, match=message):
            listed_tokens(tokenizer, allowed, [text])
