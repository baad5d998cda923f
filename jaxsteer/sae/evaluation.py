"""How well an SAE stands in for what it reconstructs: variance, sparsity, dead latents, and the model's own loss.

    fvu        sum |y - y^|^2 / sum |y - mean y|^2
    recovered  (CE ablated - CE patched) / (CE ablated - CE)

with CE the model's cross-entropy, CE patched the one with y^ in place of y, CE ablated with the mean of y in its place.
All are over the same activations: not padding, not the first of a row, not of a BOS, no outliers (``harvest.usable``);
only these are replaced, and cross-entropy is that of the tokens after them. ``recovered`` is 1 for a perfect
reconstruction and 0 for one that is worth no more than the mean; below 0 it does harm.

Letters: B rows, T time, D width, O width of what is reconstructed, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import forward
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.run import capture
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import Site, parse_site
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE, decode, encode
from jaxsteer.sae.harvest import rows_of, usable
from jaxsteer.sae.loading import check_sae
from jaxsteer.sae.texts import Documents, Sample

LOGITS = 1 << 26
"""Logits of one pass held at once, in floats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an SAE does on some text."""

    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of active latents."""
    dead: float
    """Share of latents that fired nowhere in the text."""
    cross_entropy: float
    """Of the model as it is, nats per token."""
    cross_entropy_patched: float
    """With the reconstruction in place."""
    cross_entropy_ablated: float
    """With the mean in place."""
    recovered: float
    """Share of the cross-entropy lost by mean-ablation that the reconstruction keeps."""
    tokens: int
    """Activations that all of this is over."""
    outliers: int
    """Activations left out for their norm."""


@struct.dataclass
class Patch(Intervention):
    """An intervention: at one site the SAE's reconstruction, or a fixed vector, instead of the activation."""

    sae: SAE
    mean: Float[Array, " O"]
    keep: Bool[Array, "B T"]
    """Where."""
    ablate: Bool[Array, ""]
    """Whether the fixed vector is written."""
    source: Site = struct.field(pytree_node=False)
    target: Site = struct.field(pytree_node=False)
    """The sites that are encoded and replaced, of one layer (they differ in transcoders)."""

    @property
    def kinds(self) -> frozenset[str]:
        """Those of the two sites."""
        return frozenset({self.source.kind, self.target.kind})

    def tap(self, where: Where) -> Tap:
        """The tap: what the source held in this layer is remembered until the target comes by."""
        held: dict[str, Array] = {}

        def replace(value: Array) -> Array:
            found = lax.cond(
                self.ablate,
                lambda: jnp.broadcast_to(self.mean, (*self.keep.shape, self.sae.d_out)),
                lambda: decode(self.sae, encode(self.sae, held["x"]), x=held["x"]),
            )
            keep = self.keep.reshape(*self.keep.shape, *(1,) * (value.ndim - 2))
            return jnp.where(keep, found.reshape(value.shape).astype(value.dtype), value)

        def tap(kind: str, layer: Int[Array, ""] | int, value: Array) -> Array:
            if kind == self.source.kind:
                held["x"] = value.reshape(*self.keep.shape, -1)
            if kind != self.target.kind:
                return value
            return lax.cond(layer == self.target.layer, replace, lambda value: value, value)

        return Tap(self.kinds, tap)


