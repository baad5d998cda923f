"""A conversation that goes on: its turns, its seeds, and answers that nobody waits for."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer import UserError, steer
from jaxsteer.engine.chat import Chat
from jaxsteer.models.sampling import Decoding
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
    with pytest.raises(UserError, match="may have 256"):
        chat.reply("word " * 400)
    assert chat.turns == said


def test_an_answer_that_is_closed_is_kept_as_far_as_it_came() -> None:
    chat = Chat(MODEL, decoding=Decoding(max_new_tokens=20))
    pieces = chat.reply("Hello there")
    assert not chat.turns
    first = next(pieces)
    pieces.close()
    assert chat.turns[1] == {"role": "assistant", "content": first.strip()}


def test_what_was_read_is_not_read_again() -> None:
    chat = Chat(MODEL, system="Be brief. " * 12, decoding=Decoding(max_new_tokens=4, temperature=0))
    for text in ("Hello there", "And you?"):
        "".join(chat.reply(text))
    assert chat._engine is not None and chat._engine.status.cached_tokens >= 64


def test_edits_that_the_engine_does_not_serve_act_all_the_same() -> None:
    site, width = "blocks.1.attn.hook_z", MODEL.config.n_heads * MODEL.config.d_head
    vector = np.random.default_rng(0).standard_normal(width).reshape(MODEL.config.n_heads, -1)
    for edits in (steer.add(site, vector, 4.0), steer.add("blocks.1.hook_resid_post", np.ones(MODEL.config.d_model))):
        chat = Chat(MODEL, decoding=Decoding(max_new_tokens=8, temperature=0), edits=edits)
        said = "".join(chat.reply("Hello there"))
        turns = [{"role": "user", "content": "Hello there"}]
        assert said == "".join(stream(MODEL, turns, max_new_tokens=8, temperature=0, edits=edits)).lstrip()
        assert (chat._engine is None) == (edits.kind == "attn.hook_z")
