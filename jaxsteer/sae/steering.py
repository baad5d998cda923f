"""Steering by latents: raise, floor or erase what some latents of an SAE say, and leave all else in the stream.

With z_c the value of latent c at a token and d_c its decoder row, the stream x becomes

    amplify      x + sum over c of (amount - 1) z_c d_c                        erase: amount 0
    calibrate    x + sum over c of max(amount - z_c, 0) d_c
    released     x' |x| / |x'|,  x' = x + amount sum over c of (g_c / sum of g) d_c,  g_c = max(amount - relu(p_c), 0)

(2502.15576; p_c is the pre-activation. The released form divides 0 by 0 where all g are 0; here x stays as it is.) Only
differences are added, so that what the SAE does not reconstruct is kept. Latents and amounts are data.

Letters: B rows, T tokens, D width, S latents, R rows of an array (B, or 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sites import KINDS, Site, parse_site
from jaxsteer.models.taps import Intervention, Layer, Tap, Where
from jaxsteer.objectives.terms import check_choice
from jaxsteer.ranges import a_number, must_be
from jaxsteer.sae.dictionary import SAE, encode, preactivations
from jaxsteer.steer.edits import common_rows, known
from jaxsteer.steer.gates import Gated, Reads, gated
from jaxsteer.steer.selectors import Positions, Selector, select

Operation = Literal["amplify", "calibrate", "released"]
RELEASED = 2.5
"""The amount of the released variant."""


@struct.dataclass
class LatentEdit(Intervention):
    """One operation on some latents of an SAE. Made by ``steer_latents``."""

    sae: SAE
    latents: Int[Array | np.ndarray, " S"]
    amount: Float[Array | np.ndarray, " R"]
    selector: Selector
    operation: str = struct.field(pytree_node=False)
    site: Site = struct.field(pytree_node=False)

    @property
    def kinds(self) -> frozenset[str]:
        """The kind of the SAE's site."""
        return frozenset({self.site.kind})

    @property
    def rows(self) -> int | None:
        """Rows of the batch that the amounts are made for; None if they serve any number."""
        return common_rows([len(self.amount), *(leaf.shape[0] for leaf in jax.tree.leaves(self.selector))])

    @property
    def neutral(self) -> bool:
        """Amplification by 1."""
        amount = known(self.amount)
        return self.operation == "amplify" and amount is not None and bool((amount == 1).all())

    @property
    def label(self) -> str:
        """Operation, amount and how many latents, at which site."""
        amount = known(self.amount)
        shown = "?" if amount is None else ", ".join(f"{a:g}" for a in np.unique(amount)[:4])
        return f"{self.operation} of {len(self.latents)} latents to {shown} at {self.site.name}"

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Refuse a model of another width or with fewer layers, and another number of rows, with a ``UserError``."""
        width = KINDS[self.site.kind].width(config)
        if width != self.sae.d_in:
            raise UserError(
                f"The SAE reads activations of width {self.sae.d_in}, and {self.site.name} has width {width} in this "
                "model: it belongs to another model or site."
            )
        if self.site.layer is not None and self.site.layer >= config.n_layers:
            raise UserError(
                f"{self.site.name} is none of this model's sites: it has blocks 0 to {config.n_layers - 1}."
            )
        if rows is not None and self.rows not in (None, rows):
            raise UserError(f"The edit of latents is made for {self.rows} rows, but the batch has {rows}.")

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """The tokens that are steered."""
        return jax.tree.map(jnp.asarray, self.selector).touched(where)

    def tap(self, where: Where) -> Tap:
        """The tap for these tokens."""
        touched = self.touched(where)
        latents, amount = jnp.asarray(self.latents), jnp.asarray(self.amount)[:, None, None]
        rows = jnp.asarray(self.sae.W_dec)[latents].astype(jnp.float32)

        def change(kind: str, layer: Layer, value: Array) -> Array:
            flat = value.reshape(*value.shape[:2], -1).astype(jnp.float32)
            new = self._changed(flat, rows, latents, amount).reshape(value.shape)
            here = touched & (jnp.asarray(layer) == self.site.layer)
            return jnp.where(here.reshape(*here.shape, *[1] * (value.ndim - 2)), new, value).astype(value.dtype)

        return Tap(self.kinds, change)

    def _changed(
        self, x: Float[Array, "B T D"], rows: Float[Array, "S D"], latents: Array, amount: Array
    ) -> Float[Array, "B T D"]:
        def written(weights: Float[Array, "B T S"]) -> Float[Array, "B T D"]:
            return jnp.matmul(weights, rows, precision=lax.Precision.HIGHEST)

        if self.operation == "amplify":
            return x + written((amount - 1) * encode(self.sae, x, latents))
        if self.operation == "calibrate":
            return x + written(jnp.maximum(amount - encode(self.sae, x, latents), 0.0))
        gap = jnp.maximum(amount - jax.nn.relu(preactivations(self.sae, x, latents)), 0.0)
        total = gap.sum(-1, keepdims=True)
        moved = x + amount * written(gap / jnp.where(total > 0, total, 1.0))
        size = jnp.linalg.norm(x, axis=-1, keepdims=True) / jnp.maximum(
            jnp.linalg.norm(moved, axis=-1, keepdims=True), 1e-30
        )
        return jnp.where(total > 0, moved * size, x)


def steer_latents(
    sae: SAE,
    latents: Sequence[int] | Int[np.ndarray, " S"],
    operation: str = "amplify",
    amount: float = RELEASED,
    *,
    site: str | None = None,
    positions: Positions = "all",
) -> LatentEdit:
    """An edit that steers ``latents`` of ``sae`` at the SAE's site, at ``positions``, in every forward pass.

    ``amount`` is a factor in "amplify" (0 erases, 1 changes nothing), and a value in the SAE's own units in the others.
    It goes wherever edits go: ``run``, ``generate``, evaluation, circuits; behind a gate by ``latent_gate``.

    Raises ``UserError`` for latents that there are not, or twice; for an SAE that normalises rows, or reads one site
    and writes another; and for an amount that is not finite.
    """
    must_be(sae, SAE, "steer_latents' SAE")
    check_choice("operation", operation, get_args(Operation))
    strength = a_number(amount, "amount")
    if not np.isfinite(strength):
        raise UserError(f"the amount must be a finite number, got {amount}")
    chosen = check_latents(sae, latents)
    config = sae.config
    name = site or config.site_in
    if name is None:
        raise UserError("This SAE does not say which site it belongs to. Give site=, e.g. 'blocks.2.hook_resid_post'.")
    if config.input_norm != "none" or config.site_out not in (None, config.site_in) or sae.d_in != sae.d_out:
        raise UserError(
            "latents are steered where an SAE reads and writes the same values: this one normalises its rows, or "
            "writes another site"
        )
    if operation == "released" and config.activation == "matching_pursuit":
        raise UserError("the released variant needs pre-activations, which matching pursuit does not have: calibrate")
    return LatentEdit(
        sae=sae,
        latents=chosen,
        amount=np.asarray([strength], np.float32),
        selector=select(positions),
        operation=operation,
        site=parse_site(name),
    )


@struct.dataclass
class _Active:
    """Whether the mean of those latents that are active is at least a threshold."""

    sae: SAE
    latents: Int[Array | np.ndarray, " S"]
    threshold: Float[Array | np.ndarray, ""]

    def __call__(self, reads: Reads) -> Bool[Array, " B"]:
        (x,) = reads.values()
        z = encode(self.sae, x, jnp.asarray(self.latents))
        count = (z > 0).sum(-1)
        return (count > 0) & (jnp.maximum(z, 0).sum(-1) / jnp.maximum(count, 1) >= self.threshold)


def latent_gate(
    edits: Intervention,
    sae: SAE,
    latents: Sequence[int] | Int[np.ndarray, " S"],
    threshold: float,
    *,
    positions: Positions = "last",
) -> Gated:
    """``edits`` in rows whose prompt activates condition latents: where the mean of those that are active, on the mean
    stream over ``positions`` of the prompt (by default its last token), is at least ``threshold``.

    Raises ``UserError`` as ``steer_latents`` and ``steer.gated``.
    """
    must_be(sae, SAE, "latent_gate's SAE")
    if sae.config.site_in is None:
        raise UserError("This SAE does not say which site it reads: load it with site=")
    bound = np.asarray(a_number(threshold, "threshold"), np.float32)
    condition: Any = _Active(sae, check_latents(sae, latents), bound)
    return gated(edits, condition, sites=[sae.config.site_in], positions=positions)


def check_latents(sae: SAE, latents: Sequence[int] | Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """The latents as an array. Raises ``UserError`` for none, for some that there are not, and for one given twice."""
    chosen = np.asarray(latents)
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
        raise UserError(f"latents are a list of numbers of latents, got {latents!r:.60}")
    if chosen.min() < 0 or chosen.max() >= sae.n_latents:
        raise UserError(f"latents {chosen.tolist()[:8]}: this SAE has the latents 0 to {sae.n_latents - 1}")
    if len(np.unique(chosen)) < len(chosen):
        raise UserError("a latent is given twice")
    return chosen.astype(np.int32)
