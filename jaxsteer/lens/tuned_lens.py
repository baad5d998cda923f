"""Tuned lenses (arXiv 2303.08112): an affine translator of every layer's stream, before the model's own unembedding.

    h_l + h_l A_l + b_l  ->  final norm  ->  unembedding

The translator of index l is for the stream before block l, as in the released files: 0 is the embedding, and the stream
after the last block needs none. Files are those of AlignmentResearch/tuned-lens.

Letters: l translators (the model's layers), S places, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import place as placed
from jaxsteer.models.sharding import put
from jaxsteer.processes import to_host

if TYPE_CHECKING:
    from jaxsteer.lens.logit_lens import Place

log = logging.getLogger(__name__)

BEFORE = ("hook_embed", "hook_resid_pre", "hook_resid_post")
"""Sites that a translator is for: the stream before a block."""
SPEC = P(None, None, "model")
"""How "model" splits the matrices."""


@struct.dataclass
class Translators:
    """Affine maps, float32, of layers or of places; of one of them, without the first axis."""

    matrix: Float[Array | np.ndarray, "l D D"]
    """A of ``h A``: from the stream (rows) to what is added to it (columns)."""
    bias: Float[Array | np.ndarray, "l D"]


def translated(x: Float[Array, "... D"], own: Translators | None) -> Float[Array, "... D"]:
    """``x + x A + b`` in float32, in x's dtype again; x itself without a translator."""
    if own is None:
        return x
    wide = x.astype(jnp.float32)
    change = jnp.matmul(wide, own.matrix, precision=lax.Precision.HIGHEST) + own.bias
    return (wide + change).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TunedLens:
    """The translators of one model."""

    translators: Translators
    name: str = "untrained"
    """What it is called in results: the directory that it came from."""
    model: str = ""
    fingerprint: str = ""
    """Of the model's weights; "" in files of other tools."""
    unembed_hash: str = ""
    """``unembed_hash`` of the model."""

    @property
    def n_layers(self) -> int:
        """Translators."""
        return len(self.translators.bias)

    def check(self, model: Model) -> None:
        """Raise ``UserError`` for a lens of other sizes, other weights or another unembedding."""
        config = model.config
        sizes = self.translators.matrix.shape
        if sizes != (config.n_layers, config.d_model, config.d_model):
            raise UserError(
                f"the lens {self.name} has {sizes[0]} translators of width {sizes[1]}; {model.name} has "
                f"{config.n_layers} layers of width {config.d_model}: it belongs to another model "
                f"({self.model or 'unknown'})"
            )
        if why := self._other(model):
            raise UserError(f"{why}. If it is meant for it all the same, load it with any_weights (--any-weights)")

    def _other(self, model: Model) -> str:
        """In what way this is a lens of other weights, or ""."""
        known, own = (self.fingerprint, model.fingerprint)
        if known:
            return (
                ""
                if known == own
                else (
                    f"the lens {self.name} was trained on {self.model} (weights {known[:12]}), not on the weights of "
                    f"{model.name} ({own[:12]})"
                )
            )
        if self.unembed_hash and self.unembed_hash != (own := unembed_hash(model)):
            return (
                f"the lens {self.name} was made for another unembedding ({self.unembed_hash[:12]}) than that of "
                f"{model.name} ({own[:12]}): another model, another revision or another tokenizer"
            )
        return ""

    def of(self, model: Model, *, any_weights: bool = False) -> TunedLens:
        """The lens as one of ``model``. Raises ``UserError`` as ``check``; with ``any_weights`` other weights of the
        same sizes are a logged warning."""
        if any_weights and (why := self._other(model)):
            log.warning("%s: it may mean nothing here", why)
        known = dataclasses.replace(self, fingerprint=model.fingerprint) if any_weights else self
        known.check(model)
        return known

    def along(self, model: Model, places: Sequence[Place]) -> Translators:
        """The translators of the output (nothing changed) and then of places, [S + 1, ...].

        Raises ``UserError`` for a lens that does not fit the model and for places that it has no translator of.
        """
        self.check(model)
        numbers = [-1, *(self._number(place) for place in places)]
        wide = jax.tree.map(lambda a: jnp.concatenate([jnp.asarray(a), jnp.zeros_like(a[:1])]), self.translators)
        return jax.tree.map(lambda a: a[np.asarray(numbers)], wide)

    def _number(self, place: Place) -> int:
        """The index of a place's translator; -1 for the output, which has none."""
        if place.head is None and place.site.kind in BEFORE:
            layer = place.site.layer + (place.site.kind == "hook_resid_post")
            return layer if layer < self.n_layers else -1
        raise UserError(
            f"the tuned lens has no translator for {place.name}: it reads the stream before a block, which is "
            f"{', '.join(BEFORE)}. Use the logit lens there"
        )


def untrained(model: Model) -> TunedLens:
    """The lens of step 0, which is the logit lens: nothing is changed. Laid out on the model's mesh."""
    width, layers = model.config.d_model, model.config.n_layers
    matrix = jnp.zeros((layers, width, width), jnp.float32)
    return TunedLens(
        translators=Translators(
            matrix=put(matrix, placed(model.mesh, SPEC, matrix.shape)), bias=jnp.zeros((layers, width), jnp.float32)
        ),
        model=model.name,
        fingerprint=model.fingerprint,
        unembed_hash=unembed_hash(model),
    )


def unembed_hash(model: Model) -> str:
    """The hash by which AlignmentResearch/tuned-lens knows a model: SHA-256 of how NumPy prints the unembedding [V, D]
    to one decimal, its corners alone where it is large. It tells models apart, not revisions."""
    params: Any = model.params
    table = params.embed if params.unembed is None else params.unembed.T
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False):
        text = np.array_str(np.asarray(to_host(table.astype(jnp.float32))), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()
