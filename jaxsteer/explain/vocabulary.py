"""The words that latents are explained by, and their tokens.

Words stand in the order of their frequency. A tokenizer's own list holds much that is no word: pieces that only begin
one (" strugg"), and tokens that training hardly ever saw, whose rows of the unembedding mean nothing and win every
comparison. ``Vocabulary.of_model`` leaves both out and counts them.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsteer.display import short, visible
from jaxsteer.errors import UserError
from jaxsteer.explain.options import SIZE
from jaxsteer.files.records import Record
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_layers
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import embed, make_context, unembed
from jaxsteer.processes import to_host
from jaxsteer.prompts import bos_id

log = logging.getLogger(__name__)

COMMON = 250
"""The most frequent words, which explain nothing by themselves."""
SHORT = 4
"""A word of fewer letters is superficial too."""
CONTINUED = 0.5
"""A token behind which the model expects the rest of a word with at least this probability is a piece of one."""
ODD = 4.0
"""In spreads (1.4826 median absolute deviations) of the log norms of the list: a row beyond is undertrained or odd."""
_MARKERS = ("Ġ", "▁")
FRAMES = (".", "The", "and")
"""Openings behind which a token is tried: a whole word is one behind at least one of them."""
_WORD = re.compile(r"[^\W\d_]{2,}")
_ROWS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary(Record):
    """Words with their tokens, the most frequent first."""

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Of each word behind a space, as the tokenizer writes it."""
    source: str
    """Where the list comes from: "model", "given" or "text"."""
    fragments: int = 0
    """Tokens that were left out because a word goes on behind them."""
    odd: int = 0
    """Words that were left out because their row's norm is far from all others'."""
    repeated: int = 0
    """Words that were left out because they differ from an earlier one in the case of letters alone."""
    unspelt: int = 0
    """Words that were left out because the tokenizer cannot spell them: it would need its unknown token."""

    def __len__(self) -> int:
        return len(self.words)

    @property
    def superficial(self) -> np.ndarray:
        """Bool [V]: the most frequent ``COMMON`` words, and those shorter than ``SHORT`` letters (2502.15576)."""
        return (np.arange(len(self)) < COMMON) | np.asarray([len(word) < SHORT for word in self.words])

    def index(self, word: str) -> int:
        """The number of a word. Raises ``UserError`` for one that is not there."""
        wanted = word.strip().lower()
        for number, known in enumerate(self.words):
            if known.lower() == wanted:
                return number
        raise UserError(f"{visible(word)!r} is none of the {len(self):,} words of this vocabulary ({self.source})")

    @classmethod
    def of_words(cls, model: Model, words: Iterable[str]) -> Vocabulary:
        """A list of one's own, in its order.

        Words that the tokenizer cannot spell (it would need its unknown token) are left out, counted, and told of in a
        warning. Raises ``UserError`` for an empty list, and for one of which no word can be spelt.
        """
        return _kept(model, list(words), "given")

    @classmethod
    def of_text(cls, model: Model, texts: Iterable[str], *, size: int = SIZE) -> Vocabulary:
        """The ``size`` most frequent words of some texts (two letters or more, in lower case).

        Equally frequent words stand in alphabetic order. Raises ``UserError`` for texts without words.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(word.lower() for word in _WORD.findall(text))
        if not counts:
            raise UserError("the texts hold no words: a word is two letters or more")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return _kept(model, ranked[:size], "text")

    @classmethod
    def of_model(cls, model: Model, *, size: int = SIZE) -> Vocabulary:
        """The first ``size`` whole words among the tokenizer's tokens, whose order is that of their frequency in its
        own training text.

        A token counts if it begins a word, is made of letters, and the model does not expect the rest of a word behind
        it, behind one of ``FRAMES`` at least (a forward pass of three tokens each).

        Raises ``UserError`` for a tokenizer that does not mark where words begin.
        """
        tokenizer = _tokenizer(model)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        begins = [
            (i, p[1:])
            for i, p in enumerate(pieces)
            if p and p[0] in _MARKERS and _WORD.fullmatch(p[1:].replace(p[0], "0"))
        ]
        if not begins:
            raise UserError(
                f"the tokenizer of {model.name} does not mark where words begin: give a list of words, or texts"
            )
        inside = np.zeros(model.config.vocab_size, np.bool_)
        inside[[i for i, p in enumerate(pieces) if p and p[0] not in _MARKERS and p[0].isalpha()]] = True
        seen: dict[str, int] = {}
        fragments = repeated = 0
        for begin in range(0, len(begins), size):
            part = begins[begin : begin + size]
            share = _continued(model, np.asarray([i for i, _ in part], np.int32), inside)
            for (number, word), on in zip(part, share, strict=True):
                if on >= CONTINUED:
                    fragments += 1
                elif word.lower() in seen:
                    repeated += 1
                else:
                    seen[word.lower()] = number
            if len(seen) >= size + size // 10:  # some go yet for their norms
                break
        words = list(seen)
        return _without_odd(
            model, words, [(seen[word],) for word in words], size=size, fragments=fragments, repeated=repeated
        )


def word_vectors(model: Model, vocabulary: Vocabulary) -> Float[np.ndarray, "V D"]:
    """What the unembedding looks for in the stream for every word: the mean of its tokens' rows, float32."""
    longest = max(map(len, vocabulary.tokens))
    ids = np.asarray([[*row, *[0] * (longest - len(row))] for row in vocabulary.tokens], np.int32)
    lengths = np.asarray([len(row) for row in vocabulary.tokens], np.int32)
    return np.asarray(to_host(mean_rows(model.params, ids, lengths)))