def evaluate_sae(
    sae: SAE,
    model: Model,
    documents: Documents,
    *,
    sample: Sample = Sample(),
    site: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate any SAE or transcoder on a sample of its model's activations.

    ``site`` is where it is read instead of at its own site. Fewer rows of the sample are run at once where their logits
    would be large. ``progress`` gets the number of tokens done, in the first pass of two. The dead
    share depends on how much text there is: a latent that fires once in a million tokens is not dead.

    Raises ``UserError`` for an SAE that does not fit, and for a transcoder that writes into another layer.
    """
    check_sae(sae, model, site)
    source = parse_site(site or sae.config.site_in or "", model.config.n_layers)
    target = source if site else parse_site(sae.config.site_out or source.name, model.config.n_layers)
    if source.layer != target.layer:
        raise UserError(f"The SAE reads {source.name} and writes {target.name}: patching needs both in one layer.")
    length = min(sample.context, model.config.max_positions)
    shards = 1 if model.mesh is None else model.mesh.shape["prompts"]
    fitting = max(1, LOGITS // (length * model.config.vocab_size))
    rows = max(shards, min(sample.rows, fitting) // shards * shards)
    texts, bos = rows_of(model, documents, rows=rows, context=length)
    batches: list[tuple[np.ndarray, np.ndarray]] = []
    keeps: list[np.ndarray] = []
    sums = _Sums(sae)
    while sums.tokens < sample.tokens:
        ids, mask, _ = texts.next()
        found = capture(model, ids, list({source.name, target.name}), mask)
        x, y = (found[place.name].reshape(*ids.shape, -1) for place in (source, target))
        keep = usable(y, jnp.asarray(ids), jnp.asarray(mask), bos)
        before = sums.tokens
        sums.add(_statistics(sae, x, y, keep), ids, mask, bos)
        if sums.tokens == before and len(batches) > 64:
            raise UserError(f"{len(batches)} batches of text hold no usable activation at {source.name}.")
        batches.append((ids, mask))
        keeps.append(to_host(keep))
        if progress is not None:
            progress(sums.tokens)
    patch = partial(Patch, sae=sae, mean=jnp.asarray(sums.mean, jnp.float32), source=source, target=target)
    entropies = np.zeros(3)
    for (ids, mask), keep in zip(batches, keeps, strict=True):
        where = shard_rows(model.mesh, keep)
        inputs = (shard_rows(model.mesh, ids), shard_rows(model.mesh, mask), where)
        found = _entropies(model.params, model.config, *inputs, patch(keep=where, ablate=jnp.asarray(False)))
        entropies += to_host(found).astype(np.float64)
    counted = sum(int((keep[:, :-1] & mask[:, 1:]).sum()) for (_, mask), keep in zip(batches, keeps, strict=True))
    plain, patched, ablated = (float(v) for v in entropies / max(counted, 1))
    return Evaluation(
        fvu=sums.fvu,
        l0=sums.active / sums.tokens,
        dead=float(np.mean(sums.fired == 0)),
        cross_entropy=plain,
        cross_entropy_patched=patched,
        cross_entropy_ablated=ablated,
        recovered=(ablated - patched) / (ablated - plain) if ablated != plain else float("nan"),
        tokens=sums.tokens,
        outliers=sums.outliers,
    )


class _Sums:
    """Sums over batches in float64, around the mean of the first batch, so that nothing large cancels."""

    def __init__(self, sae: SAE) -> None:
        self.tokens = self.outliers = 0
        self.active = 0.0
        self.fired = np.zeros(sae.n_latents, np.int64)
        self._sum, self._squares, self._error = np.zeros(sae.d_out), 0.0, 0.0
        self._centre: np.ndarray | None = None

    def add(self, found: dict[str, Any], ids: np.ndarray, mask: np.ndarray, bos: int) -> None:
        """Add what ``_statistics`` found of a batch."""
        found = {name: value.astype(np.float64) for name, value in to_host(found).items()}
        count = int(found["count"])
        if count == 0:
            return
        mean = found["sum"] / count
        if self._centre is None:
            self._centre = mean
        # Squares come around the batch's own mean.
        self._squares += float(found["squares"] + count * np.sum((mean - self._centre) ** 2))
        self._sum += found["sum"] - count * self._centre
        self._error += float(found["error"])
        self.tokens += count
        self.active += float(found["active"])
        self.fired += found["fired"].astype(np.int64)
        candidates = mask & (np.cumsum(mask, 1) > 1) & (ids != bos)
        self.outliers += int(candidates.sum()) - count

    @property
    def mean(self) -> np.ndarray:
        """Mean activation of the target."""
        assert self._centre is not None
        return self._centre + self._sum / self.tokens

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return self._error / (self._squares - float(np.sum(self._sum**2)) / self.tokens)


@jax.jit
def _statistics(
    sae: SAE, x: Float[Array, "B T D"], y: Float[Array, "B T O"], keep: Bool[Array, "B T"]
) -> dict[str, Array]:
    f = encode(sae, x)
    on = (f != 0) & keep[..., None]
    error = jnp.where(keep[..., None], y - decode(sae, f, x=x), 0.0)
    count = keep.sum()
    total = jnp.sum(jnp.where(keep[..., None], y, 0.0), (0, 1))
    apart = jnp.where(keep[..., None], y - total / jnp.maximum(count, 1), 0.0)
    return {
        "count": count,
        "sum": total,
        "squares": jnp.sum(apart**2),
        "error": jnp.sum(error**2),
        "active": jnp.sum(on),
        "fired": jnp.sum(on, (0, 1)),
    }


@partial(jax.jit, static_argnames="config")
def _entropies(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    keep: Bool[Array, "B T"],
    patch: Patch,
) -> Float[Array, " 3"]:
    """Summed cross-entropy of the model as it is, with the reconstruction and with the mean."""
    counted = keep[:, :-1] & mask[:, 1:]

    def entropy(edits: Patch | None) -> Array:
        log_probs = jax.nn.log_softmax(forward(params, config, tokens, mask, edits)[:, :-1])
        taken = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counted, taken, 0.0))

    edited = lax.map(lambda ablate: entropy(dataclasses.replace(patch, ablate=ablate)), jnp.array([False, True]))
    return jnp.concatenate([entropy(None)[None], edited])
