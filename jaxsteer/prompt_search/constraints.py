"""What a searched prompt must not be, beyond its token mask: a repetition of itself or of others, a banned text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from jaxsteer.prompts import PAD, Slots, prompt_text, retokenises_many

Valid = Callable[[Int[np.ndarray, "n S"]], Bool[np.ndarray, " n"]]


def repetition(ids: Int[Array, "M S"]) -> Float[Array, " M"]:
    """FLRT's penalty (arXiv 2407.17447): ``sum_v max(count_v - 1, 0) ** 1.5 / n`` over the tokens v of each prompt, n
    in number."""
    real = ids != PAD
    same = (ids[:, :, None] == ids[:, None, :]) & real[:, :, None]
    count = same.sum(-1)
    first = real & ~jnp.any(jnp.tril(same, -1), axis=-1)  # every distinct token is counted where it stands first
    return jnp.sum(jnp.where(first, jnp.maximum(count - 1.0, 0.0) ** 1.5, 0.0), axis=-1) / real.sum(-1)


def repeats(ids: Int[Array, "M S"], known: Int[Array, "P S"] | None = None) -> Bool[Array, " M"]:
    """Which prompts are in ``known`` already or are the same as an earlier one of ``ids``."""
    earlier = jnp.tril(jnp.ones((len(ids), len(ids)), bool), -1)
    found = jnp.any(jnp.all(ids[:, None] == ids[None], axis=-1) & earlier, axis=1)
    if known is not None:
        found = found | jnp.any(jnp.all(ids[:, None] == known[None], axis=-1), axis=1)
    return found


def text_filter(tokenizer: PreTrainedTokenizerBase, slots: Slots, banned: Sequence[str] = ()) -> Valid:
    """The check that ``run_search`` makes between its calls: prompts (n, S) whose text gives the same ids back in every
    context, and holds none of the ``banned`` texts, in any case, however they are spelt in tokens."""
    unwanted = [text.casefold() for text in banned if text]

    def valid(ids: Int[np.ndarray, "n S"]) -> Bool[np.ndarray, " n"]:
        good = retokenises_many(tokenizer, slots, ids)
        for row in np.flatnonzero(good) if unwanted else ():
            text = prompt_text(tokenizer, ids[row]).casefold()
            good[row] = not any(part in text for part in unwanted)
        return good

    return valid
