"""How probes are fitted and tested."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxsteer.ranges import CountFrom0, Positive, Seed

Kind = Literal["logistic", "ridge", "mean", "mlp"]
STREAM = ("hook_embed", "blocks.*.hook_resid_post")
"""The embedding, of which a probe can learn no more than the words read, and the stream after every block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How probes are fitted and tested."""

    kind: Kind = "logistic"
    """logistic, ridge, mean (difference of the class means) or mlp (one hidden layer)."""
    sites: tuple[str, ...] = STREAM
    """Sites of one width; a wildcard names those of every layer."""
    positions: tuple[str, ...] = ("last",)
    """Which tokens are read: last, mean, prompt (the last before the reply), response (its mean), or a number."""
    penalties: tuple[Positive, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    """Penalties on squared weights of standardised states, among which validation chooses."""
    folds: int = 5
    """At least 3."""
    controls: CountFrom0 = 3
    """Control tasks."""
    shuffles: CountFrom0 = 3
    """Orders of shuffled labels."""
    positive: str | None = None
    """The label that is told from the rest (default: the last in alphabetical order)."""
    seed: Seed = 0
    """Of folds, control tasks and shuffled labels."""
    batch: int = 32
    """Texts that the model reads at once."""
