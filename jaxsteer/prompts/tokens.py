"""Which tokens a searched prompt may use, as a mask over the embedding table."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from jaxsteer.errors import UserError

RESERVED = re.compile(r"^[<\[]\W*(unused|reserved|extra_id|pad|mask|special)[\w\s-]*\W*[>\]]$", re.IGNORECASE)
"""Token strings that a vocabulary keeps for later use, whether or not the tokenizer lists them as special."""
ANSWER_LETTER = re.compile(r"[\W_]*[A-H][\W_]*")
"""A choice letter alone or in brackets: A, (A, B), (C)."""
ANSWER_WORDS = frozenset({"agree", "disagree"})


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[SupportsIndex] | np.ndarray) -> list[str]:
    """The text of each id alone, its leading space included."""
    texts = tokenizer.batch_decode([[int(i)] for i in ids], clean_up_tokenization_spaces=False)
    names = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    # SentencePiece decoders drop the space at the start of a text; the token's own name still shows it.
    return [
        f" {text}" if name and name.startswith("\u2581") and not text.startswith(" ") else text
        for text, name in zip(texts, names, strict=True)
    ]


def printable(text: str) -> bool:
    """Whether a text is non-empty, valid and free of control, format, private and unassigned characters."""
    return bool(text) and "\ufffd" not in text and not any(unicodedata.category(c)[0] == "C" for c in text)


def allowed_tokens(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    ascii_only: bool = False,
    word_initial: bool = False,
    ban_answer_tokens: bool = True,
    banned: Sequence[str] = (),
) -> Bool[np.ndarray, " V"]:
    """A mask (V,), V = ``vocab_size`` = height of the embedding table: True where a prompt may use the token.

    Never allowed: special and added tokens, reserved or unused ones, rows beyond the tokenizer (padding of the table),
    tokens that do not decode alone to valid text, control characters (newline among them).
    ``word_initial`` keeps tokens that are a space and letters; ``ban_answer_tokens`` removes A, (B, Agree, Disagree
    and their like, so that a prompt cannot simply name an answer; ``banned`` removes tokens that contain any of the
    given texts, in any case. A banned word may still be spelt by several tokens.
    Raises ``UserError`` when no token is left.
    """
    known = min(vocab_size, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(known)))
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    usable = [
        i for i, name in enumerate(names) if name is not None and i not in added and not RESERVED.match(str(name))
    ]
    banned = [text.casefold() for text in banned if text]

    def keep(text: str) -> bool:
        word = text.strip()
        return (
            printable(text)
            and (not ascii_only or text.isascii())
            and (not word_initial or (text[0] == " " and text[1:].isalpha()))
            and not (ban_answer_tokens and (ANSWER_LETTER.fullmatch(word) or word.casefold() in ANSWER_WORDS))
            and not any(text.casefold().find(part) >= 0 for part in banned)
        )

    mask = np.zeros(vocab_size, bool)
    mask[[i for i, text in zip(usable, decoded(tokenizer, usable), strict=True) if keep(text)]] = True
    if not mask.any():
        raise UserError(
            f"the token filter leaves none of the {known} tokens (ascii_only={ascii_only}, "
            f"word_initial={word_initial}, banned={list(banned)}): loosen it"
        )
    return mask


def listed_tokens(
    tokenizer: PreTrainedTokenizerBase, allowed: Bool[np.ndarray, " V"], texts: Sequence[str]
) -> Bool[np.ndarray, " V"]:
    """Of the ``allowed`` tokens those whose text is listed: a text that begins with a space as it is, any other with
    and without one before it.

    Raises ``UserError`` for a text that is no single token, and for one whose tokens are not allowed.
    """
    known = np.arange(min(len(allowed), len(tokenizer)))
    ids_of: dict[str, list[int]] = {}
    for i, text in zip(known, decoded(tokenizer, known), strict=True):
        ids_of.setdefault(text, []).append(int(i))
    mask = np.zeros_like(allowed)
    for text in texts:
        forms = [text] if text[:1].isspace() else [text, f" {text}"]
        ids = [i for form in forms for i in ids_of.get(form, [])]
        if not ids:
            spelt = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms[-1:]]
            parts = " + ".join(map(repr, decoded(tokenizer, spelt[0])))
            raise UserError(f"{text!r} is no single token of this tokenizer, which spells it {parts}: list such tokens")
        mask[[i for i in ids if allowed[i]]] = True
        if not mask[ids].any():
            raise UserError(
                f"{text!r} is a token that no prompt may use: a special token, an answer's letter or word, a control "
                "character, or it holds a banned text"
            )
    return mask
