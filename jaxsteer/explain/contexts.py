"""Contexts of latents: pieces of text, the words in them, and how strongly every latent fires there.

What a latent's contexts look like is kept for all latents at once: for every context the largest value of each latent,
and the token at which it has it. Contexts are windows of the rows of text that the model reads.

Letters: B rows, T tokens, n contexts, C latents, V words, w tokens of a context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.explain.options import WIDTH
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.models.sharding import require_host_memory
from jaxsteer.models.sites import parse_site
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE, encode
from jaxsteer.sae.exploration import nearest
from jaxsteer.sae.harvest import rows_of, usable
from jaxsteer.sae.loading import check_sae
from jaxsteer.sae.texts import Documents

_CHUNK = 1024
_SHORT = 64
"""Batches of texts that are too short, after which there will be no others."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Contexts:
    """Pieces of text with all latents' values."""

    tokens: Int[np.ndarray, "n w"]
    values: Float[np.ndarray, "n C"]
    """The largest value of every latent in each context; 0 where it is silent."""
    places: Int[np.ndarray, "n C"]
    """The place of that value."""

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, chosen: np.ndarray) -> Contexts:
        """Some of them."""
        return Contexts(tokens=self.tokens[chosen], values=self.values[chosen], places=self.places[chosen])

    def words(self, vocabulary: Vocabulary) -> Bool[np.ndarray, "n V"]:
        """Which words occur in each context: all tokens of a word, one after the other."""
        found = np.zeros((len(self), len(vocabulary)), bool)
        by_first: dict[int, list[int]] = {}
        for number, ids in enumerate(vocabulary.tokens):
            by_first.setdefault(ids[0], []).append(number)
        for row, ids in enumerate(self.tokens.tolist()):
            for at, token in enumerate(ids):
                for number in by_first.get(token, ()):
                    wanted = vocabulary.tokens[number]
                    if ids[at : at + len(wanted)] == list(wanted):
                        found[row, number] = True
        return found


def read_contexts(
    model: Model,
    sae: SAE,
    documents: Documents,
    *,
    count: int = 2000,
    width: int = WIDTH,
    rows: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Contexts:
    """``count`` pieces of ``width`` tokens, cut from texts one after the other, and all latents in them.

    What is shorter is left out: in a longer context more words occur and more latents fire, so that any words would
    seem to tell. Values at the beginning of a text, at its BOS and at outliers do not count, as in training.

    Raises ``UserError`` for an SAE that does not fit the model, for texts that are all shorter than ``width``, and for
    contexts that need more memory than there is.
    """
    check_sae(sae, model)
    site = parse_site(sae.config.site_in or "", model.config.n_layers)
    require_host_memory(
        f"{count:,} contexts of {sae.n_latents:,} latents", 6 * count * sae.n_latents, "choose fewer contexts."
    )
    texts, bos = rows_of(model, documents, rows=rows, context=width)
    tokens, values, places, seen, short = [], [], [], 0, 0
    while seen < count:
        ids, mask, _ = texts.next()
        whole = mask.all(1)
        short = 0 if whole.any() else short + 1
        if short > _SHORT:
            raise UserError(f"{short * rows:,} texts in a row are shorter than {width} tokens: choose a smaller width")
        if not whole.any():
            continue
        x = capture(model, ids, [site.name], mask)[site.name].reshape(*ids.shape, -1)
        keep = usable(x, jnp.asarray(ids), jnp.asarray(mask), bos)
        largest, at = to_host(_largest(sae, x, keep))
        tokens.append(ids[whole].astype(np.int32))
        values.append(largest[whole])
        places.append(at[whole].astype(np.int16))
        seen += int(whole.sum())
        if progress is not None:
            progress(min(seen, count))
    return Contexts(
        tokens=np.concatenate(tokens)[:count],
        values=np.concatenate(values)[:count],
        places=np.concatenate(places)[:count],
    )


@jax.jit
def _largest(
    sae: SAE, x: Float[Array, "B T D"], keep: Bool[Array, "B T"]
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    codes = jnp.where(keep[..., None], encode(sae, x), 0.0)
    return codes.max(1), codes.argmax(1)


def neighbours(sae: SAE, count: int = 10) -> Int[np.ndarray, "C count"]:
    """The latents whose decoder rows have the largest cosine with each latent's, the nearest first."""
    if not 1 <= count < sae.n_latents:
        raise UserError(f"a latent of this SAE has 1 to {sae.n_latents - 1} neighbours, got {count}")
    parts = [range(at, min(at + _CHUNK, sae.n_latents)) for at in range(0, sae.n_latents, _CHUNK)]
    return np.concatenate([nearest(sae, part, count)[1] for part in parts])
