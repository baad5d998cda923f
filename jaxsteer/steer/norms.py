"""What edits are measured in, and how much of a text they touch."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.roles import Roles
from jaxsteer.models.run import Lengths, Mask, Tokens, capture
from jaxsteer.models.sites import KINDS, find_sites
from jaxsteer.models.taps import Intervention, make_where
from jaxsteer.models.transformer import positions_of


def mean_norms(
    model: Model, tokens: Tokens, sites: Sequence[str], mask: Mask | None = None, *, batch_size: int = 16
) -> dict[str, float]:
    """Mean norm of what the model computes at ``sites`` over the tokens of a text, by name as ``capture``.

    The unit of steering coefficients (``add(..., mean_norm=)``). Padding and position 0 are left out: the norm at BOS
    is many times that of any other token. Rows go through the model ``batch_size`` at a time; sums are float64. At
    places with heads the norm is over all heads together. Raises ``UserError`` as ``capture`` does, for patterns, and
    for texts of at most one token.
    """
    tokens = np.asarray(tokens)
    valid = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    counted = valid & (np.cumsum(valid, -1) > 1)
    if not counted.any():
        raise UserError("The mean norm leaves out position 0 and padding, and nothing remains: give longer texts.")
    found = find_sites(sites, model.config)
    if any(KINDS[site.kind].over_keys for site in found.values()):
        raise UserError("Attention patterns are probabilities: they have no norm to count coefficients in.")
    totals = dict.fromkeys(found, 0.0)
    for start in range(0, len(tokens), batch_size):
        rows = np.arange(start, start + batch_size) % len(tokens)  # always batch_size, so that nothing recompiles
        new = (np.arange(start, start + batch_size) < len(tokens))[:, None] & counted[rows]
        rows, new = (rows, new) if len(tokens) > batch_size else (rows[: len(tokens)], new[: len(tokens)])
        for site, value in capture(model, tokens[rows], sites, valid[rows]).items():
            flat = np.asarray(value, np.float64).reshape(*new.shape, -1)
            totals[site] += float(np.linalg.norm(flat, axis=-1)[new].sum())
    return {site: total / int(counted.sum()) for site, total in totals.items()}


def count_positions(
    edits: Intervention,
    tokens: Tokens,
    mask: Mask | None = None,
    *,
    prompt_length: Lengths | None = None,
    roles: Roles | None = None,
) -> Int[np.ndarray, " B"]:
    """How many positions of each row the edits touch, in some layer. ``prompt_length`` and ``roles`` as in ``run``.

    An edit counts where it acts, whatever it changes there: also with coefficient 0 or below its ceiling.
    """
    valid = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    lengths = None if prompt_length is None else jnp.asarray(prompt_length)
    where = make_where(jnp.asarray(tokens), positions_of(valid), valid, lengths, jax.tree.map(jnp.asarray, roles))
    return np.asarray(edits.touched(where).sum(-1))
