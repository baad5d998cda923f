"""Tokens of texts, and texts of tokens, for those who look inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.prompts.conversation import encode_texts
from jaxsteer.prompts.tokens import decoded


class TextTokens(NamedTuple):
    """Rows of tokens: what ``jaxsteer.run``, ``capture`` and ``logits`` take as ``tokens`` and ``mask``."""

    tokens: Int[np.ndarray, "B T"]
    """int32; padding, on the right, is 0."""
    mask: Bool[np.ndarray, "B T"]
    """False on padding."""


def to_tokens(model: Model, texts: str | Sequence[str]) -> TextTokens:
    """Plain texts in token space, one row each, with BOS in front where the tokenizer puts it.

    Raises ``UserError`` for a model without a tokenizer, and for no text.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without tokenizer.json: give token ids, int32 [B, T]")
    rows = encode_texts(model.tokenizer, [texts] if isinstance(texts, str) else list(texts))
    if not rows:
        raise UserError("no text was given")
    lengths = np.asarray([len(row) for row in rows])
    mask = np.arange(max(lengths.max(), 1))[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return TextTokens(tokens, mask)


def to_str_tokens(model: Model, text: str | Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token alone, its leading space included: of a plain text, or of (T,) ids.

    Raises ``UserError`` as ``to_tokens``.
    """
    ids = to_tokens(model, text).tokens[0] if isinstance(text, str) else np.asarray(text)
    if ids.ndim != 1:
        raise UserError(f"to_str_tokens takes a text or the ids of one, got an array of shape {list(ids.shape)}")
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without tokenizer.json: nobody can say what its tokens mean")
    return decoded(model.tokenizer, ids)
