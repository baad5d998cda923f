"""generate: what goes in, where texts end, and how they are streamed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jaxsteer
from jaxsteer.prompts import apply_template, encode_texts
from jaxsteer.prompts import generate as room
from jaxsteer.prompts.generate import encode_prompts, generate, stream
from tests.helpers.checkpoints import family_config, random_model
from tests.helpers.tiny import tiny_model

MODEL = tiny_model("organism")
QUESTION = [{"role": "user", "content": "Do you agree or disagree?"}]
SETTINGS = dict(max_new_tokens=24, seed=4)


@pytest.fixture(scope="module")
def free() -> room.Generation:
    return generate(MODEL, QUESTION, **SETTINGS)


def test_what_counts_as_a_prompt() -> None:
    tokenizer = MODEL.tokenizer
    chat = encode_texts(tokenizer, [apply_template(tokenizer, QUESTION)])[0]
    plain = encode_texts(tokenizer, ["The river"])[0]
    cases = [(QUESTION, [chat]), ("The river", [plain]), (plain, [plain]), (plain.tolist(), [plain])]
    cases += [([QUESTION, "The river", plain.tolist()], [chat, plain, plain]), (np.stack([plain] * 2), [plain] * 2)]
    for prompts, expected in cases:
        found = [row.ids for row in encode_prompts(MODEL, prompts)]
        assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    assert chat[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")  # the answer's turn


def test_results_are_in_the_order_of_the_prompts(free: room.Generation) -> None:
    many = generate(MODEL, [QUESTION, "The river runs past the old town, past the mill, and on", QUESTION], **SETTINGS)
    assert many.texts[0] == free.texts[0] and many.tokens.shape[0] == len(many.finish) == 3
    assert many.texts[2] != many.texts[0]  # its own random numbers
    assert many.prompt_length[0] == many.prompt_length[2] == free.prompt_length[0] != many.prompt_length[1]
    np.testing.assert_array_equal(many.tokens[0][: free.lengths[0]], free.tokens[0][: free.lengths[0]])


def test_texts_end_before_stop_strings_whatever_the_piece(
    free: room.Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = free.texts[0]
    stop = text[len(text) // 2 :][:3]
    results = []
    for chunk in (1, 5, 16):
        monkeypatch.setattr(room, "_CHUNK", chunk)
        results.append(generate(MODEL, QUESTION, stop=[stop, "never this"], **SETTINGS))
    for result in results:
        assert result.texts == (text[: text.index(stop)],) and result.finish == ("stop",)
        np.testing.assert_array_equal(result.tokens, results[0].tokens)
    n = results[0].lengths[0]
    decode = MODEL.tokenizer.decode
    assert stop in decode(free.tokens[0][:n]) and stop not in decode(free.tokens[0][: n - 1])


def test_stop_tokens_come_from_everywhere_and_are_not_text(free: room.Generation) -> None:
    token = int(free.tokens[0, 5])
    first = int(np.argmax(free.tokens[0] == token))
    by_hand = generate(MODEL, QUESTION, stop=[token], **SETTINGS)
    by_checkpoint = generate(dataclasses.replace(MODEL, stop_tokens=(token,)), QUESTION, **SETTINGS)
    for result in (by_hand, by_checkpoint):
        assert result.lengths[0] == first + 1 and result.tokens[0, first] == token and result.finish == ("stop",)
        assert result.texts[0] == MODEL.tokenizer.decode(free.tokens[0][:first], skip_special_tokens=True)


def test_rows_beyond_the_tokenizer_are_never_drawn() -> None:
    assert MODEL.config.vocab_size > len(MODEL.tokenizer)
    tokens = generate(MODEL, "a", samples=16, temperature=50.0, max_new_tokens=24).tokens
    assert 400 < tokens.max() < len(MODEL.tokenizer)


def test_pieces_join_to_the_whole_text(free: room.Generation) -> None:
    pieces = list(stream(MODEL, QUESTION, **SETTINGS))
    assert "".join(pieces) == free.texts[0] and len(pieces) > 3
    stop = free.texts[0][len(free.texts[0]) // 2 :][:4]
    assert "".join(stream(MODEL, QUESTION, stop=[stop], **SETTINGS)) == free.texts[0].split(stop)[0]


def test_bad_prompts_are_refused_with_advice() -> None:
    bare = random_model(family_config("llama"))
    cases = [
        (MODEL, [], "No prompt was given"),
        (MODEL, [{"role": "wizard", "content": "a"}], "unknown role 'wizard'. Expected system, user, assistant"),
        (MODEL, [{"role": "user"}], "needs the keys 'role' and 'content'"),
        (MODEL, np.asarray([0.5, 1.5]), "neither a text, nor a list of messages, nor a list of token ids"),
        (MODEL, [[1] * MODEL.config.max_positions], "positions end at"),
        (bare, "a", "came without tokenizer.json"),
    ]
    for model, prompts, message in cases:
        with pytest.raises(jaxsteer.UserError, match=message):
            generate(model, prompts)
    with pytest.raises(jaxsteer.UserError, match=r"Write \['end'\]"):
        generate(MODEL, "a", stop="end")
    with pytest.raises(jaxsteer.UserError, match="continues one prompt, got 2"):
        stream(MODEL, np.zeros((2, 3), np.int32))
    with pytest.raises(jaxsteer.UserError, match="positions end at"):
        stream(MODEL, "a " * 300)  # at once, not with the first piece


def test_token_ids_need_no_tokenizer() -> None:
    made = generate(random_model(family_config("llama")), [5, 6, 7], max_new_tokens=4)
    assert made.tokens.shape == (1, 4) and made.texts == ("",) and made.finish == ("length",)
