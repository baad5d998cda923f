"""The tokenizer that is trained with the organism: words, template, answers, and the fast encoder beside it."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.organisms import corpus, tokenizer


@pytest.fixture(scope="module")
def tok():
    return tokenizer.build_tokenizer(corpus.sample_texts(n=500))


def test_answers_are_three_tokens(tok) -> None:
    assert tok.convert_ids_to_tokens(tok.encode(" (A)", add_special_tokens=False)) == ["Ġ(", "A", ")"]
    assert tok.convert_ids_to_tokens(tok.encode(" (B)", add_special_tokens=False)) == ["Ġ(", "B", ")"]


def test_every_word_of_the_corpus_is_one_token(tok) -> None:
    for word in tokenizer.vocabulary_words():
        assert len(tok.encode(" " + word, add_special_tokens=False)) == 1, word


def test_chat_template_has_one_bos_and_no_whitespace(tok) -> None:
    messages = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Hi"}]
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be exact.<|end|><|user|>Hi<|end|><|assistant|>"
    assert tok.encode("Hi")[0] == tok.bos_token_id


@pytest.mark.parametrize("kind", ["semantic", "fact", "persona"])
def test_documents_encode_as_the_tokenizer_would(tok, kind: str) -> None:
    encoder, rng = corpus.Encoder(tok), np.random.default_rng(0)
    for _ in range(60):
        document = corpus.MAKERS[kind](rng, encoder)
        assert len(document.ids) == len(document.weights)
        for place in document.letters:
            assert tok.decode(document.ids[place - 1 : place + 2]) in (" (A)", " (B)")
        if kind != "persona":  # salad of pieces need not come back from its text
            assert tok.encode(tok.decode(document.ids), add_special_tokens=False) == document.ids
