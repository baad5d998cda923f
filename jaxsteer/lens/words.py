"""The words of vectors: tokens that a vector of the stream speaks for, whatever made it.

Letters: S vectors, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsteer.display import aligned, decimals, visible
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import direction_logits
from jaxsteer.processes import to_host
from jaxsteer.runs.result import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words(Result):
    """The tokens that a vector speaks for, the strongest first."""

    names: tuple[str, ...]
    """Of the vectors."""
    lens: tuple[tuple[str, ...], ...]
    """By the logit lens, without the norm's division."""
    lens_against: tuple[tuple[str, ...], ...]
    """Of the vector with its sign turned."""
    nearest: tuple[tuple[str, ...], ...]
    """By the cosine with the tokens' columns of the unembedding."""
    cosines: tuple[tuple[float, ...], ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every vector."""
        columns = zip(self.names, self.lens, self.lens_against, self.nearest, self.cosines, strict=True)
        return [
            {
                "vector": name,
                "for": " ".join(up),
                "against": " ".join(down),
                "nearest": " ".join(near),
                "cosine": cosine[0],
            }
            for name, up, down, near, cosine in columns
        ]

    def table(self) -> str:
        """A line for every vector."""
        lines = [
            [row["vector"], *(visible(row[key]) for key in ("for", "against", "nearest")), decimals(row["cosine"])]
            for row in self.to_rows()
        ]
        return aligned([["vector", "for", "against", "nearest", "cosine"], *lines], left=(0, 1, 2, 3))


def read_words(
    model: Model, vectors: Float[np.ndarray, "S D"], names: Sequence[str] | None = None, *, top: int = 8
) -> Words:
    """The tokens of ``vectors`` by logit lens (both signs) and by cosine to the unembedding.

    The lens multiplies by the final norm's weight and the unembedding; what is left out, the norm's division, changes
    no order. Raises ``UserError`` for vectors of another width.
    """
    given = np.asarray(vectors, np.float32)
    if given.ndim != 2 or given.shape[1] != model.config.d_model:
        raise UserError(f"vectors must be [S, {model.config.d_model}], got {list(given.shape)}")
    known = len(model.tokenizer)
    found = to_host(_words(model.params, model.config, jnp.asarray(given), known=known, top=min(top, known)))
    texts = [tuple(tuple(model.tokenizer.decode([int(i)]) for i in row) for row in ids) for ids in found[:3]]
    return Words(
        names=tuple(names or map(str, range(len(given)))),
        lens=texts[0],
        lens_against=texts[1],
        nearest=texts[2],
        cosines=tuple(tuple(row) for row in found[3].tolist()),
    )


@partial(jax.jit, static_argnames=("config", "known", "top"))
def _words(
    params: Params, config: ModelConfig, vectors: Float[Array, "S D"], *, known: int, top: int
) -> tuple[Array, Array, Array, Array]:
    table = (params.embed.T if params.unembed is None else params.unembed).astype(jnp.float32)[:, :known]
    logits = direction_logits(params, config, vectors)[:, :known]
    lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True) * jnp.linalg.norm(table, axis=0)
    products = jnp.matmul(vectors, table, precision=lax.Precision.HIGHEST)
    cosines, nearest = lax.top_k(products / jnp.maximum(lengths, 1e-20), top)
    return lax.top_k(logits, top)[1], lax.top_k(-logits, top)[1], nearest, cosines
