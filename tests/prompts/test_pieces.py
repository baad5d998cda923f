"""Text that is given out bit by bit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsteer
from jaxsteer.prompts.pieces import Text

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


def test_half_characters_and_beginnings_of_stop_strings_are_held_back() -> None:
    for said, certain, stops in (
        ("caf\u00e9".encode()[:4], "caf", ()),
        (b"so it en", "so it ", ("end", "never")),
        (b"plain", "plain", ("end",)),
    ):
        assert Text(decode, stops).add(list(said)) == certain
