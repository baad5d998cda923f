"""Caps along an axis: floors on the projection, one for each of several blocks, calibrated on rollouts.

The axis points towards the Assistant, so a cap is a floor: the projection never falls below it. In the paper (arXiv
2601.10387) it is the 25th percentile of projections over rollouts, and every position is capped. Two choices here
differ from it, or make it exact:

- *Which rollouts.* Along an axis towards the Assistant a low percentile of all characters is a floor under everybody,
  and holds nobody. The default's own rollouts are what is to be held to: their 25th percentile leaves three of four
  of its replies as they are. (The released caps lie on vectors of the opposite sign.)
- *Which positions.* All but the first. Its state is an attention sink, of outsize norm and with no meaning for the
  axis; moving it moves every token that attends to it. ``positions="every"`` caps it too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.axis.drift import whole_projections
from jaxsteer.axis.projection import along, encoded, units
from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sites import resid_site
from jaxsteer.personas.passages import Passage
from jaxsteer.steer.vectors import Vectors, check_vectors

DEPTH = (0.70, 0.89)
"""Share of the blocks that are capped, from, to: blocks 56 to 71 of 80, as the paper has it for Llama 3.3 70B, which is
the wider of its two ranges (46 to 53 of 64 for Qwen3 32B)."""
LEAST = 12
"""Rollouts without which a percentile means nothing."""
OFF = -1e9
"""A floor that holds nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Projections of rollouts at the sites that are capped."""

    sites: tuple[str, ...]
    values: Float[np.ndarray, "s n"]
    """Mean of each rollout over its content tokens, in units of the stream, float64."""
    source: str
    """What the rollouts are."""

    def caps(self, axis: Vectors, percentile: float) -> Vectors:
        """Floors along ``axis`` at a percentile of the rollouts, at every position but the first."""
        held = axis.at(self.sites)
        values = np.percentile(self.values, percentile, axis=1)
        return dataclasses.replace(
            held,
            operation="floor",
            values=dict(zip(held.sites, map(float, values), strict=True)),
            coefficient=1.0,
            coefficient_units="vector",
            positions="all",
            metadata={
                "kind": "cap",
                "percentile": f"{percentile:g}",
                "calibrated_on": f"{self.values.shape[1]} {self.source}",
            },
        )


def cap_sites(model: Model, axis: Vectors, layers: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Outputs of the blocks from the first to the last of ``layers``, both included (default: by ``DEPTH``).

    Raises ``UserError`` for blocks that the model or the axis does not have.
    """
    n = model.config.n_layers
    first, last = layers or (min(math.ceil(DEPTH[0] * n), n - 1), max(math.ceil(DEPTH[1] * n) - 1, 0))
    if not 0 <= first <= last < n:
        raise UserError(f"caps from block {first} to {last}: {model.name} has blocks 0 to {n - 1}")
    return axis.at([resid_site(layer) for layer in range(first, max(first, last) + 1)]).sites


def calibration_set(rollouts: Sequence[Passage], group: str = DEFAULT) -> tuple[tuple[Passage, ...], str]:
    """The rollouts of a group ("default"; "" takes all), and what they are in words.

    Rollouts without any group are taken all. Raises ``UserError`` for fewer than ``LEAST``.
    """
    grouped = any(one.group for one in rollouts)
    chosen = tuple(one for one in rollouts if not group or not grouped or one.group == group)
    if len(chosen) < LEAST:
        there = ", ".join(sorted({one.group for one in rollouts})[:8]) or "none"
        raise UserError(
            f"there are {len(chosen)} rollouts of {group or 'all groups'} to calibrate caps on, and at least {LEAST} "
            f"have to be; groups there: {there}. Give more rollouts, or another group"
        )
    return chosen, f"rollouts of {group}" if group and grouped else "rollouts"


def calibrate_caps(
    model: Model,
    axis: Vectors,
    rollouts: Sequence[Passage],
    *,
    layers: tuple[int, int] | None = None,
    group: str = DEFAULT,
    any_weights: bool = False,
) -> Calibration:
    """Projections of the rollouts of a ``group`` at the blocks that are to be capped.

    Caps at any percentile follow (``Calibration.caps``). Raises ``UserError`` for an axis of another model, for
    ``layers`` that there are not, and as ``calibration_set`` does.
    """
    check_vectors(axis, model, any_weights=any_weights)
    sites = cap_sites(model, axis, layers)
    chosen, source = calibration_set(rollouts, group)
    return Calibration(sites=sites, values=whole_projections(model, axis, chosen, sites), source=source)


def mean_displacement(model: Model, caps: Vectors, passages: Sequence[Passage]) -> Vectors:
    """What ``caps`` add along their vectors on average, as vectors to be added: the control of equal displacement.

    The mean is over all tokens of ``passages`` but the first, block by block, with the caps of the blocks below in
    force, so that the sums are what the caps do together. One program, whatever the number of blocks.
    """
    rows = [ids for ids, _ in encoded(model, passages)]
    directions, moved = units(caps, caps.sites), {}
    for i, site in enumerate(caps.sites):
        below = {s: value if k < i else OFF for k, (s, value) in enumerate(caps.values.items())}
        values = along(
            model, rows, directions[:, None], caps.sites, edits=dataclasses.replace(caps, values=below).edits()
        )
        lifted = np.concatenate([np.maximum(caps.values[site] - one[i, 0, 1:], 0) for one in values])
        moved[site] = float(lifted.mean())
    arrays = {site: (unit * moved[site]).astype(np.float32) for site, unit in zip(caps.sites, directions, strict=True)}
    return dataclasses.replace(
        caps, arrays=arrays, operation="add", values={}, sign=f"{caps.sign}; as much as the caps add on average",
        metadata={"kind": "mean displacement of caps"},
    )  # fmt: skip
