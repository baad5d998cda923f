"""``SAE``: a sparse autoencoder (or transcoder) as a pytree, and its ``encode`` and ``decode``.

    x' = input_norm(x) * input_scale - [subtract_b_dec] * b_dec
    p  = x' @ W_enc + b_enc;    f = activation(p)
    y  = input_norm^-1((f @ W_dec + b_dec) / output_scale) + x @ W_skip

``load_sae`` gives the canonical form, with scale 1 and nothing subtracted. Pre-activations, comparisons with thresholds
and reconstructions are float32, whatever the dtype of weights and inputs.

Letters: D width of the input site, O of the output site, F latents, S latents asked for, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import ELEMENTWISE, SAEConfig
from jaxsteer.models.sharding import place

SPECS: dict[str, P] = {
    "W_enc": P(None, "model"),
    "W_dec": P("model", None),
    "b_enc": P("model"),
    "b_dec": P(None),
    "threshold": P("model"),
    "b_mag": P("model"),
    "mag_scale": P("model"),
    "W_skip": P(None, None),
}
"""Layout of the leaves on the mesh axis "model": latents are split, widths are not."""


@struct.dataclass
class SAE:
    """A dictionary of F latents for one site. Made by ``load_sae``; leaves that an architecture lacks are ``None``."""

    W_enc: Float[Array, "D F"]
    W_dec: Float[Array, "F O"]
    b_enc: Float[Array, " F"]
    """float32. Of a gated SAE: the bias of the gate."""
    b_dec: Float[Array, " O"]
    threshold: Float[Array, " F"] | None = None
    """float32, in the units of the latents."""
    b_mag: Float[Array, " F"] | None = None
    """Of a gated SAE: f = (g + b_enc > 0) * relu(g * mag_scale + b_mag), with g = x' @ W_enc."""
    mag_scale: Float[Array, " F"] | None = None
    W_skip: Float[Array, "D O"] | None = None
    config: SAEConfig = struct.field(pytree_node=False, kw_only=True)

    @property
    def d_in(self) -> int:
        """Width of the input site."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the output site."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """F."""
        return self.W_dec.shape[0]


class Fidelity(NamedTuple):
    """How an SAE does on some activations."""

    l0: Array
    """Mean number of latents that are not zero."""
    fvu: Array
    """Fraction of variance unexplained: squared error over squared distance from the mean."""


def encode(
    sae: SAE, x: Float[Array | np.ndarray, "... D"], latents: Int[Array | np.ndarray, " S"] | None = None
) -> Float32[Array, "... F"]:
    """Latents [..., F] of activations [..., D], or [..., S] of the latents with these indices alone; float32.

    With relu, jumprelu and gated only the columns of ``latents`` are ever computed. In topk, abstopk, groupmax and
    matching_pursuit latents compete, so that all pre-activations are computed and the subset is returned. Indices must
    lie in [0, F). An SAE for ``attn.hook_z`` also takes [..., N, H] and flattens the heads.

    Differentiable in x, but for matching_pursuit, which has forward derivatives only: a latent that is off has zero
    gradient. Raises ``UserError`` for an input of another width.
    """
    if latents is not None and sae.config.activation in ELEMENTWISE:
        return encode(subset(sae, latents), x)
    x = _prepare(sae, _flatten(sae, x))
    if sae.config.activation == "matching_pursuit":
        f = _matching_pursuit(sae, x.astype(jnp.float32))
    else:
        f = _activate(sae, _product(x, sae.W_enc))
    return f if latents is None else f[..., latents]


def preactivations(
    sae: SAE, x: Float[Array | np.ndarray, "... D"], latents: Int[Array | np.ndarray, " S"] | None = None
) -> Float32[Array, "... F"]:
    """What ``encode`` gives where a latent is on, for all latents: differentiable in x whether they are on or off.

    ``x' @ W_enc + b_enc``, and of a gated SAE the magnitudes ``x' @ W_enc * mag_scale + b_mag``. Arguments as in
    ``encode``; only the columns of ``latents`` are computed.
    """
    x = _prepare(sae, _flatten(sae, x))
    pick = (lambda a: a) if latents is None else (lambda a: a[..., latents])
    g = _product(x, pick(sae.W_enc))
    if sae.mag_scale is not None and sae.b_mag is not None:
        return g * pick(sae.mag_scale) + pick(sae.b_mag)
    return g + pick(sae.b_enc)


def decode(
    sae: SAE,
    z: Float[Array | np.ndarray, "... F"],
    latents: Int[Array | np.ndarray, " S"] | None = None,
    *,
    x: Float[Array | np.ndarray, "... D"] | None = None,
) -> Float32[Array, "... O"]:
    """The reconstruction [..., O] of latents [..., F], or of [..., S] with all but ``latents`` zero; float32.

    SAEs that normalise every row, and those with a skip connection, need the input ``x`` that was encoded as well.
    Heads are not split again. Raises ``UserError`` when ``x`` is missing, and for another number of latents.
    """
    config = sae.config
    z = jnp.asarray(z)
    W_dec = sae.W_dec if latents is None else sae.W_dec[latents]
    if z.shape[-1] != W_dec.shape[0]:
        raise UserError(f"decode was given {z.shape[-1]} latents (shape {z.shape}) and expects {W_dec.shape[0]}.")
    restore = config.input_norm != "none" and config.restore_norm
    if x is None and (restore or sae.W_skip is not None):
        why = f"normalises every row ({config.input_norm})" if restore else "has a skip connection from its input"
        raise UserError(f"This SAE {why}: its output depends on the input too. Give x=, what was encoded.")
    y = (_product(z, W_dec) + sae.b_dec) / config.output_scale
    if x is not None:
        x = _flatten(sae, x)
        if restore:
            shift, scale = _norm(config, x.astype(jnp.float32), sae.d_in)
            y = y * scale[..., None] + shift[..., None]
        if sae.W_skip is not None:
            y = y + _product(x, sae.W_skip)
    return y


def reconstruct(sae: SAE, x: Float[Array | np.ndarray, "... D"]) -> Float32[Array, "... O"]:
    """``decode(encode(x))``, float32 [..., O], with whatever the output needs of the input."""
    return decode(sae, encode(sae, x), x=x)


def subset(sae: SAE, latents: Int[Array | np.ndarray, " S"]) -> SAE:
    """The SAE of ``latents`` alone. Its ``decode`` adds b_dec. Raises ``UserError`` where latents compete."""
    if sae.config.activation not in ELEMENTWISE:
        raise UserError(
            f"The latents of this SAE compete ({sae.config.activation}), so that some alone are no SAE. Give encode "
            "the indices instead."
        )
    parts = {name: leaf[latents] for name in _PER_LATENT if (leaf := getattr(sae, name)) is not None}
    return dataclasses.replace(sae, W_enc=sae.W_enc[:, latents], **parts)


_PER_LATENT = ("W_dec", "b_enc", "threshold", "b_mag", "mag_scale")


def fidelity(
    sae: SAE, x: Float[Array | np.ndarray, "n *heads D"], y: Float[Array | np.ndarray, "n O"] | None = None
) -> Fidelity:
    """L0 and fraction of variance unexplained on activations x [n, D]; ``y`` [n, O] is a transcoder's target.

    The check of a freshly loaded SAE: on a few thousand tokens of ordinary text without BOS, L0 is near the advertised
    value and the fraction is well below 1. A wrong fold, layer or threshold shows here first.
    """
    target = (_flatten(sae, x) if y is None else jnp.asarray(y)).astype(jnp.float32)
    f = encode(sae, x)
    error = jnp.sum((decode(sae, f, x=x) - target) ** 2)
    return Fidelity(jnp.mean(jnp.sum(f != 0, -1)), error / jnp.sum((target - target.mean(0)) ** 2))


def shard_sae(sae: SAE, mesh: Mesh | None) -> SAE:
    """An SAE that is in memory already, laid out on ``mesh`` (``load_sae`` puts it there directly)."""
    leaves = {name: leaf for name in SPECS if (leaf := getattr(sae, name)) is not None}
    return dataclasses.replace(sae, **{k: jax.device_put(v, place(mesh, SPECS[k], v.shape)) for k, v in leaves.items()})


def _product(x: Array, w: Array) -> Array:
    """``x @ w`` in float32. Exact products of bfloat16 need no cast; by default a TPU would round float32 to it."""
    if x.dtype != w.dtype:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.matmul(x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _flatten(sae: SAE, x: Array | np.ndarray) -> Array:
    """Heads of ``attn.hook_z`` joined; the width checked."""
    d = sae.d_in
    x = jnp.asarray(x)
    if x.ndim and x.shape[-1] == d:
        return x
    if (sae.config.site_in or "").endswith("attn.hook_z") and x.ndim > 1 and x.shape[-1] * x.shape[-2] == d:
        return x.reshape(*x.shape[:-2], d)
    raise UserError(
        f"The SAE for {sae.config.site_in} of {sae.config.model or 'an unknown model'} encodes activations of width "
        f"{d}, and was given {x.shape[-1] if x.ndim else 'a number'} (shape {x.shape})."
    )


def _norm(config: SAEConfig, x: Array, width: int) -> tuple[Array, Array]:
    """(shift, scale) of every row: it is encoded as (x - shift) / scale, and decoded by y * scale + shift."""
    if config.input_norm == "constant_norm":
        return jnp.zeros(x.shape[:-1]), jnp.linalg.norm(x, axis=-1) / width**0.5
    return x.mean(-1), x.std(-1, ddof=1)


def _prepare(sae: SAE, x: Array) -> Array:
    """x', in x's own dtype where there is nothing to do."""
    config = sae.config
    if config.input_norm != "none":
        x = x.astype(jnp.float32)
        shift, scale = _norm(config, x, sae.d_in)
        epsilon = 1e-5 if config.input_norm == "layer_norm" else 0.0
        x = (x - shift[..., None]) / (scale[..., None] + epsilon)
    if config.input_scale != 1.0:
        x = x.astype(jnp.float32) * config.input_scale
    return x.astype(jnp.float32) - sae.b_dec if config.subtract_b_dec else x


def _activate(sae: SAE, g: Array) -> Array:
    """Latents of ``g = x' @ W_enc``."""
    config, p = sae.config, g + sae.b_enc
    k = config.k or 0
    match config.activation:
        case "relu":
            return jax.nn.relu(p)
        case "jumprelu":
            assert sae.threshold is not None
            return jnp.where(p > sae.threshold, jax.nn.relu(p), 0.0)
        case "gated":
            assert sae.b_mag is not None and sae.mag_scale is not None
            return jnp.where(p > 0, jax.nn.relu(g * sae.mag_scale + sae.b_mag), 0.0)
        case "abstopk":
            return _keep(p, lax.top_k(lax.stop_gradient(jnp.abs(p)), k)[1])
        case "topk":
            kept = _keep(p, lax.top_k(lax.stop_gradient(p), k)[1])
        case _:  # groupmax
            blocks = lax.stop_gradient(p).reshape(*p.shape[:-1], k, -1)
            kept = _keep(p, blocks.argmax(-1) + jnp.arange(k) * blocks.shape[-1])
    return jax.nn.relu(kept) if config.relu else kept


