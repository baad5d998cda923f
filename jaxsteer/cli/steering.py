"""The options of every command that can steer a model by a vector file."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxsteer.errors import UserError
from jaxsteer.ranges import CountFrom0

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.steer import Edits, Vectors

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """Steer the model by the vectors of a file."""

    steer: Path | None = None
    """Vector file: direction.safetensors of a run, steering.safetensors of a sweep, or what `jaxsteer vector import`
    wrote."""
    steer_sites: tuple[str, ...] = ()
    """Sites to steer at, among those of the file (default: the one that its run chose, else all)."""
    coefficient: float | None = None
    """Strength (default: the file's). Positive leads where the file says; for a persona's direction, away from it."""
    units: Literal["vector", "mean_resid_norm"] | None = None
    """Of the coefficient: times the vector as it is, or mean norms of the stream along it (default: the file's)."""
    positions: Literal["all", "every", "prompt", "last", "response", "last_and_response"] | None = None
    """Tokens to steer: all but the first, every one, the prompt's, its last one, the response's, or the last two
    together (default: what the file says, else all)."""
    any_weights: bool = False
    """Use the vectors although they were made on other weights."""

    def vectors(self, model: Model) -> Vectors | None:
        """The vectors of the file at the sites that are steered, or None without a file.

        Raises ``UserError`` for a file or sites that do not fit the model.
        """
        if self.steer is None:
            for name in ("steer_sites", "coefficient", "units", "positions"):
                if getattr(self, name):
                    raise UserError(f"--{name.replace('_', '-')} says how to steer: give --steer FILE with it")
            return None
        from jaxsteer.steer import load_vectors
        from jaxsteer.steer.vectors import FIXED

        vectors = load_vectors(self.steer, model=model, any_weights=self.any_weights)
        whole = "site" in vectors.metadata or vectors.operation in FIXED  # those are one edit of many sites
        if not self.steer_sites and not whole and len(vectors.sites) > 1:
            log.warning(
                "%s names no site: steering at all of its %d. Choose among them with --steer-sites",
                self.steer, len(vectors.sites),
            )  # fmt: skip
        chosen = self.steer_sites or ((vectors.metadata["site"],) if "site" in vectors.metadata else vectors.sites)
        vectors = vectors.at(chosen)
        return vectors if self.units is None else dataclasses.replace(vectors, coefficient_units=self.units)

    def edits(self, model: Model) -> Edits | None:
        """What the options ask for, or None. Raises ``UserError`` as ``vectors``."""
        return self.edits_of(self.vectors(model))

    def edits_of(self, vectors: Vectors | None) -> Edits | None:
        """The edit of these vectors that the options ask for."""
        return None if vectors is None else vectors.edits(coefficient=self.coefficient, positions=self.positions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controlled(Steering):
    """Steer the model by the vectors of a file, beside random ones."""

    controls: CountFrom0 = 3
    """With --steer: so many random vectors of equal norm at the same sites and strength, measured beside it as rows of
    their own (0: none). Of files that add or ablate; caps, caches and scales have no such control."""

    def beside(self, vectors: Vectors, seed: int, coefficient: float | None = None) -> dict[str, Edits]:
        """Edits of the controls of ``vectors`` by name, at this coefficient or that of the options; none at 0."""
        from jaxsteer.steer.vectors import RANDOMISED, random_controls

        if self.controls and vectors.operation not in RANDOMISED:
            log.warning("%s: operation %s has no random control", self.steer, vectors.operation)
            return {}
        amount = self.coefficient if coefficient is None else coefficient
        if not self.controls or amount == 0:  # at 0 nothing is added, by any vector
            return {}
        made = random_controls(vectors, self.controls, seed)
        edits = [one.edits(coefficient=amount, positions=self.positions) for one in made]
        return {f"random {i + 1}": one for i, one in enumerate(edits)}
