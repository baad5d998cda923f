"""Steering vectors made of SAE latents: chosen by name, by a signature, or by agreement over pairs (STA, 2505.20322).

Letters: n pairs, F latents, D width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.reading import BATCH
from jaxsteer.personas.directions import SIGN
from jaxsteer.personas.pairs import Pairs
from jaxsteer.personas.signatures import Signature, own_site, read_codes
from jaxsteer.ranges import a_number, is_number
from jaxsteer.sae import SAE, check_sae, require_same_model
from jaxsteer.steer.vectors import Vectors

log = logging.getLogger(__name__)


def latents_vector(
    model: Model,
    sae: SAE,
    latents: Mapping[int, float] | Signature,
    *,
    coefficient: float = 1.0,
    any_weights: bool = False,
) -> Vectors:
    """What the SAE writes for latents of these values: sum_i w_i W_dec[i], at the site that it writes to.

    ``latents`` are values by latent ({4711: 1.0} is the decoder's row), or a ``Signature`` with its contrasts, whose
    sign the vector then has. Raises ``UserError`` for an SAE that does not fit the model, or, unless ``any_weights``,
    that was trained on another one, and for latents that it does not have.
    """
    require_same_model(sae, model, any_weights=any_weights)
    check_sae(sae, model)
    sign = "raises these latents"
    if isinstance(latents, Signature):
        latents, sign = dict(zip(latents.indices.tolist(), latents.weights.tolist(), strict=True)), SIGN
    if not isinstance(latents, Mapping) or not all(
        isinstance(i, int | np.integer) and is_number(w) for i, w in latents.items()
    ):
        raise UserError(f"latents are numbers by latent, such as {{4711: 1.0}}, or a Signature; got {latents!r:.80}")
    if latents and not any(latents.values()):
        raise UserError("the values of all latents are 0: they would write nothing")
    if not latents or not all(0 <= latent < sae.n_latents for latent in latents):
        raise UserError(f"give latents from 0 to {sae.n_latents - 1}, got {sorted(latents) or 'none'}")
    weights = np.zeros(sae.n_latents)
    weights[list(latents)] = list(latents.values())
    note = {"estimator": "decoder rows", "latents": json.dumps({str(i): w for i, w in latents.items()})}
    return _vectors(model, sae, _decoded(sae, weights), sign, note, coefficient)


def sta_vector(
    model: Model, sae: SAE, pairs: Pairs, *, trim: float = 0.65, coefficient: float = 1.0, any_weights: bool = False,
    batch_size: int = BATCH,
) -> Vectors:  # fmt: skip
    """Steering target atoms: the mean difference of latents, cleaned, decoded and given the dense difference's norm.

    A_i is the mean over pairs of latent i in the good row minus that in the bad one, q_i the number of good rows in
    which it is on minus that of bad rows. A latent is kept where both have one sign, neither is 0, and it is among the
    1 - trim of all latents with the largest |A| and among those with the largest |q| of the agreeing ones. So good -
    bad is the vector's sign, as for directions. Without any latent left the vector is zero, with a logged warning.
    Raises ``UserError`` for an SAE of another width or site, of another model unless ``any_weights``, or one that does
    not write to the site that it reads.
    """
    require_same_model(sae, model, any_weights=any_weights)
    if not 0 <= a_number(trim, "trim") < 1:
        raise UserError(f"trim is the share of latents that is left out, from 0 to below 1; got {trim:g}")
    site = own_site(model, sae).name
    if sae.config.site_out not in (None, sae.config.site_in):
        raise UserError(
            f"target atoms need an SAE that writes what it reads; this one reads {sae.config.site_in} and writes "
            f"{sae.config.site_out}"
        )
    n = len(pairs)
    A, q, dense = np.zeros(sae.n_latents), np.zeros(sae.n_latents), np.zeros(sae.d_in)
    for chunk, states, codes, _ in read_codes(model, sae, pairs, batch_size=batch_size):
        side = np.where(chunk < n, 1.0, -1.0)
        A += side @ codes.astype(np.float64) / n
        q += side @ (codes > 0)
        dense += side @ states.astype(np.float64) / n
    kept = target_atoms(A, q, trim)
    vector = _decoded(sae, np.where(kept, A, 0.0))
    norm = np.linalg.norm(vector)
    if norm:
        vector *= np.linalg.norm(dense) / norm
    else:
        log.warning("no latent is on more often and more strongly on one side of the pairs: the vector is zero")
    note = {
        "estimator": "steering target atoms", "trim": f"{trim:g}", "n_pairs": str(n),
        "latents": json.dumps({str(i): float(A[i]) for i in np.flatnonzero(kept)}), **pairs.recipe,
    }  # fmt: skip
    found = _vectors(model, sae, vector, SIGN, note, coefficient, pairs.read_position)
    return found.at(site)


def target_atoms(A: Float[np.ndarray, " F"], q: Float[np.ndarray, " F"], trim: float) -> Bool[np.ndarray, " F"]:
    """The latents that ``sta_vector`` keeps. Agreement is required as such: thresholds of 0 would let all pass."""
    agree = (np.sign(A) == np.sign(q)) & (A != 0)
    last = min(int((1 - trim) * len(A)), len(A) - 1)
    among = [np.abs(score) >= np.sort(np.abs(score))[::-1][last] for score in (A, np.where(agree, q, 0))]
    return agree & among[0] & among[1]


def _decoded(sae: SAE, weights: Float[np.ndarray, " F"]) -> Float[np.ndarray, " D"]:
    rows = np.flatnonzero(weights)
    return weights[rows] @ np.asarray(sae.W_dec[rows], np.float64) / sae.config.output_scale


def _vectors(
    model: Model, sae: SAE, vector: np.ndarray, sign: str, note: dict[str, str], coefficient: float, read: str = ""
) -> Vectors:
    site = sae.config.site_out or sae.config.site_in
    assert site is not None
    return Vectors(
        arrays={site: vector.astype(np.float32)},
        coefficient=coefficient,
        sign=sign,
        model=model.name,
        fingerprint=model.fingerprint,
        read_position=read,
        metadata={
            **note, "sae_model": sae.config.model or "", "sae_format": sae.config.format,
            "latent_units": sae.config.latent_units, "jaxsteer_version": __version__,
        },
    )  # fmt: skip
