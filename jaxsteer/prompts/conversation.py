"""Texts with one searched slot: plain or chat, rendered with any tokenizer's own template.

One format serves directions, search and evaluation. The rules, all decided on text:

* A space before ``{prompt}`` belongs to the prompt's first token (" want"): it is added when the prompt brings none,
  never doubled, and goes away together with an empty prompt (zero-shot). A system message that an empty prompt
  leaves empty goes away too.
* An answer follows after exactly one space, or after none where the text already ends in whitespace, as the
  generation prompts of Llama, Qwen and Gemma do.
* BOS stands where transformers has it: in chat where the template writes it, in plain text where the tokenizer puts it,
  never twice.
* A template without system role gets the system text at the head of the first user turn.
* The same text on any day and any model: templates that print a date get a fixed one, templates that let the model
  think first are told not to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxsteer.errors import UserError
from jaxsteer.files import check_surrogates, json_records, read_text
from jaxsteer.prompts.templates import Message, apply_template

SLOT = "{prompt}"
"""Where the prompt stands in a conversation."""
SLOT_ALIAS = "{optim_str}"
"""Accepted for ``SLOT``: the marker of other tools."""
MARKER = "QXslotXQ"
"""Stands for the prompt while a template is taken apart: letters only, so that no template trims or escapes it."""

STYLES = ("chat", "plain")
SLOTS = ("suffix", "prefix", "system", "system-suffix")
Turns = tuple[tuple[str, str], ...]
"""Turns of a conversation as (role, text)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """How a question is asked and where the prompt stands. Raises ``UserError`` for names it does not know."""

    style: str = "chat"
    """"chat" goes through the tokenizer's chat template, "plain" is raw text."""
    slot: str = "suffix"
    """The prompt stands after the question ("suffix"), before it ("prefix"), as system message ("system"), or behind
    the system message that a conversation has ("system-suffix"; where it has none the prompt is the system message)."""

    def __post_init__(self) -> None:
        """Check the names."""
        if self.style not in STYLES:
            raise UserError(f"unknown style {self.style!r}: expected 'chat' or 'plain'")
        if self.slot not in SLOTS:
            raise UserError(f"unknown slot {self.slot!r}: expected {', '.join(SLOTS)}")
        if self.style == "plain" and self.slot.startswith("system"):
            raise UserError("plain text has no system message: use style 'chat', or slot 'prefix'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """One text with one searched slot. Raises ``UserError`` unless ``{prompt}`` stands in it exactly once.

    Exactly one of ``messages`` (chat turns; the generation prompt is added after them) and ``text`` is given.
    """

    messages: tuple[Message, ...] | None = None
    """Chat turns ``{"role": ..., "content": ...}``; one content holds ``{prompt}``."""
    text: str | None = None
    """Or a plain text that holds ``{prompt}``."""
    answer: str = ""
    """Fixed text after all turns, e.g. " (A)". Spacing is settled by ``join_answer``."""
    alternatives: tuple[str, ...] = ()
    """Instead of ``answer``: the answers to decide between, e.g. ("(A)", "(B)"). The input then ends at the last
    token that all of them share: the decision token, found in token space (" (" where " (A)" is three tokens, the
    last template token where the letters differ at once)."""

    @property
    def style(self) -> str:
        """ "chat" or "plain"."""
        return "plain" if self.messages is None else "chat"

    def __post_init__(self) -> None:
        """Check the slot and settle the marker's spelling."""
        if (self.messages is None) == (self.text is None):
            raise UserError("a conversation has either messages (chat) or text (plain): give exactly one of the two")
        if self.answer and self.alternatives:
            raise UserError("a conversation has either one answer or alternatives to decide between, not both")
        if self.messages is not None:
            settled = tuple({**m, "content": m["content"].replace(SLOT_ALIAS, SLOT)} for m in self.messages)
            object.__setattr__(self, "messages", settled)
            found = sum(m["content"].count(SLOT) for m in settled)
        else:
            object.__setattr__(self, "text", str(self.text).replace(SLOT_ALIAS, SLOT))
            found = str(self.text).count(SLOT)
        if found != 1:
            raise UserError(f"{SLOT} must stand exactly once in a conversation, but it was found {found} times")


def as_conversation(given: Any) -> Conversation:
    """A user's own text as a conversation: wherever ``{prompt}`` (or ``{optim_str}``) stands in it is the slot.

    ``given`` is a plain text, a list of chat messages ``{"role": ..., "content": ...}``, or a mapping that has one of
    the two as "text" or "messages" and, if wanted, "answer" or "alternatives". Raises ``UserError`` for anything else,
    and unless the slot stands in it exactly once.
    """
    if isinstance(given, Conversation):
        return given
    if isinstance(given, str):
        return Conversation(text=given)
    if not isinstance(given, Mapping | Sequence):
        raise UserError(f"a conversation is a text, a list of messages or a mapping, got {str(given)[:120]!r}")
    fields: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"messages": given}
    fields = {name: value for name, value in fields.items() if value is not None}
    if unknown := sorted(str(name) for name in fields.keys() - {"messages", "text", "answer", "alternatives"}):
        raise UserError(
            f"a conversation has messages or text, and answer or alternatives; unknown: {', '.join(unknown)}"
        )
    for name in ("text", "answer"):
        if not isinstance(fields.get(name, ""), str):
            raise UserError(f"{name} must be a text, got {str(fields[name])[:120]}")
    if "messages" in fields:
        fields["messages"] = tuple(map(_turn, _listed(fields["messages"], "messages")))
    if "alternatives" in fields:
        fields["alternatives"] = _listed(fields["alternatives"], "alternatives")
        if not all(isinstance(answer, str) for answer in fields["alternatives"]):
            raise UserError(f"alternatives must be a list of texts, got {str(fields['alternatives'])[:120]}")
    return Conversation(**fields)


