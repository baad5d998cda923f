"""Text that is given out bit by bit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsteer
from jaxsteer.engine.prefix import Prefixes, piece_keys
from jaxsteer.engine.requests import Text

BYTES = [bytes([b]) for b in range(256)]


def decode(ids: list[int]) -> str:
    """Ids are bytes, as in byte-level tokenizers at their worst."""
    return b"".join(BYTES[i] for i in ids).decode("utf-8", errors="replace")


@given(
    st.text(max_size=30),
    st.lists(st.integers(1, 5), max_size=40),
    st.lists(st.text(min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_pieces_of_any_size_join_to_the_whole(text: str, sizes: list[int], stops: list[str]) -> None:
    ids, at, pieces = list(text.encode()), 0, []
    made = Text(decode, tuple(stops))
    for size in [*sizes, len(ids)]:
        if made.ended:
            break
        pieces.append(made.add(ids[at : at + size]))
        at += size
    pieces.append(made.rest())
    found = [text.index(stop) for stop in stops if stop in text]
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    if not found:
        assert "".join(pieces) == text
        return
    # The stop string that is complete first ends the text.
    first = min(zip(ends, found, strict=True))
    earliest = [start for end, start in zip(ends, found, strict=True) if end == first[0]]
    assert "".join(pieces) == text[: min(earliest)]


def test_a_real_tokenizer() -> None:
    tokenizer = jaxsteer.load("organism:llama").tokenizer
    text = "Do you agree? Naïve café 🙂👩‍👩‍👧 – yes."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    made = Text(lambda some: tokenizer.decode(some, clean_up_tokenization_spaces=False), ())
    pieces = [made.add([i]) for i in ids] + [made.rest()]
    assert "".join(pieces) == whole


def test_prefixes_keep_what_was_used_last() -> None:
    piece = (jnp.zeros(10), jnp.zeros(10))
    held = Prefixes(240)
    tokens = np.arange(10)
    keys = piece_keys(b"", tokens, None, 3)
    assert len(keys) == 3 == len(set(keys))
    assert piece_keys(b"", np.arange(7), None, 3) == keys[:2], "a key is of the beginning alone"
    assert piece_keys(b"other", tokens, None, 3)[0] != keys[0]
    touched = np.zeros((1, 10), bool)
    assert piece_keys(b"", tokens, touched, 3)[1:] != piece_keys(b"", tokens, touched | (tokens == 4), 3)[1:]
    for key in keys:
        held.keep(key, piece)
        held.find(keys[:1])
    held.keep(b"more", piece)
    assert len(held) == 3 and len(held.find(keys)) == 1, "the second piece went"
    assert held.bytes == 240
    held.clear()
    assert not held.bytes and not held.find(keys)
