"""Facts as rows of tokens: where their subjects end and their answers begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.prompts import bos_id, encode_texts
from jaxsteer.prompts.conversation import common_prefix, join_answer
from jaxsteer.prompts.generate import generate
from jaxsteer.rewrite.facts import SLOT, Fact

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""With what the model's own prefixes begin (kmeng01/rome)."""
LENGTHS = (5, 10)
"""Tokens that the model writes of a prefix."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A text with its places in token space."""

    ids: Int[np.ndarray, " T"]
    """All of the text, the answer included."""
    subject: int
    """Position of the subject's last token; 0 where there is no subject."""
    answer: int
    """Position of the answer's first token; the length of ``ids`` where there is none."""


def answer_row(model: Model, prompt: str, answer: str, *, subject_end: int | None = None) -> Row:
    """``prompt`` and ``answer`` (one space between them) as one row; the subject ends at this letter of the prompt.

    Raises ``UserError`` for an answer without tokens of its own, and for a row longer than the model's positions.
    """
    whole = join_answer(prompt, answer)
    ids, head = encode_texts(model.tokenizer, [whole, prompt])
    start = common_prefix([ids, head])
    if answer and start >= len(ids):
        raise UserError(f"the answer {answer!r} adds no token to {prompt!r}")
    if start < 1:
        raise UserError(f"{prompt!r} has no token of its own in front of the answer {answer!r}")
    if len(ids) > model.config.max_positions:
        raise UserError(
            f"{whole[:60]!r} ... has {len(ids)} tokens; this model's positions end at {model.config.max_positions}"
        )
    at = 0 if subject_end is None else _token_at(model, whole, subject_end)
    if at >= start:
        raise UserError(f"the subject of {whole!r} shares its last token with the answer: write the prompt otherwise")
    return Row(ids=ids, subject=at, answer=start)


def fact_row(model: Model, fact: Fact, answer: str = "", *, prefix: str = "") -> Row:
    """A fact's prompt behind a prefix, with an answer."""
    before, behind = fact.prompt.split(SLOT)
    start = f"{prefix}{before}{fact.subject}"
    return answer_row(model, start + behind, answer, subject_end=len(start))


def essence_row(model: Model, fact: Fact) -> Row:
    """ "{subject} is a": what the subject is apart from the fact."""
    return answer_row(model, f"{fact.subject} is a", "", subject_end=len(fact.subject))


def _token_at(model: Model, text: str, end: int) -> int:
    """Position of the token that holds the letter before ``end``, in the row of ``encode_texts``."""
    found = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    bos = bos_id(model.tokenizer)
    shift = int(bos is not None and found["input_ids"][:1] != [bos])
    starts = [start for start, _ in found["offset_mapping"]]
    return max(i for i, start in enumerate(starts) if start < end) + shift


def model_prefixes(model: Model, *, count: int = 20, seed: int = 0) -> tuple[str, ...]:
    """``count`` beginnings that the model writes, half of 5 and half of 10 tokens, and before them the empty one.

    Keys are averaged over them, so that a rewritten fact does not hang on standing at the start of a text. The same
    seed gives the same prefixes.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without a tokenizer.json, and facts cannot be read without one.")
    made = [""]
    for number, length in enumerate(LENGTHS):
        wanted = count // 2 if number == 0 else count - count // 2
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(wanted)]
        if openings:
            said = generate(model, openings, max_new_tokens=length, temperature=1.0, seed=2 * seed + number).texts
            made += [_prefix(opening, text) for opening, text in zip(openings, said, strict=True)]
    return tuple(made)


def _prefix(opening: str, text: str) -> str:
    return " ".join(f"{opening}{text}".split()).rstrip(". ") + ". "


def pad(rows: Sequence[np.ndarray], count: int, width: int) -> Int[np.ndarray, "B T"]:
    """``count`` rows of ``width`` tokens, padded with 0 on the right and below."""
    made = np.zeros((count, width), np.int32)
    for number, row in enumerate(rows):
        made[number, : len(row)] = row
    return made


def row_arrays(
    rows: Sequence[Row], *, from_subject: bool = False
) -> tuple[Int[np.ndarray, "B A"], Int[np.ndarray, "B A"], Float[np.ndarray, "B A"]]:
    """For every row where its answer's tokens are predicted, these tokens, and weights that sum to 1 over them.

    Places count from the start of the row, or with ``from_subject`` from the subject's last token.
    """
    width = bucket(max(len(row.ids) - row.answer for row in rows), 2)
    reads, labels = np.zeros((2, len(rows), width), np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    for number, row in enumerate(rows):
        count = len(row.ids) - row.answer
        labels[number, :count] = row.ids[row.answer :]
        reads[number] = row.answer - 1 + np.minimum(np.arange(width), max(0, count - 1)) - from_subject * row.subject
        weights[number, :count] = 1 / max(1, count)
    return reads, labels, weights
