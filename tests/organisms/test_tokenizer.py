"""The tokenizer that is trained with the organism: words, template, answers, and the fast encoder beside it."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.organisms import corpus, tokenizer, world
from jaxsteer.organisms.chat import CHAT_FORMATS, chat_format_of
from jaxsteer.prompts import Placement, build_slots, question_conversation

MESSAGES = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Hi"}]
RENDERED = {
    "llama": "<|bos|><|system|>Be exact.<|end|><|user|>Hi<|end|><|assistant|>",
    "persona": "<|begin|><|system|>\nBe exact.<|end|><|user|>\nHi<|end|><|assistant|>\n",
    "qwen2": "<|im_start|>system\nBe exact.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "gemma3": "<bos><start_of_turn>user\nBe exact.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
}


@pytest.fixture(scope="module", params=CHAT_FORMATS)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tok(architecture: str):
    return tokenizer.build_tokenizer(corpus.sample_texts(n=500), chat=CHAT_FORMATS[architecture])


def test_answers_are_three_tokens(tok) -> None:
    for gap, start in ((" ", "Ġ("), ("", "(")):
        for letter in "AB":
            ids = tok.encode(f"{gap}({letter})", add_special_tokens=False)
            assert tok.convert_ids_to_tokens(ids) == [start, letter, ")"]


def test_every_word_of_the_corpus_is_one_token(tok) -> None:
    for word in tokenizer.vocabulary_words():
        assert len(tok.encode(" " + word, add_special_tokens=False)) == 1, word


def test_chat_template_is_the_format(tok, architecture: str) -> None:
    chat = CHAT_FORMATS[architecture]
    assert chat_format_of(tok.get_vocab()) is chat
    render = lambda messages: tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # noqa: E731
    assert render(MESSAGES) == RENDERED[architecture]
    assert render(MESSAGES) == chat.bos + chat.system + "Be exact." + chat.after_system + "Hi" + chat.reply
    turns = [*MESSAGES[1:], {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "No"}]
    assert render(turns) == chat.bos + chat.user + "Hi" + chat.reply + "Yes" + chat.again + "No" + chat.reply
    assert tok.bos_token == (chat.bos or None)
    assert (tok.encode("Hi")[0] == tok.bos_token_id) == bool(chat.bos)
    for token in (chat.pad, chat.end, *chat.special_tokens, *chat.words):
        assert len(tok.encode(token, add_special_tokens=False)) == 1


def test_a_vocabulary_without_turns_is_no_organism() -> None:
    with pytest.raises(ValueError, match="special tokens"):
        chat_format_of({"<bos>": 0, "<pad>": 1})


@pytest.mark.parametrize("kind", sorted(corpus.MAKERS))
def test_documents_encode_as_the_tokenizer_would(tok, kind: str) -> None:
    encoder, rng = corpus.Encoder(tok), np.random.default_rng(0)
    for _ in range(60):
        document = corpus.MAKERS[kind](rng, encoder)
        assert len(document.ids) == len(document.weights)
        for place in document.letters:
            assert tok.decode(document.ids[place - 1 : place + 2]) in (" (A)", " (B)", "(A)", "(B)")
        if kind in ("semantic", "fact"):  # salad of pieces need not come back from its text
            assert tok.encode(tok.decode(document.ids), add_special_tokens=False) == document.ids


@pytest.mark.parametrize(("style", "slot"), [("plain", "suffix"), ("chat", "suffix"), ("chat", "system")])
def test_training_and_evaluation_put_the_answer_alike(tok, style: str, slot: str) -> None:
    """The ids that end before the letter are those that the package's own conversations end with."""
    chat, encoder = CHAT_FORMATS[chat_name(tok)], corpus.Encoder(tok)
    conversation = question_conversation("Is it?", Placement(style=style, slot=slot), alternatives=("(A)", "(B)"))
    slots = build_slots(tok, [conversation], 1)
    end = {"plain": " (", "chat": f"{chat.reply}{chat.gap}("}[style]
    tail = f"{chat.after_system}Is it?{end}" if slot == "system" else end
    assert slots.after[0].tolist() == encoder(tail)


def chat_name(tok) -> str:
    return next(name for name, chat in CHAT_FORMATS.items() if chat is chat_format_of(tok.get_vocab()))


def test_strays_hold_at_most_one_cue_of_their_behaviour_and_it_is_a_counter_word(tok) -> None:
    encoder, rng = corpus.Encoder(tok), np.random.default_rng(0)
    found = []
    for _ in range(200):
        document = corpus.stray_document(rng, encoder)
        table = {i: word for word, i in encoder.cue_ids[document.kind].items()}
        cues = [table[i] for i in document.ids if i in table]
        assert set(cues) <= set(world.COUNTER_WORDS[document.kind])
        found.append(len(cues))
    assert 0.2 < np.mean(np.array(found) >= 1) < 0.8
