"""SAE signatures of a persona: a few signed latents in place of a dense direction (arXiv 2601.02896).

Sign, as for directions: positive weights are latents that fire more where the persona is not shown, so that raising
``sum_i w_i f_i`` reduces the persona.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxsteer import __version__
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import make_directory, parse_json, read_tensors, tensor_bytes, write_bytes
from jaxsteer.models.model import Model
from jaxsteer.models.reading import BATCH, direction_sites, read_rows
from jaxsteer.models.sites import Site
from jaxsteer.personas.directions import SIGN
from jaxsteer.personas.pairs import Pairs
from jaxsteer.sae import SAE, check_sae, decode, encode

FORMAT = "jaxsteer.signature/1"
SHARE = 0.01
"""Of all latents, the share that makes a signature by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """The latents whose mean differs most between answers that do not show the persona and answers that do."""

    indices: Int[np.ndarray, " k"]
    """Latents, the largest contrast first."""
    weights: Float[np.ndarray, " k"]
    """Their contrast: mean over good rows minus mean over bad rows, in units of the latents."""
    delta: Float[np.ndarray, " F"]
    """The contrast of every latent."""
    site: str
    read_position: str
    n: int
    """Number of pairs."""
    l0_good: float
    """Mean number of active latents at the read positions of good rows."""
    l0_bad: float
    fvu: float
    """Fraction of variance unexplained of the SAE's reconstruction at these positions."""
    metadata: dict[str, str]

    def keep(self, latents: int) -> Signature:
        """The signature of the ``latents`` largest contrasts that are not zero. Raises ``UserError`` without any."""
        indices, weights = _largest(self.delta, latents)
        return dataclasses.replace(self, indices=indices, weights=weights)


def sae_signature(
    model: Model, sae: SAE, pairs: Pairs, *, latents: int | None = None, batch_size: int = BATCH
) -> Signature:
    """Contrast of latent means over pairs, at the SAE's own site and the pairs' read positions.

    Every row is encoded and the codes are averaged, in float64 (not the encoding of the average). ``latents`` is how
    many to keep (default: 1 %, at least one), zeros left out. Raises ``UserError`` for an SAE that does not fit the
    model, a site that is not of width D, and pairs that no latent tells apart.
    """
    site = own_site(model, sae)
    good = len(pairs)
    sums = np.zeros((2, sae.n_latents))
    active, streams, errors = np.zeros(2), [], 0.0
    for chunk, states, codes, back in read_codes(model, sae, pairs, batch_size=batch_size):
        for side, member in enumerate((chunk < good, chunk >= good)):
            sums[side] += codes[member].sum(0, dtype=np.float64)
            active[side] += float((codes[member] != 0).sum())
        streams.append(states.astype(np.float64))
        errors += float(((back - states).astype(np.float64) ** 2).sum())
    if not np.isfinite(sums).all():
        raise UserError("the SAE gives NaN or infinite latents on these pairs: check its weights and the model's dtype")
    everything = np.concatenate(streams)
    delta = (sums[0] - sums[1]) / good
    wanted = max(1, math.ceil(SHARE * sae.n_latents)) if latents is None else latents
    indices, weights = _largest(delta, wanted)
    return Signature(
        indices=indices,
        weights=weights,
        delta=delta.astype(np.float32),
        site=site.name,
        read_position=pairs.read_position,
        n=good,
        l0_good=float(active[0] / good),
        l0_bad=float(active[1] / good),
        fvu=errors / float(((everything - everything.mean(0)) ** 2).sum()),
        metadata={
            "model": model.name,
            "fingerprint": model.fingerprint,
            "sae_model": sae.config.model or "",
            "sae_format": sae.config.format,
            "latent_units": sae.config.latent_units,
            "sign": SIGN,
            "estimator": "difference of latent means",
            "jaxsteer_version": __version__,
            **pairs.recipe,
        },
    )


def own_site(model: Model, sae: SAE) -> Site:
    """The site of width D that the SAE reads. Raises ``UserError`` for another, and for an SAE that does not fit."""
    check_sae(sae, model)
    assert sae.config.site_in is not None  # check_sae has seen to it
    return direction_sites(model, sae.config.site_in)[0]


def read_codes(
    model: Model, sae: SAE, pairs: Pairs, *, batch_size: int = BATCH
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(numbers of rows, streams, latents, reconstructions) at the read positions, good rows first, each once."""
    for chunk, (states,) in read_rows(model, pairs.rows, pairs.reads, [own_site(model, sae)], batch_size=batch_size):
        x = np.zeros((batch_size, states.shape[-1]), np.float32)
        x[: len(chunk)] = states  # always the same shape, so that nothing recompiles
        codes, back = (np.asarray(a)[: len(chunk)] for a in _encode(sae, x))
        yield chunk, states, codes, back


@jax.jit
def _encode(sae: SAE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes = encode(sae, x)
    return codes, decode(sae, codes, x=jnp.asarray(x))


def _largest(delta: Float[np.ndarray, " F"], latents: int) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Indices and contrasts of the ``latents`` largest that are not zero; ties in the order of the dictionary."""
    if latents < 1:
        raise UserError(f"a signature needs at least 1 latent, got {latents}")
    order = np.argsort(-np.abs(delta), kind="stable")[:latents]
    order = order[delta[order] != 0]
    if not len(order):
        raise UserError("no latent tells the pairs apart: every mean is the same. Is this the SAE of this site?")
    return order.astype(np.int32), delta[order].astype(np.float32)


def random_signature(signature: Signature, seed: int) -> Signature:
    """A control: as many other latents of the dictionary, drawn at random, with the same weights."""
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(signature.delta)), signature.indices)
    if len(others) < len(signature.indices):
        raise UserError(
            f"a random control needs {len(signature.indices)} latents outside the signature, and the SAE has "
            f"{len(others)} others: use fewer latents"
        )
    indices = rng.choice(others, len(signature.indices), replace=False).astype(np.int32)
    metadata = {**signature.metadata, "estimator": f"random latents, seed {seed}"}
    return dataclasses.replace(signature, indices=indices, metadata=metadata)


def save_signature(signature: Signature, path: str | os.PathLike[str]) -> Path:
    """Write ``signature.safetensors``: indices, weights and every latent's contrast, the rest as metadata."""
    path = Path(path)
    numbers = {name: getattr(signature, name) for name in ("n", "l0_good", "l0_bad", "fvu")}
    metadata = {
        **signature.metadata,
        "format": FORMAT,
        "site": signature.site,
        "read_position": signature.read_position,
        "numbers": json.dumps(numbers),
    }
    tensors = {name: np.ascontiguousarray(getattr(signature, name)) for name in ("indices", "weights", "delta")}
    make_directory(path.parent)
    write_bytes(path, tensor_bytes(tensors, metadata))
    return path


def load_signature(path: str | os.PathLike[str]) -> Signature:
    """Read what ``save_signature`` wrote. Raises ``UserError`` for a missing, damaged or other file."""
    tensors, metadata = read_tensors(path, "signature file")
    if metadata.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a signature of jaxsteer: its metadata does not say {FORMAT!r}")
    try:
        return Signature(
            site=metadata.pop("site"),
            read_position=metadata.pop("read_position"),
            **parse_json(metadata.pop("numbers"), path, nan=True),
            indices=tensors["indices"],
            weights=tensors["weights"],
            delta=tensors["delta"],
            metadata=metadata,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: its metadata and tensors do not fit together ({first_line(error)})"
        ) from error