@jax.jit
def mean_rows(params: Params, ids: Int[Array, "V n"], lengths: Int[Array, " V"]) -> Float[Array, "V D"]:
    """The mean of the unembedding's rows of each word's tokens, of which the first ``lengths`` count; float32."""
    table = params.embed if params.unembed is None else params.unembed.T
    inside = jnp.arange(ids.shape[1]) < lengths[:, None]
    return jnp.sum(table[ids].astype(jnp.float32) * inside[..., None], 1) / lengths[:, None]


def _continued(model: Model, tokens: Int[np.ndarray, " n"], inside: np.ndarray) -> Float[np.ndarray, " n"]:
    """The probability that a token that continues a word comes behind each of these: the smallest of all frames."""
    tokenizer = _tokenizer(model)
    bos = bos_id(tokenizer)
    found = np.ones(len(tokens), np.float32)
    for frame in FRAMES:
        before = [*([] if bos is None else [bos]), *tokenizer(frame, add_special_tokens=False)["input_ids"]]
        doubtful = np.flatnonzero(found >= CONTINUED)
        for begin in range(0, len(doubtful), _ROWS):
            part = doubtful[begin : begin + _ROWS]
            ids = np.pad(tokens[part], (0, _ROWS - len(part)), mode="edge")[:, None]
            rows = np.concatenate([np.tile(np.asarray(before, np.int32), (_ROWS, 1)), ids], 1)
            share = to_host(_share(model.params, model.config, rows, inside))[: len(part)]
            found[part] = np.minimum(found[part], share)
    return found


@partial(jax.jit, static_argnames="config")
def _share(params: Params, config: ModelConfig, rows: Int[Array, "B T"], inside: Array) -> Float[Array, " B"]:
    context = make_context(config, jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape), jnp.ones(rows.shape, bool))
    x = run_layers(params, config, embed(params, config, rows, context.positions), context, 0, config.n_layers)
    logits = unembed(params, config, x[:, -1:])[:, 0]
    return jax.nn.softmax(logits.astype(jnp.float32), -1) @ inside.astype(jnp.float32)


def _kept(model: Model, words: Sequence[str], source: str) -> Vocabulary:
    """These words with their tokens; what cannot be spelt is left out and counted."""
    tokenizer, kept, tokens, repeated, unspelt = _tokenizer(model), [], [], 0, []
    seen: set[str] = set()
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise UserError(f"{word!r} is no word: give texts such as 'pirate'")
        bare = word.strip()
        if bare.lower() in seen:
            repeated += 1
            continue
        ids = tokenizer(" " + bare, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.unk_token_id in ids:
            unspelt.append(bare)
            continue
        seen.add(bare.lower())
        kept.append(bare)
        tokens.append(tuple(map(int, ids)))
    some = ", ".join(repr(short(word)) for word in unspelt[:5])
    if not kept and unspelt:
        raise UserError(f"the tokenizer of {model.name} cannot spell any of the {len(unspelt)} words: {some}")
    if not kept:
        raise UserError("the list of words is empty")
    if unspelt:
        log.warning("the tokenizer cannot spell %d of the words, which are left out: %s", len(unspelt), some)
    return Vocabulary(words=tuple(kept), tokens=tuple(tokens), source=source, repeated=repeated, unspelt=len(unspelt))


def _without_odd(
    model: Model, words: Sequence[str], tokens: Sequence[tuple[int, ...]], *, size: int, fragments: int, repeated: int
) -> Vocabulary:
    """Without words whose rows have a norm far from the rest's."""
    whole = Vocabulary(words=tuple(words), tokens=tuple(tokens), source="model")
    norms = np.log(np.maximum(np.linalg.norm(word_vectors(model, whole), axis=1), 1e-20))
    spread = 1.4826 * np.median(np.abs(norms - np.median(norms)))
    ordinary = np.abs(norms - np.median(norms)) <= ODD * spread
    chosen = np.flatnonzero(ordinary)[:size]
    odd = int((~ordinary[: chosen[-1] + 1]).sum()) if len(chosen) else len(words)
    return dataclasses.replace(
        whole,
        words=tuple(words[i] for i in chosen),
        tokens=tuple(tokens[i] for i in chosen),
        odd=odd,
        fragments=fragments,
        repeated=repeated,
    )


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without a tokenizer.json, and words cannot be read without one.")
    return model.tokenizer
