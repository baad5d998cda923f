"""Objectives: pure functions from what was read to a score per row.

An objective is any callable ``objective(reads) -> score[rows]``, larger is better. It may be a plain function or a
pytree with ``__call__`` (``Projection``), whose arrays can then differ per problem. What it reads is found by tracing
it once: ``reads["blocks.14.hook_resid_post"]`` is the residual stream at the read position, ``reads.logits`` the
next-token logits there. Nothing above the deepest thing read is computed for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from checkpoints_convert.sae_form import ELEMENTWISE
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sites import parse_site
from jaxsteer.sae import SAE, encode, subset


class Reads:
    """What an objective sees of a batch of rows (one row: one candidate in one context), in float32.

    ``reads[site]`` is (rows, D): the residual stream at the read position. ``reads.logits`` is (rows, V): the logits
    of the token after the read position.
    """

    def __init__(self, residuals: Mapping[str, Float[Array, "rows D"]], logits: Float[Array, "rows V"] | None = None):
        self._residuals, self._logits = residuals, logits

    def __getitem__(self, site: str) -> Float[Array, "rows D"]:
        return self._residuals[site]

    @property
    def logits(self) -> Float[Array, "rows V"]:
        """Next-token logits at the read position."""
        assert self._logits is not None, "the objective did not read logits when it was traced"
        return self._logits


Objective = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective reads: sites by the number of blocks to run for each, and whether it reads logits."""

    sites: tuple[tuple[str, int], ...]
    logits: bool

    def depth(self, n_layers: int) -> int:
        """Blocks to run before everything that was asked for is known."""
        return n_layers if self.logits else max(stop for _, stop in self.sites)


def as_pytree(objective: Objective) -> Objective:
    """The objective as a pytree, which a plain function is not: its code is static then, and it has no arrays."""
    return jax.tree_util.Partial(objective) if jax.tree_util.all_leaves([objective]) else objective


class _Recorder(Reads):
    """Stands in for ``Reads`` while an objective is traced, and notes what it touches."""

    def __init__(self, config: ModelConfig, rows: int):
        self._config, self._rows = config, rows
        self.sites: dict[str, int] = {}
        self.reads_logits = False

    def __getitem__(self, site: str) -> Float[Array, "rows D"]:
        parsed = parse_site(site, self._config.n_layers)
        if parsed.place not in ("hook_resid_pre", "hook_resid_post"):
            raise UserError(
                f"an objective cannot read {site!r}: only the residual stream between blocks "
                f"(blocks.0 ... blocks.{self._config.n_layers - 1}, hook_resid_pre or hook_resid_post) and logits"
            )
        self.sites[site] = parsed.layer + (parsed.place == "hook_resid_post")
        return jnp.zeros((self._rows, self._config.d_model), jnp.float32)

    @property
    def logits(self) -> Float[Array, "rows V"]:
        self.reads_logits = True
        return jnp.zeros((self._rows, self._config.vocab_size), jnp.float32)


def needs(objective: Objective, config: ModelConfig) -> Needs:
    """Trace ``objective`` once and say what it reads.

    Raises ``UserError`` when it reads an unknown site, nothing at all, or does not return one float per row.
    """
    rows = 3
    recorder = _Recorder(config, rows)
    out = jax.eval_shape(lambda: objective(recorder))
    if not hasattr(out, "shape") or out.shape != (rows,) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise UserError(
            "an objective must return one float per row: for reads of shape (rows, D) it must return shape (rows,); "
            f"given {rows} rows it returned {out}"
        )
    if not recorder.sites and not recorder.reads_logits:
        raise UserError("the objective reads nothing: use reads['blocks.<l>.hook_resid_post'] or reads.logits")
    return Needs(sites=tuple(sorted(recorder.sites.items())), logits=recorder.reads_logits)


@struct.dataclass
class Projection:
    """RESGA's objective: ``<r[read], delta>`` at one site (arXiv 2601.02896), in stream units."""

    delta: Float[Array, " D"]
    site: str = struct.field(pytree_node=False)

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The projection of every row."""
        return jnp.sum(reads[self.site] * self.delta, axis=-1)


@struct.dataclass
class Latents:
    """SAEGA's objective: ``sum_i w_i f_i`` over latents of an SAE at one site (arXiv 2601.02896).

    A latent that is off has no gradient, so that token gradients see active latents only; scores are exact.
    """

    sae: SAE
    weights: Float[Array, " k"]
    indices: Int[Array, " k"] | None
    """Where latents compete for being active, those to read; ``None`` where ``sae`` holds them alone."""
    site: str = struct.field(pytree_node=False)

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The weighted sum of every row."""
        return jnp.sum(encode(self.sae, reads[self.site], self.indices) * self.weights, axis=-1)


def latents_objective(sae: SAE, indices: Int[np.ndarray, " k"], weights: Float[np.ndarray, " k"], site: str) -> Latents:
    """The weighted sum of these latents. No other latent is ever computed, unless latents compete (top-k)."""
    alone = sae.config.activation in ELEMENTWISE
    chosen = jnp.asarray(indices, jnp.int32)
    return Latents(
        sae=subset(sae, chosen) if alone else sae,
        weights=jnp.asarray(weights, jnp.float32),
        indices=None if alone else chosen,
        site=site,
    )


@struct.dataclass
class Standardised:
    """Any objective in units of its standard deviation over random prompts: ``(f - offset) / scale``.

    So a fluency weight (nats traded per standard deviation) means the same at every site and for every objective.
    """

    objective: Objective
    offset: Float[Array, ""]
    scale: Float[Array, ""]

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The wrapped objective's score of every row, shifted and scaled."""
        return (self.objective(reads) - self.offset) / self.scale
