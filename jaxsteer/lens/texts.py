"""Texts and conversations as rows of tokens of which it is known whose they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.roles import Rendered, unlabelled
from jaxsteer.prompts import encode_texts, encode_turns

Text = str | Sequence[Mapping[str, str]] | Int[np.ndarray, " _"]
"""A plain text, the messages of a conversation, or token ids."""


def rows_of_texts(model: Model, texts: Sequence[Text]) -> list[Rendered]:
    """Texts as the model reads them; a conversation that ends with the user is one that the assistant is to answer.

    Raises ``UserError`` without a tokenizer, without texts, for a text without tokens and for one that is longer than
    the model's positions, by its number from 1.
    """
    if isinstance(texts, str) or not len(texts):
        raise UserError(f"texts must be a list of one or more texts or conversations, got {texts!r:.80}")
    if model.tokenizer is None and not all(isinstance(text, np.ndarray) for text in texts):
        raise UserError(f"{model.name} came without a tokenizer.json, and texts cannot be read without one")
    rows = []
    for number, text in enumerate(texts, 1):
        if isinstance(text, np.ndarray):
            if text.ndim != 1 or text.dtype.kind not in "iu" or ((text < 0) | (text >= model.config.vocab_size)).any():
                raise UserError(
                    f"text {number} must be token ids from 0 to {model.config.vocab_size - 1}, got {text!r:.80}"
                )
            row = unlabelled(text)
        elif isinstance(text, str):
            row = unlabelled(encode_texts(model.tokenizer, [text])[0])
        else:
            answered = bool(text) and text[-1]["role"] == "assistant"
            row = encode_turns(model.tokenizer, [dict(turn) for turn in text], generation_prompt=not answered)
        if not 0 < len(row.ids) <= model.config.max_positions:
            raise UserError(
                f"text {number} has {len(row.ids)} tokens: {model.name} reads 1 to {model.config.max_positions}"
            )
        rows.append(row)
    return rows


def known_tokens(model: Model) -> int:
    """Tokens that texts can have: those of the tokenizer, without padding of the table of embeddings."""
    size = model.config.vocab_size
    return size if model.tokenizer is None else min(len(model.tokenizer), size)


def row_mask(tokens: Int[np.ndarray, "B T"], rows: Sequence[np.ndarray]) -> Bool[np.ndarray, "B T"]:
    """Which of a batch's tokens are those of ``rows``, its first rows, padded on the right."""
    mask = np.zeros(tokens.shape, bool)
    for at, row in enumerate(rows):
        mask[at, : len(row)] = True
    return mask


def first_token(model: Model, text: str) -> int:
    """The first token of a text that goes on another, as it stands: " Paris" has its space.

    Raises ``UserError`` for a text without tokens.
    """
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{text!r} has no token whose logit could be read")
    return int(ids[0])