def _keep(p: Array, indices: Array) -> Array:
    """``p`` at ``indices`` of its last axis, and zero elsewhere."""
    values = jnp.take_along_axis(p, indices, axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(p), indices, values, axis=-1, inplace=False)


def _matching_pursuit(sae: SAE, x: Array) -> Array:
    """Greedy: subtract from the residual, again and again, the decoder row that it points along most."""
    config = sae.config
    rows = x.reshape(-1, sae.d_in)
    steps = config.max_steps or sae.d_in

    def one_step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        step, residual, f, done = state
        best = _product(residual, sae.W_enc).argmax(-1)
        atoms = sae.W_dec[best].astype(jnp.float32)
        value = jnp.where(done, 0.0, jax.nn.relu(jnp.sum(residual * atoms, -1)))
        line = jnp.arange(len(f))
        grown = f.at[line, best].add(value)
        residual = residual - value[:, None] * atoms
        if config.stop_on_same_support:
            # Only the entry at ``best`` may have changed from zero; the first step starts from no support at all.
            done = done | ((grown[line, best] != 0) == (f[line, best] != 0))
        if config.residual_threshold > 0:
            done = done | (jnp.linalg.norm(residual, axis=-1) < config.residual_threshold)
        return step + 1, residual, grown, done

    start = (jnp.asarray(0), rows, jnp.zeros((len(rows), sae.n_latents)), jnp.zeros(len(rows), bool))
    found = lax.while_loop(lambda state: (state[0] < steps) & ~state[3].all(), one_step, start)[2]
    return found.reshape(*x.shape[:-1], sae.n_latents)
