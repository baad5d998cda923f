"""Slots in token space: what stands before and after the searched ids, and whether ids survive as text.

A slot is located by putting two different one-token prompts into the full text: their encodings agree up to the slot
and after it, and nowhere in between.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from jaxsteer.errors import UserError
from jaxsteer.prompts.conversation import MARKER, Conversation, common_prefix, encode, encode_texts, join_answer, render
from jaxsteer.prompts.tokens import decoded, printable

Ids = Sequence[SupportsIndex] | np.ndarray
PAD = -1
"""Stands for no token, at the start of prompt ids that are shorter than others beside them."""
READS = ("slot_last", "input_last")
SENTINELS = 12
"""Words tried as sentinels. Most tokenizers need two; more only where words merge with their surroundings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """One context as text: ``left + prompt + right + answer``, and what the format does to the prompt's edges."""

    left: str
    right: str
    answer: str
    """What follows the turns, one space after them where they end in none: the answer, or the first alternative."""
    first: Literal["space", "strip", "any"]
    """"space": the prompt starts with whitespace, added where missing. "strip": the template removes whitespace
    at its start. "any": the prompt stands as it is."""
    strip_end: bool

    def full(self, prompt: str) -> str:
        """The text with the prompt in place and the answer behind, as ``render`` gives it."""
        if self.strip_end:
            prompt = prompt.rstrip()
        if self.first == "strip":
            prompt = prompt.lstrip()
        elif self.first == "space" and not prompt[:1].isspace():
            prompt = " " + prompt
        return join_answer(self.left + prompt + self.right, self.answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The surroundings of an S-token prompt in C contexts. Ids outside of the slot are the same for every prompt."""

    before: list[np.ndarray]
    """Per context, int32 ids before the slot, BOS included where the model has one (may be empty)."""
    after: list[np.ndarray]
    """Per context, int32 ids to run after the slot: up to the last token read, hence empty for "slot_last"."""
    read_index: Int[np.ndarray, " C"]
    """Per context, the read position counted from the slot's first token."""
    closing: list[np.ndarray]
    """Per context, all int32 ids after the slot in the full text; ``after`` is a part of it."""
    conversations: tuple[Conversation, ...]
    length: int
    surroundings: tuple[Surroundings, ...]
    target: tuple[np.ndarray, ...] = ()
    """Per context, int32 ids of an answer after ``closing`` whose probability is asked for (``with_target``)."""
    checked: dict[tuple[int, ...], bool] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """Verdicts of ``retokenises`` by ids."""

    def __len__(self) -> int:
        """Number of contexts C."""
        return len(self.before)


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    """The text a user would paste for prompt ids (without ``PAD``), a leading space included (``render`` never doubles
    it)."""
    return str(tokenizer.decode([int(i) for i in ids if i != PAD], clean_up_tokenization_spaces=False))


def build_slots(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    length: int,
    *,
    read: str | Sequence[str] = "input_last",
    max_positions: int | None = None,
) -> Slots:
    """Locate the slot of every conversation in token space, for prompts of ``length`` tokens.

    ``read`` says, for all or for each, where an objective reads: "slot_last" (last searched token) or "input_last"
    (last token of the input: end of the answer, decision token, or generation prompt).
    Raises ``UserError`` when a slot cannot be located, or when a context with its prompt is longer than
    ``max_positions``.
    """
    if not conversations or length < 1:
        raise UserError(f"{len(conversations)} conversations, {length} prompt tokens: at least one of each is needed")
    reads = [read] * len(conversations) if isinstance(read, str) else list(read)
    if len(reads) != len(conversations) or not set(reads) <= set(READS):
        raise UserError(
            f"read must be 'slot_last' or 'input_last', once or per conversation ({len(conversations)}), got {read!r}"
        )
    located: list[tuple[Surroundings, np.ndarray, np.ndarray]] = []
    found: dict[tuple, tuple[Surroundings, np.ndarray, np.ndarray]] = {}  # copies that differ in their read: one search
    fillers = list(_words(tokenizer, spaced=True))
    for conversation in conversations:
        around = _surroundings(tokenizer, conversation)
        key = (around, conversation.alternatives)
        if key not in found:
            found[key] = _located(tokenizer, conversation, around, fillers, length)
        located.append(found[key])
    surroundings, before, closing = map(list, zip(*located, strict=True))
    slots = Slots(
        before=before,
        after=[c[:0] if r == "slot_last" else c for c, r in zip(closing, reads, strict=True)],
        read_index=np.asarray(
            [length - 1 + (0 if r == "slot_last" else len(c)) for c, r in zip(closing, reads, strict=True)], np.int32
        ),
        closing=closing,
        conversations=tuple(conversations),
        length=length,
        surroundings=tuple(surroundings),
    )
    if max_positions is not None:
        longest = max(len(b) + length + len(a) for b, a in zip(slots.before, slots.after, strict=True))
        if longest > max_positions:
            raise UserError(
                f"the longest context needs {longest} tokens with its {length}-token prompt, but the model has "
                f"{max_positions} positions: shorten the questions or the prompt"
            )
    return slots


def resized(slots: Slots, length: int) -> Slots:
    """The same surroundings for prompts of another length."""
    return dataclasses.replace(slots, length=length, read_index=slots.read_index + (length - slots.length))


def retokenises(tokenizer: PreTrainedTokenizerBase, slots: Slots, ids: Ids) -> bool:
    """Whether ids, read as text and placed in the full text of every context, encode to themselves in place."""
    return bool(retokenises_many(tokenizer, slots, np.asarray(ids, np.int32)[None])[0])


def retokenises_many(
    tokenizer: PreTrainedTokenizerBase, slots: Slots, ids: Int[np.ndarray, "M S"]
) -> Bool[np.ndarray, " M"]:
    """``retokenises`` for M prompts: all of them in the first context, then the survivors in the others.

    Prompts may begin with ``PAD``. Verdicts are kept with the slots, by ids.
    """
    rows = [tuple(int(i) for i in row if i != PAD) for row in np.asarray(ids)]
    alive = [row for row in dict.fromkeys(rows) if row not in slots.checked]
    texts = {row: prompt_text(tokenizer, row) for row in alive}
    for row in alive:
        slots.checked[row] = False
    order = _distinct_contexts(slots)
    for chunk in (order[:1], order[1:]):  # the first context alone weeds out most prompts
        pairs = [(row, c) for row in alive for c in chunk]
        full = [slots.surroundings[c].full(texts[row]) for row, c in pairs]
        encoded = encode_texts(tokenizer, full, style=[slots.conversations[c].style for _, c in pairs])
        failed = {row for (row, c), got in zip(pairs, encoded, strict=True) if not _in_place(slots, c, row, got)}
        alive = [row for row in alive if row not in failed]
    for row in alive:
        slots.checked[row] = True
    return np.asarray([slots.checked[row] for row in rows], bool)


def first_allowed(
    tokenizer: PreTrainedTokenizerBase, slots: Slots, allowed: Bool[np.ndarray, " V"]
) -> Bool[np.ndarray, " V"]:
    """The allowed tokens that can stand first in the slot: with a leading space where the text has one before the
    prompt, without where the template trims it. Others could never retokenise there."""
    kinds = {s.first for s in slots.surroundings} - {"any"}
    ids = np.flatnonzero(allowed)
    spaced = np.asarray([text[:1].isspace() for text in decoded(tokenizer, ids)], bool)
    mask = np.zeros_like(allowed)
    mask[ids] = np.all([spaced if kind == "space" else ~spaced for kind in kinds], axis=0) if kinds else True
    return mask


def with_first_tokens(
    tokenizer: PreTrainedTokenizerBase, slots: Slots, allowed: Bool[np.ndarray, " V"]
) -> Bool[np.ndarray, " V"]:
    """The allowed tokens; and where none of them can stand first, as all begin with a space and the text has none
    there, also those that are one of them without its space."""
    if first_allowed(tokenizer, slots, allowed).any() or "space" in {s.first for s in slots.surroundings}:
        return allowed
    texts = np.asarray(decoded(tokenizer, range(min(len(allowed), len(tokenizer)))))
    mask = allowed.copy()
    mask[: len(texts)] |= np.isin(texts, [text.lstrip() for text in texts[allowed[: len(texts)]]])
    return mask


def random_rows(
    rng: np.random.Generator,
    allowed: Bool[np.ndarray, " V"],
    n: int,
    length: int,
    first: Bool[np.ndarray, " V"] | None = None,
) -> Int[np.ndarray, "n {length}"]:
    """``n`` prompts of uniformly random allowed tokens; with ``first``, their first tokens are of those, if any are.

    Few of them may re-tokenise in a slot: filter them by ``retokenises_many``.
    """
    ids = rng.choice(np.flatnonzero(allowed), (n, length)).astype(np.int32)
    if first is not None and first.any():
        ids[:, 0] = rng.choice(np.flatnonzero(first), n)
    return ids


def _in_place(slots: Slots, c: int, row: tuple[int, ...], got: np.ndarray) -> bool:
    target = slots.target[c : c + 1]
    want = np.concatenate([slots.before[c], np.asarray(row, np.int32), slots.closing[c], *target])
    if slots.conversations[c].alternatives and not target:  # the text goes on after the decision token
        got = got[: len(want)]
    return np.array_equal(want, got)


def _distinct_contexts(slots: Slots) -> list[int]:
    """One index per distinct full text: copies that differ in their read position need one check."""
    seen: dict[object, int] = {}
    for c, (around, conversation) in enumerate(zip(slots.surroundings, slots.conversations, strict=True)):
        seen.setdefault((around, conversation.alternatives, len(slots.closing[c])), c)
    return list(seen.values())


def _surroundings(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Surroundings:
    answer = (conversation.alternatives or (conversation.answer,))[0]
    conversation = dataclasses.replace(conversation, answer="", alternatives=())
    text = render(tokenizer, conversation, MARKER)
    if text.count(MARKER) != 1:
        raise UserError(
            f"the chat template writes the prompt's message {text.count(MARKER)} times; a slot must stand exactly once"
        )
    left, right = text.split(MARKER)
    spaced = render(tokenizer, conversation, f" {MARKER}")
    strip_end = render(tokenizer, conversation, f"{MARKER} ") == text
    if spaced != text:
        first: Literal["space", "strip", "any"] = "any"
    elif left.endswith(" "):
        first, left = "space", left[:-1]
    else:
        first = "strip"
    return Surroundings(left=left, right=right, answer=answer, first=first, strip_end=strip_end)


def _words(tokenizer: PreTrainedTokenizerBase, *, spaced: bool) -> Iterator[int]:
    """Up to ``SENTINELS`` ids that are words (with a leading space or without), in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(tokenizer))
    order = order[~np.isin(order, [*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids])]
    found = 0
    spare: list[int] = []
    for chunk in np.array_split(order, max(1, len(order) // 512)):
        for i, text in zip(chunk, decoded(tokenizer, chunk), strict=True):
            body = text[1:] if spaced else text
            if text[:1].isspace() == spaced and len(body) > 2 and body.isascii() and body.isalpha():
                yield int(i)
                found += 1
                if found == SENTINELS:
                    return
            elif len(spare) < 4 * SENTINELS and printable(text) and text[:1].isspace() == spaced and text.strip():
                spare.append(int(i))
    yield from spare  # tiny vocabularies have few words


def _located(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    around: Surroundings,
    fillers: Sequence[int],
    length: int,
) -> tuple[Surroundings, np.ndarray, np.ndarray]:
    """The surroundings with the ids before and after the slot. Raises ``UserError`` where it cannot be located."""
    ids = None if around.first == "strip" else _locate(tokenizer, conversation, fillers, fillers, length)
    if ids is None and around.first != "space":
        # Also where the template leaves the space and the tokenizer's decoder does not: that of Llama 2.
        around = dataclasses.replace(around, first="strip")
        ids = _locate(tokenizer, conversation, list(_words(tokenizer, spaced=False)), fillers, length)
    if ids is None:
        where = str(conversation.text or conversation.messages)[-120:]
        raise UserError(
            f"the slot cannot be located in token space: {SENTINELS} one-token words were tried, and none stayed one "
            f"token in place. Put a space or a line break around {{prompt}}. The text ends: {where!r}"
        )
    return around, *ids


def _locate(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    words: Sequence[int],
    fillers: Sequence[int],
    length: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """(before, closing) ids around the slot, confirmed by a prompt of ``length`` tokens that comes back unchanged."""
    for a, b in itertools.combinations(words, 2):
        rows = [encode(tokenizer, conversation, prompt_text(tokenizer, [word])) for word in (a, b)]
        if len(rows[0]) != len(rows[1]):
            continue
        start = common_prefix(rows)
        if rows[0][start : start + 1].tolist() != [a] or rows[1][start : start + 1].tolist() != [b]:
            continue
        before, closing = rows[0][:start], rows[0][start + 1 :]
        if not np.array_equal(closing, rows[1][start + 1 :]):
            continue
        for word, filler in itertools.product((a, b), fillers[:2]):
            ids = np.asarray([word] + [filler] * (length - 1), np.int32)
            got = encode(tokenizer, conversation, prompt_text(tokenizer, ids))
            if np.array_equal(got, np.concatenate([before, ids, closing])):
                return before, closing
    return None
