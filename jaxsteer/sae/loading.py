"""``load_sae``: an SAE in any known layout, from a folder, a file or the hub, straight into its shardings."""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from checkpoints_convert.sae import read_sae, write_sae
from checkpoints_convert.sae_files import Overrides
from jaxsteer import processes
from jaxsteer.checkpoints.loading import ORGANISM
from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import Dictionary, Matrix
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import place, put
from jaxsteer.models.sites import KINDS, parse_site
from jaxsteer.organisms import organism_sae_dir
from jaxsteer.sae.dictionary import SAE, SPECS

log = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16")


class Health(NamedTuple):
    """Latents that cannot be used."""

    dead: int
    """Decoder rows of zeros: these latents never write anything."""
    non_finite: int
    """Latents with a NaN or an infinity among their weights."""
    tensors: tuple[str, ...]
    """Where NaN or infinities are."""


def load_sae(
    source: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype | None = None,
    mesh: Mesh | None = None,
    site: str | None = None,
    model: str | None = None,
    k: int | None = None,
    norm_scaling_factor: float | None = None,
    use_threshold: bool = False,
    unit_decoder: bool | None = None,
    site_out: str | None = None,
) -> SAE:
    """Load a sparse autoencoder or transcoder, in canonical form (docs/saes.md).

    ``source`` is a folder, a file, a hub id with a folder or file (``owner/name:folder``,
    ``owner/name@revision:folder``), or ``organism:NAME`` for the one that ships with that organism. The layout is
    recognised by its tensors. ``dtype`` is that of the matrices, float32 by default; biases and thresholds are always
    float32. With a ``mesh`` the latents are split over its axis "model", and every device reads its own.

    What a file does not say has to be given, and wins over the file where both say it: ``site`` (a name of
    ``jaxsteer.parse_site``), ``model`` (a hub id), ``k`` (active latents of top-k), ``norm_scaling_factor`` (of SAELens
    releases with inputs scaled to a fixed average norm). ``use_threshold`` reads an ``AutoEncoderTopK`` of
    dictionary_learning by its stored threshold instead of top-k. ``unit_decoder`` scales decoder rows to norm 1, which
    changes the units of the latents; by default as the layout's own library does. ``site_out`` chooses where a layer of
    a crosscoder or of a cross-layer transcoder writes to; by default in its own layer.

    Many parameters: what a file may lack is given by its own name.

    Dead latents are logged. Raises ``UserError`` for a source that is not found, not known, ambiguous, damaged, that
    says too little (the message lists what was found and what is known), or that holds NaN or infinity.
    """
    target = _dtype(dtype)
    if str(source).startswith(ORGANISM):
        source = organism_sae_dir(str(source).removeprefix(ORGANISM))
    overrides = Overrides(
        model=model,
        site=site,
        k=k,
        norm_scaling_factor=norm_scaling_factor,
        use_threshold=use_threshold,
        site_out=site_out,
    )
    sae = to_device(read_sae(source, unit_decoder_rows=unit_decoder, overrides=overrides), dtype=target, mesh=mesh)
    health = check_health(sae)
    if health.non_finite or health.tensors:
        raise UserError(
            f"The SAE {source} holds NaN or infinity as {target.name} in {', '.join(health.tensors)} "
            f"({health.non_finite} of {sae.n_latents} latents), so that nothing it computes could be right."
        )
    if health.dead:
        log.info("%d of %d latents of the SAE %s have decoder rows of zeros", health.dead, sae.n_latents, source)
    return sae


def save_sae(sae: SAE, out: str | os.PathLike[str], *, dtype: str = "float32") -> None:
    """Write the folder ``out`` in SAELens' layout, whole or not at all; ``load_sae`` gives the same SAE again.

    The file holds the canonical form: scales and subtractions in the config are folded. ``dtype`` is that of the
    matrices. What SAELens cannot express is logged with a warning. Raises ``UserError`` if ``out`` exists.
    """
    lost = write_sae(to_host(sae), out, dtype=dtype)
    if lost:
        log.warning("SAELens will refuse %s, because it cannot express %s", out, "; ".join(lost))


