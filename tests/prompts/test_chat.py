"""A conversation that goes on: its turns, its seeds, and answers that nobody waits for."""

from __future__ import annotations

import pytest

from jaxsteer import UserError
from jaxsteer.models.sampling import Decoding
from jaxsteer.prompts.chat import Chat
from jaxsteer.prompts.generate import stream
from tests.helpers.tiny import tiny_model

MODEL = tiny_model("organism")


def test_replies_are_those_of_the_whole_conversation() -> None:
    chat = Chat(MODEL, system="Be brief.", decoding=Decoding(max_new_tokens=8, seed=5))
    said: list[dict[str, str]] = []
    for number, text in enumerate(("Hello there", "And you?")):
        said.append({"role": "user", "content": text})
        turns = [{"role": "system", "content": "Be brief."}, *said]
        expected = "".join(stream(MODEL, turns, max_new_tokens=8, seed=5 + number)).strip()
        assert "".join(chat.reply(text)).strip() == expected
        said.append({"role": "assistant", "content": expected})
        assert chat.turns == said
    with pytest.raises(UserError, match="positions end at 256"):
        chat.reply("word " * 400)
    assert chat.turns == said


def test_an_answer_that_is_closed_is_kept_as_far_as_it_came() -> None:
    chat = Chat(MODEL, decoding=Decoding(max_new_tokens=20))
    pieces = chat.reply("Hello there")
    assert not chat.turns
    first = next(pieces)
    pieces.close()
    assert chat.turns[1] == {"role": "assistant", "content": first.strip()}