def _listed(given: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError(f"{name} must be a list of one or more, got {str(given)[:120]!r}")
    return tuple(given)


def _turn(given: Any) -> Message:
    turn: dict[str, Any] = {}
    if isinstance(given, Mapping):
        turn = {name: given.get(name) for name in ("role", "content")}
    if not turn or not all(isinstance(text, str) for text in turn.values()):
        raise UserError(f'messages must be a list of {{"role": ..., "content": ...}}, got {str(given)[:120]}')
    return turn


def load_conversations(path: str | os.PathLike[str]) -> tuple[Conversation, ...]:
    """A user's conversations from a JSON list or from JSON lines, each as ``as_conversation`` takes it.

    A list of messages alone is one conversation. Raises ``UserError`` when the file is missing, is not JSON, holds
    nothing, or an entry cannot be used (by number).
    """
    entries = [entry for _, entry in json_records(read_text(path), path)]
    if any(isinstance(entry, dict) and "role" in entry for entry in entries):
        entries = [entries]
    if not entries:
        raise UserError(f"{path} holds no conversation")
    found = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(as_conversation(entry))
        except UserError as error:
            raise UserError(f"{path}, conversation {number}: {error}") from error
    return tuple(found)


def question_conversation(
    question: str | Turns,
    placement: Placement = Placement(),
    *,
    answer: str = "",
    alternatives: Sequence[str] = (),
) -> Conversation:
    """A conversation that asks ``question`` with the prompt where ``placement`` says.

    ``question`` is a text, or turns that end with the user's: a system message and earlier turns stand before it.
    Raises ``UserError`` for such turns in plain text, and for a second system message.
    """
    style, slot = placement.style, placement.slot
    *before, (_, asked) = (("user", question),) if isinstance(question, str) else question
    if any(mark in text for _, text in (*before, ("", asked)) for mark in (SLOT, SLOT_ALIAS)):
        raise UserError(f"the question itself holds {SLOT} or {SLOT_ALIAS}: {asked[:80]!r}")
    body = {"suffix": f"{asked} {SLOT}", "prefix": f"{SLOT} {asked}"}.get(slot, asked)
    if style == "plain":
        if before:
            raise UserError("plain text has no system message and no turns before the question: use style 'chat'")
        return Conversation(text=body, answer=answer, alternatives=tuple(alternatives))
    turns = [{"role": role, "content": text} for role, text in (*before, ("user", body))]
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    if system and slot == "system":
        raise UserError(
            "the slot 'system' is the system message, but a question has one of its own: use 'system-suffix' to put "
            "the prompt behind it"
        )
    if slot.startswith("system"):
        turns = with_system(turns[1:] if system else turns, f"{system} {SLOT}" if system else SLOT)
    return Conversation(messages=tuple(turns), answer=answer, alternatives=tuple(alternatives))


def with_system(turns: Sequence[Message], system: str) -> list[Message]:
    """The turns after a system message, if there is one."""
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def join_answer(text: str, answer: str) -> str:
    """``text`` and ``answer`` with one space between them, or none where ``text`` ends in whitespace."""
    answer = answer.strip()
    if not answer:
        return text
    return text + answer if text[-1:].isspace() or not text else f"{text} {answer}"


def _place(content: str, prompt: str) -> str:
    """``content`` with the prompt in its slot, by the space rule of this module."""
    head, tail = content.split(SLOT)
    owned = head.endswith(" ")
    if owned:
        head = head[:-1]
    if prompt:
        return head + (" " if owned and not prompt[0].isspace() else "") + prompt + tail
    if not tail.strip():
        return head.rstrip() + tail
    return head + tail if head else tail.lstrip()


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, prompt_text: str) -> str:
    """The full text with the prompt in its slot and the answer (never the alternatives) after it.

    ``prompt_text`` "" gives the zero-shot text. BOS is in the text where the template writes it.
    """
    if conversation.text is not None:
        return join_answer(_place(conversation.text, prompt_text), conversation.answer)
    assert conversation.messages is not None
    turns = []
    for message in conversation.messages:
        if SLOT in message["content"]:
            message = {**message, "content": _place(message["content"], prompt_text)}
            if message["role"] == "system" and not message["content"].strip():
                continue
        turns.append(message)
    return join_answer(apply_template(tokenizer, turns), conversation.answer)


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, prompt_text: str) -> np.ndarray:
    """int32 ids of the full text; with alternatives, up to the decision token: what the encodings with each of them
    have in common.

    With a single alternative, or several equal ones, nothing is decided: raises ``UserError``.
    """
    text, style = render(tokenizer, conversation, prompt_text), conversation.style
    if not conversation.alternatives:
        return encode_texts(tokenizer, [text], style=style)[0]
    rows = encode_texts(tokenizer, [join_answer(text, answer) for answer in conversation.alternatives], style=style)
    shared = common_prefix(rows)
    if len(rows) < 2 or any(shared == len(row) for row in rows):
        alternatives = list(conversation.alternatives)
        raise UserError(f"no token decides between the answers {alternatives}: give at least two that differ")
    return rows[0][:shared]


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """Number of leading ids that all rows share."""
    shortest = min(len(row) for row in rows)
    differs = np.zeros(shortest, bool)
    for row in rows[1:]:
        differs |= row[:shortest] != rows[0][:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, style: str | Sequence[str] = "plain"
) -> list[np.ndarray]:
    """int32 ids of texts, without EOS.

    ``style`` is that of all or of each. Texts of style "chat" come from a template, which writes BOS where there is to
    be one. Those of style "plain" get the BOS that the tokenizer puts in front, if it does, unless they begin with it.

    Text in the spelling of a special token becomes that token, as it would for anybody who sends the text.
    """
    if not texts:
        return []
    check_surrogates([*texts], "a text for the model")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # no warning when a caller forks later
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    styles = [style] * len(rows) if isinstance(style, str) else style
    bos = bos_id(tokenizer) if "plain" in styles else None
    if bos is not None:
        rows = [
            row if kind == "chat" or row[:1] == [bos] else [bos, *row] for row, kind in zip(rows, styles, strict=True)
        ]
    return [np.asarray(row, np.int32) for row in rows]


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts in front of a plain text, or ``None`` (Qwen 2.5, SmolLM2).

    A ``bos_token`` that it does not put there does not count: it may be one of the chat template's marks.
    """
    ids, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return int(ids[0]) if ids[1 : 1 + len(bare)] == bare else None