def to_device(d: Dictionary, *, dtype: jnp.dtype, mesh: Mesh | None = None) -> SAE:
    """The pytree of an SAE on the host. Matrices are read and rounded piece by piece, each device its own."""
    leaves: dict[str, jax.Array] = {}
    for name, spec in SPECS.items():
        value = getattr(d, name)
        if value is None:
            continue
        sharding = place(mesh, spec, value.shape)
        if isinstance(value, Matrix):
            leaves[name] = jax.make_array_from_callback(value.shape, sharding, _reader(value, dtype))
        else:
            leaves[name] = put(np.asarray(value, np.float32), sharding)
    return SAE(config=d.config, **leaves)


def _reader(matrix: Matrix, dtype: jnp.dtype) -> Any:
    return lambda index: matrix.read(index[0], index[1], dtype)


def to_host(sae: SAE) -> Dictionary:
    """The opposite of ``to_device``."""
    leaves = processes.to_host({name: leaf for name in SPECS if (leaf := getattr(sae, name)) is not None})
    arrays: dict[str, Any] = {k: Matrix(v) if v.ndim == 2 else v.astype(np.float64) for k, v in leaves.items()}
    return Dictionary(config=sae.config, **arrays)


def check_health(sae: SAE) -> Health:
    """Count the latents that cannot be used."""
    dead, non_finite, tensors = processes.to_host(_health(sae))
    return Health(int(dead), int(non_finite), tuple(name for name, finite in tensors.items() if not finite))


@jax.jit
def _health(sae: SAE) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    leaves = {name: leaf for name in SPECS if (leaf := getattr(sae, name)) is not None}
    good = {name: jnp.isfinite(leaf) for name, leaf in leaves.items()}
    if sae.threshold is not None:  # an infinite threshold is how a latent is switched off
        good["threshold"] = ~jnp.isnan(sae.threshold)
    finite = good["W_dec"].all(axis=1) & good["W_enc"].all(axis=0)
    for name in ("b_enc", "b_mag", "mag_scale", "threshold"):
        finite &= good.get(name, True)
    return jnp.all(sae.W_dec == 0, axis=1).sum(), (~finite).sum(), {name: each.all() for name, each in good.items()}


def check_sae(sae: SAE, model: Model, site: str | None = None) -> None:
    """Make sure that ``sae`` reads what ``model`` has at ``site`` (by default, at the SAE's own site).

    Another width raises ``UserError`` with both numbers, and so does a site that the model does not have. Another
    model or site, or one that the SAE does not name, is a warning: latents then may mean nothing.
    """
    own = sae.config.site_in
    name = site or own
    if name is None:
        raise UserError(
            "This SAE does not say which site it belongs to. Give site=, for example 'blocks.2.hook_resid_post'."
        )
    used = parse_site(name, model.config.n_layers)
    width = KINDS[used.kind].width(model.config)
    if width != sae.d_in:
        raise UserError(
            f"The SAE reads activations of width {sae.d_in} ({own} of {sae.config.model or 'an unknown model'}), and "
            f"{used.name} of {model.name} has width {width}. It belongs to another model or site."
        )
    if own is not None and own != used.name:
        log.warning("this SAE was trained at %s and is used at %s: it may mean nothing there", own, used.name)
    if not same_model(sae.config.model, model.name):
        log.warning(
            "this SAE was trained on %s and is used on %s: its latents may mean something else, or nothing",
            sae.config.model or "a model that its files do not name",
            model.name,
        )


def require_same_model(sae: SAE, model: Model, *, any_weights: bool = False) -> None:
    """Refuse an SAE whose files name another model than ``model``, where it is to steer it or be explained by it.

    As for vector files, that is a ``UserError`` unless ``any_weights``. Nothing is refused where no model is named;
    ``check_sae`` logs that and the rest.
    """
    trained_on = sae.config.model
    if trained_on is not None and not same_model(trained_on, model.name) and not any_weights:
        raise UserError(
            f"this SAE was trained on {trained_on}, not on {model.name}: its latents have their meaning "
            "there. If it is meant for this model all the same, say any_weights=True (--any-weights)"
        )


def same_model(one: str | None, other: str) -> bool:
    """Whether two names may mean the same model: owners count only where both name one."""
    if one is None:
        return False
    a, b = (name.lower().split("@")[0].rstrip("/") for name in (one, other))
    return a == b if "/" in a and "/" in b else a.rpartition("/")[2] == b.rpartition("/")[2]


def _dtype(given: str | jnp.dtype | None) -> jnp.dtype:
    try:
        dtype = jnp.dtype("float32" if given is None else given)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _DTYPES:
        raise UserError(f"dtype {given!r} is not supported: give 'float32', 'bfloat16' or 'float16'.")
    return dtype
