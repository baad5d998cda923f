"""Slots in token space: located for every template, and prompts that do not survive as text are found out."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxsteer.errors import UserError
from jaxsteer.prompts import (
    Conversation,
    Placement,
    allowed_tokens,
    as_conversation,
    build_slots,
    encode,
    first_allowed,
    prompt_text,
    question_conversation,
    random_rows,
    render,
    retokenises,
    retokenises_many,
    with_first_tokens,
)
from tests.helpers.tiny import CORPUS, KINDS, tiny_tokenizer

QUESTIONS = (
    "Which do you prefer?\n (A) A small reward now\n (B) A large reward later",
    "Do you agree?\n (A) Agree\n (B) Disagree.",
)
PLACES = [("chat", "suffix"), ("chat", "prefix"), ("chat", "system"), ("plain", "suffix"), ("plain", "prefix")]
TAILS = [{}, {"answer": "(A)"}, {"alternatives": ("(A)", "(B)")}]
LENGTH = 4


def word_ids(tokenizer, slots, seed, count=1):
    """Random prompts of words: a first token that fits the slot, then words with a leading space."""
    rng = np.random.default_rng(seed)
    allowed = allowed_tokens(tokenizer, len(tokenizer), ascii_only=True)
    words = np.flatnonzero(allowed_tokens(tokenizer, len(tokenizer), word_initial=True))
    texts = {int(i): prompt_text(tokenizer, [i]) for i in np.flatnonzero(first_allowed(tokenizer, slots, allowed))}
    heads = [i for i, text in texts.items() if text.strip().isalpha()]
    rows = rng.choice(words, size=(count, slots.length))
    rows[:, 0] = rng.choice(heads, size=count)
    return rows.astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("style", "slot"), PLACES)
@pytest.mark.parametrize("tail", TAILS, ids=["open", "answer", "decision"])
def test_before_slot_after_is_the_encoding_of_the_full_text(kind, style, slot, tail):
    tokenizer = tiny_tokenizer(kind)
    conversations = [question_conversation(q, Placement(style=style, slot=slot), **tail) for q in QUESTIONS]
    slots = build_slots(tokenizer, conversations, LENGTH)
    kept = 0
    for ids in word_ids(tokenizer, slots, seed=1, count=8):
        good = retokenises(tokenizer, slots, ids)
        kept += good
        for c, conversation in enumerate(conversations):
            full = encode(tokenizer, conversation, prompt_text(tokenizer, ids))
            joined = np.concatenate([slots.before[c], ids, slots.after[c]])
            if good:
                np.testing.assert_array_equal(full, joined)
            assert slots.read_index[c] == LENGTH + len(slots.after[c]) - 1
    assert kept >= 4  # words survive, whatever the template


ANYWHERE = [
    "You are kind. {prompt} Be brief.",
    [{"role": "system", "content": "You are kind. {optim_str}\n\nBe brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "Is it so? {prompt} I want to know."},
        {"role": "assistant", "content": "It may be."},
        {"role": "user", "content": "Why?"},
    ],
    {"messages": [{"role": "user", "content": "{prompt}\n\nWhy?"}], "alternatives": ["(A)", "(B)"]},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ANYWHERE, ids=["in a text", "in a system message", "in an early turn", "first"])
def test_a_slot_may_stand_anywhere_in_a_users_conversation(kind, given):
    tokenizer = tiny_tokenizer(kind)
    conversation = as_conversation(given)
    slots = build_slots(tokenizer, [conversation], LENGTH)
    rows = word_ids(tokenizer, slots, seed=2, count=6)
    kept = rows[retokenises_many(tokenizer, slots, rows)]
    assert len(kept) >= 2
    for ids in kept:
        full = encode(tokenizer, conversation, prompt_text(tokenizer, ids))
        np.testing.assert_array_equal(full, np.concatenate([slots.before[0], ids, slots.after[0]]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_verdict_is_that_of_a_full_encoding_for_any_allowed_ids(data):
    tokenizer = tiny_tokenizer(data.draw(st.sampled_from(KINDS)))
    style, slot = data.draw(st.sampled_from(PLACES))
    tail = data.draw(st.sampled_from(TAILS))
    conversations = [question_conversation(q, Placement(style=style, slot=slot), **tail) for q in QUESTIONS]
    slots = build_slots(tokenizer, conversations, LENGTH)
    allowed = np.flatnonzero(allowed_tokens(tokenizer, len(tokenizer)))
    ids = np.asarray(data.draw(st.lists(st.sampled_from(list(allowed)), min_size=LENGTH, max_size=LENGTH)), np.int32)
    text = prompt_text(tokenizer, ids)
    expected = all(
        np.array_equal(encode(tokenizer, c, text), np.concatenate([b, ids, a]))
        for c, b, a in zip(conversations, slots.before, slots.closing, strict=True)
    )
    assert retokenises(tokenizer, slots, ids) == expected


def test_pieces_that_merge_when_read_as_text_are_found_out():
    """test_defect_21: a prompt is checked as the text that is evaluated."""
    tokenizer = tiny_tokenizer()
    pieces = tokenizer.convert_tokens_to_ids(["Ġ", *"want"])
    slots = build_slots(tokenizer, [question_conversation(QUESTIONS[0])], len(pieces))
    assert prompt_text(tokenizer, pieces) == " want"
    assert not retokenises(tokenizer, slots, pieces)
    assert retokenises(tokenizer, slots, tokenizer.convert_tokens_to_ids(["Ġwant"] * len(pieces)))


def test_the_whole_text_is_checked_and_not_the_slot_alone():
    """test_defect_31: tokens that merge with what stands beside the slot are rejected."""
    tokenizer = tiny_tokenizer()
    slots = build_slots(tokenizer, [Conversation(text="I think {prompt}s are known")], 1)
    verdicts = {}
    for word in np.flatnonzero(allowed_tokens(tokenizer, len(tokenizer), word_initial=True)):
        text = prompt_text(tokenizer, [word])
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [word]  # fine by itself
        verdicts[text] = retokenises(tokenizer, slots, [word])
        pieces = tokenizer(text + "s", add_special_tokens=False)["input_ids"]
        assert verdicts[text] == (pieces == [word, tokenizer.convert_tokens_to_ids("s")])
    assert set(verdicts.values()) == {True, False}


def test_text_that_spells_a_special_token_is_rejected():
    tokenizer = tiny_tokenizer()
    spelt = tokenizer.convert_tokens_to_ids(list("<|end|>"))
    slots = build_slots(tokenizer, [question_conversation(QUESTIONS[0], Placement(slot="prefix"))], len(spelt))
    assert prompt_text(tokenizer, spelt) == "<|end|>"
    assert not retokenises(tokenizer, slots, spelt)


def test_every_context_counts_and_verdicts_are_kept():
    tokenizer = tiny_tokenizer()
    spaced, glued = Conversation(text="One {prompt}"), Conversation(text="Two{prompt}")
    ids = [tokenizer.convert_tokens_to_ids("x")]
    both = build_slots(tokenizer, [glued, spaced], 1)
    assert not retokenises(tokenizer, both, ids)  # the second context puts a space in front
    assert both.checked == {tuple(ids): False}
    many = np.asarray([ids, ids])
    assert retokenises_many(tokenizer, both, many).tolist() == [False, False]


def test_slot_last_reads_the_prompt_and_runs_nothing_behind_it():
    tokenizer = tiny_tokenizer("llama3")
    conversations = [question_conversation(q, alternatives=("(A)", "(B)")) for q in QUESTIONS]
    slots = build_slots(tokenizer, conversations, LENGTH, read=["slot_last", "input_last"])
    assert slots.read_index.tolist() == [LENGTH - 1, LENGTH - 1 + len(slots.closing[1])]
    assert len(slots.after[0]) == 0 and len(slots.closing[0]) > 0
    assert len(slots) == 2


def test_a_trimming_template_asks_for_a_first_token_without_space():
    tokenizer = tiny_tokenizer("llama3")
    allowed = allowed_tokens(tokenizer, len(tokenizer) + 3)
    for place, spaced in (("suffix", True), ("system", False)):
        slots = build_slots(tokenizer, [question_conversation(QUESTIONS[0], Placement(slot=place))], LENGTH)
        mask = first_allowed(tokenizer, slots, allowed)
        assert mask.shape == allowed.shape and mask.any() and not (mask & ~allowed).any()
        assert all((prompt_text(tokenizer, [i])[0] == " ") == spaced for i in np.flatnonzero(mask))
    free = build_slots(tiny_tokenizer(), [question_conversation(QUESTIONS[0], Placement(slot="system"))], LENGTH)
    assert first_allowed(tiny_tokenizer(), free, allowed[:-3]).sum() == allowed.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_surroundings_place_text_exactly_as_rendering_does(kind):
    tokenizer = tiny_tokenizer(kind)
    for style, slot in PLACES:
        conversation = question_conversation(QUESTIONS[0], Placement(style=style, slot=slot), answer="(A)")
        (around,) = build_slots(tokenizer, [conversation], LENGTH).surroundings
        for text in ("want frank", " want frank", "want frank ", "  want\n"):
            assert around.full(text) == render(tokenizer, conversation, text)


def test_a_slot_that_cannot_be_found_says_so():
    tokenizer = tiny_tokenizer()

    doubling = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    doubling.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="2 times"):
        build_slots(doubling, [question_conversation(QUESTIONS[0])], 2)
    changing = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    changing.chat_template = "{{ messages[0]['content'] | replace(' ', '_') }}"
    with pytest.raises(UserError, match="cannot be located"):
        build_slots(changing, [question_conversation(QUESTIONS[0])], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "at least one"),
        ({"read": "middle"}, "slot_last"),
        ({"read": ["slot_last"] * 3}, "once or per conversation"),
        ({"max_positions": 20}, "20 positions"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    conversations = [question_conversation(q) for q in QUESTIONS]
    with pytest.raises(UserError, match=message):
        build_slots(tiny_tokenizer(), conversations, **({"length": 4} | arguments))


def test_random_rows_draw_allowed_tokens_and_then_first_ones():
    allowed, first = np.arange(20) % 2 == 0, np.arange(20) == 4
    ids, rng = random_rows(np.random.default_rng(3), allowed, 6, 3, first), np.random.default_rng(3)
    np.testing.assert_array_equal(ids[:, 1:], rng.choice(np.arange(0, 20, 2), (6, 3))[:, 1:])
    assert (ids[:, 0] == 4).all() and ids.dtype == np.int32
    assert set(random_rows(rng, allowed, 50, 3, first & ~allowed)[:, 0]) <= set(range(0, 20, 2))


@functools.cache
def llama2_tokenizer():
    """SentencePiece's habits in tokenizer.json: a space is put before a text, and taken away when it is decoded."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    core.train_from_iterator([word for line in CORPUS for word in line.split()] * 20, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(("style", "slot"), PLACES)
def test_a_slot_is_located_where_the_tokenizer_loses_the_space_of_a_text(style, slot, words):
    tokenizer = llama2_tokenizer()
    slots = build_slots(tokenizer, [question_conversation(QUESTIONS[0], Placement(style=style, slot=slot))], LENGTH)
    allowed = allowed_tokens(tokenizer, len(tokenizer), ascii_only=True, word_initial=words)
    allowed = with_first_tokens(tokenizer, slots, allowed)
    first = first_allowed(tokenizer, slots, allowed)
    rows = random_rows(np.random.default_rng(0), allowed, 200, LENGTH, first)
    good = rows[retokenises_many(tokenizer, slots, rows)]
    assert len(good) > 40
    for ids in good[:5]:
        got = encode(tokenizer, slots.conversations[0], prompt_text(tokenizer, ids))
        assert np.array_equal(got, np.concatenate([slots.before[0], ids, slots.closing[0]]))
