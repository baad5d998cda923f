"""Where things lie: a role at one block, a trait beside the axis, the space of characters at every block."""

from __future__ import annotations

import dataclasses

from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place(Record):
    """Where a role lies at the target block. ``DEFAULT`` is the Assistant as it is."""

    name: str
    family: str = ""
    human: bool | None = None
    assistant_like: int | None = None
    """By people, beforehand."""
    rollouts: CountFrom0
    position: float
    """Projection on the axis: 0 is the mean of the roles, 1 the Assistant."""
    ci95: Interval
    """Of the position, over questions."""
    pc1: float
    """Along the first principal component, in units of the stream; it is oriented towards the Assistant."""
    pc1_ci95: Interval
    pc2: float

    def interval(self) -> str:
        """The position with its interval."""
        return f"{self.position:.2f} ({self.ci95[0]:.2f} to {self.ci95[1]:.2f})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraitPlace(Record):
    """A trait's direction (for it minus against it) beside the axis."""

    name: str
    cosine: float
    """With the axis: what goes along with the Assistant is positive."""
    ci95: Interval
    of_stream: float
    """Norm of the trait's direction as a share of the mean norm of the stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(Record):
    """The axis and the space of characters at one block. Intervals are over questions."""

    site: str
    of_stream: float
    """Norm of the axis as a share of the mean norm of what is read."""
    halves: float
    """Cosine of the axes of two halves of the questions, mean over random splits."""
    halves_spread: Interval
    order: float
    """Rank correlation of the roles' positions in two halves."""
    order_spread: Interval
    shuffled_order: float
    """The same where the roles of the rollouts are exchanged at random, mean over exchanges: what no order gives."""
    other_order: float
    """Rank correlation of the positions with those on the axis of the block half the depth away."""
    cosine: float
    """Of the axis with PC1 of the roles."""
    cosine_ci95: Interval
    cosines: tuple[float, ...]
    """With PC1, PC2, PC3."""
    scaled_cosine: float
    """With PC1 where every dimension is divided by its spread over roles."""
    base_cosine: float
    """Cosine with PC1 that a role has in the Assistant's place: the median over roles."""
    base_share: float
    """Share of the roles that have a smaller one than the Assistant."""
    explained: tuple[float, ...]
    """Share of the variance along the first components."""
    needed: int
    """Components for 70 % of the variance."""
    edge: float
    """The Assistant's distance from its end of PC1, as a share of the roles' range; negative beyond the last role."""
    edge_ci95: Interval
    rating: float | None = None
    """Rank correlation of the positions with the rating by people."""
    pc1_rating: float | None = None
    """And of PC1."""
    positions: tuple[float, ...]
    """Of all roles, in the order of ``AxisResult.roles``."""
    pc1: tuple[float, ...]
