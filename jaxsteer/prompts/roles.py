"""``encode_turns``: a conversation in token space, with the role and the turn of every token, for any chat template.

Nothing is asked of the template. Three steps find whose each token is:

1. Each content in turn is replaced by a marker, and the conversation rendered again. What stands around the marker
   stands around the content too, and what is between is what the template made of it: trimmed, escaped, shortened.
2. The rest is the template's. What it writes after a message when the conversation ends there belongs to that turn,
   and what follows to the next one.
3. A token takes the role of the first character of a content that it stands for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from jaxsteer.errors import UserError
from jaxsteer.models.roles import ROLES, TEMPLATE, Rendered, role_number
from jaxsteer.prompts.conversation import MARKER
from jaxsteer.prompts.templates import Message, apply_template

Render = Callable[[Sequence[Message], bool], str]
"""(turns, with a generation prompt?) -> text."""


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool = True
) -> Rendered:
    """The turns as ids, the same as of ``encode_texts`` on ``apply_template``, and whose each token is.

    With ``generation_prompt`` the assistant is to answer, which is one more turn. A token that begins in the template
    and ends in a content (a line break before and one in it) is the content's; a special token is whose it begins in.
    Raises ``UserError`` for turns that the template refuses, for roles other than system, user and assistant, and where
    the template rewrites a content so that it cannot be told from the rest.
    """

    def render(turns: Sequence[Message], generation_prompt: bool) -> str:
        return apply_template(tokenizer, turns, generation_prompt=generation_prompt)

    turns = [dict(message) for message in messages]
    numbers = [role_number(message["role"]) for message in turns]
    if TEMPLATE in numbers:
        raise UserError(f"a message is of the role {', '.join(ROLES[1:-1])} or {ROLES[-1]}, not of the template")
    text = render(turns, generation_prompt)
    spans = sorted(
        (start, stop, i) for i in range(len(turns)) for start, stop in _spans(render, turns, i, text, generation_prompt)
    )
    if any(stop > start for (_, stop, _), (start, _, _) in zip(spans, spans[1:])):
        raise UserError("the chat template writes the contents of two messages into each other")
    # Per character, and at the end for what stands for no character.
    role, turn = np.full(len(text) + 1, TEMPLATE, np.int8), np.zeros(len(text) + 1, np.int32)
    for start, stop, i in spans:
        role[start:stop], turn[start:stop] = numbers[i], i
    ends = [(0, -1), *((stop, i) for _, stop, i in spans)]
    starts = [*((start, i) for start, _, i in spans), (len(text), len(turns) - (not generation_prompt))]
    for (end, before), (start, after) in zip(ends, starts, strict=True):
        closing = _closing(render, turns, before, text) if before >= 0 else ""
        split = end + len(closing) if text[end:start].startswith(closing) else end
        turn[end:split], turn[split:start] = before, after
    turn[-1] = turn[0]
    ids, at = _first_characters(tokenizer, text, role[:-1] != TEMPLATE)
    return Rendered(text=text, ids=ids, role=role[at], turn=turn[at], turns=len(turns) + generation_prompt)


def _marker(turns: Sequence[Message], text: str) -> str:
    """Letters that stand nowhere in the contents nor in the text."""
    marker = MARKER
    while any(marker in said for said in (text, *(message["content"] for message in turns))):
        marker += MARKER[::-1]
    return marker


def _spans(
    render: Render, turns: Sequence[Message], i: int, text: str, generation_prompt: bool
) -> list[tuple[int, int]]:
    """Where in ``text`` the content of message i stands: once, or nowhere, or as often as the template writes it."""
    marker, content = _marker(turns, text), turns[i]["content"]
    around = render([*turns[:i], {**turns[i], "content": marker}, *turns[i + 1 :]], generation_prompt).split(marker)
    times, length = len(around) - 1, len(text) - sum(map(len, around))
    if times == 0 and length == 0 and around[0] == text:
        return []
    if times and length >= 0 and length % times == 0:
        start, length = len(around[0]), length // times
        if text[start : start + length].join(around) == text:
            starts = np.cumsum([start, *(len(piece) + length for piece in around[1:-1])])
            return [(int(start), int(start) + length) for start in starts]
    if not content.strip():
        return []  # the template says something else where there is no content
    if times == 1:  # its surroundings depend on it: take the part that no other content makes, if it stands in it
        start = len(os.path.commonprefix([text, around[0]]))
        behind = len(os.path.commonprefix([text[start:][::-1], around[1][::-1]]))
        if 0 < len(part := text[start : len(text) - behind]) and part in content:
            return [(start, start + len(part))]
    raise UserError(
        f"the chat template rewrites message {i} ({turns[i]['role']}), so that the roles of tokens cannot be told: "
        f"{content[:80]!r}"
    )


def _closing(render: Render, turns: Sequence[Message], i: int, text: str) -> str:
    """What the template writes after message i when the conversation ends there; "" where it refuses that."""
    marker = _marker(turns, text)
    try:
        return render([*turns[:i], {**turns[i], "content": marker}], False).rpartition(marker)[2]
    except UserError:
        return ""


def _first_characters(
    tokenizer: PreTrainedTokenizerBase, text: str, content: Bool[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Ids, and for each the character whose role it takes: its first in a ``content``, else its first; N for none."""
    if not tokenizer.is_fast:
        raise UserError("this tokenizer cannot tell where its tokens stand in a text, as those of tokenizer.json do")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, offsets = np.asarray(found["input_ids"], np.int32), np.asarray(found["offset_mapping"], int).reshape(-1, 2)
    # Whitespace that the tokenizer counts to no token belongs to the one that follows.
    stop = offsets[:, 1]
    start = np.minimum(offsets[:, 0], np.append(0, stop)[:-1])
    inside = _next(content)[start]
    at = np.where(inside < stop, inside, start)
    # A special token may have taken in whitespace that stands beside it.
    solid = _next(np.asarray([not character.isspace() for character in text], bool))[start]
    special = np.isin(ids, list(tokenizer.added_tokens_decoder)) & (solid < stop)
    at = np.where(special, solid, at)
    return ids, at


def _next(flags: Bool[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """For every place from 0 to N the first at or after it that is True, or N."""
    places = np.append(np.where(flags, np.arange(len(flags)), len(flags)), len(flags))
    return np.minimum.accumulate(places[::-1])[::-1]
