"""What a study of characters found: where each role lies, the axis at every block, and what the controls say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsteer.axis import figures
from jaxsteer.axis.places import Layer, Place, TraitPlace
from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.display import aligned, decimals, percent, visible, wrapped
from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval
from jaxsteer.runs.files import METRICS
from jaxsteer.runs.result import Result
from jaxsteer.statistics import spearman, spearman_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELIABLE = 0.8
"""Below this cosine of two halves, nothing should be built on an axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(Record):
    """What a judge left."""

    judge: str
    keep: int
    """Rollouts with at least this score were kept."""
    scores: Mapping[str, int]
    """Rollouts of roles by score; "unread" where the judge gave none."""
    kept: CountFrom0
    cosine: float | None = None
    """Of the axis with that of all rollouts, at the target block."""
    order: float | None = None
    """Rank correlation of the positions with those of all rollouts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply(Record):
    """A rollout to look at."""

    role: str
    question: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisResult(Result):
    """The assistant axis of a model among a set of roles."""

    model: str
    fingerprint: str
    roleset: str
    roleset_hash: str
    rollouts: CountFrom0
    """Those that said something."""
    silent: CountFrom0 = 0
    """Rollouts that said nothing, which have no states."""
    questions: CountFrom0
    target: str
    """The block at which roles are placed."""
    chosen: bool = True
    """Whether it was chosen, as the block where the axes of two halves of the questions agree best."""
    layers: tuple[Layer, ...]
    roles: tuple[Place, ...]
    """From the Assistant's end to the other."""
    default: Place
    traits: tuple[TraitPlace, ...] = ()
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Roles with too few rollouts, and how many they had."""
    filter: Filter | None = None
    rating_p: float | None = None
    """p-value of the correlation of positions with the rating at the target, by exchanging ratings."""
    replies: tuple[Reply, ...] = ()
    """Of roles at both ends, and of the Assistant."""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Wall time of the parts that this call did."""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> AxisResult:
        """The result in a directory of ``jaxsteer axis run``. Raises ``UserError`` where there is none."""
        path = Path(folder) / METRICS
        if not path.is_file():
            raise UserError(f"{folder} holds no finished result of jaxsteer axis run (there is no {METRICS})")
        return cls.from_json(read_json(path), str(path))

    @property
    def layer(self) -> Layer:
        """The target block."""
        return next(layer for layer in self.layers if layer.site == self.target)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to take the numbers at face value, in words."""
        here, found = self.layer, []
        if here.halves < RELIABLE:
            found.append(
                f"The axes of two halves of the questions have a cosine of {here.halves:.2f} (below {RELIABLE}): the "
                "axis is noisy. Ask more questions."
            )
        if here.order_spread[0] <= 0:
            low, high = here.order_spread
            found.append(
                f"The roles' order in two halves of the questions has a rank correlation of {here.order:.2f} "
                f"({low:.2f} to {high:.2f} over random splits): it may be no order at all. Ask more questions."
            )
        if here.cosine <= here.base_cosine or here.base_share < 0.5:
            found.append(
                f"The axis lies along PC1 with a cosine of {here.cosine:.2f}, no more than a role in the Assistant's "
                f"place does (median {here.base_cosine:.2f}): that PC1 is an axis of the Assistant is not shown."
            )
        if self.left_out:
            some = ", ".join(f"{visible(name)} ({n})" for name, n in list(self.left_out.items())[:6])
            count = f"{len(self.left_out)} role{'s' if len(self.left_out) > 1 else ''}"
            found.append(
                f"{count} had too few rollouts and {'were' if len(self.left_out) > 1 else 'was'} left out: {some}."
            )
        return tuple(found)

    def table(self, *, ends: int = 12) -> str:
        """The blocks, the roles at both ends, and what speaks against it."""
        here = self.layer
        how = "where the axes of two halves agree best" if self.chosen else "as it was asked for"
        head = (
            f"{visible(self.model)}: {len(self.roles)} roles of {visible(self.roleset)}, {self.rollouts:,} rollouts to "
            f"{self.questions} questions; target {self.target} ({how})"
        )
        rows = [("block", "of stream", "halves", "order", "shuffled", "cos PC1", "a role's", "PC1", "edge", "rating")]
        for layer in self.layers:
            mark = " *" if layer.site == self.target else ""
            rows.append((
                layer.site.split(".")[1] + mark, decimals(layer.of_stream, 3), decimals(layer.halves),
                decimals(layer.order), decimals(layer.shuffled_order),
                f"{layer.cosine:.2f} ({layer.cosine_ci95[0]:.2f} to {layer.cosine_ci95[1]:.2f})",
                decimals(layer.base_cosine), percent(layer.explained[0]), decimals(layer.edge), decimals(layer.rating),
            ))  # fmt: skip
        note = (
            "of stream: norm of the axis in mean norms of the stream. halves, order: cosine of the axes, and rank "
            "correlation of the roles' positions, of two halves of the questions; shuffled: that order where roles are "
            "exchanged. cos PC1: cosine of the axis with the first principal component of the roles (95 % interval "
            "over questions); a role's: the median where a role stands in the Assistant's place. PC1: its share of the "
            "variance. edge: the Assistant's distance from its end of PC1, in shares of the roles' range. rating: rank "
            "correlation of positions with the rating by people."
        )
        parts = [head, aligned(rows, note=note), self._ends(ends)]
        if self.traits:
            ordered = sorted(self.traits, key=lambda trait: -trait.cosine)
            most = [*ordered[:5], *ordered[-5:]] if len(ordered) > 10 else ordered
            listed = [(visible(t.name), f"{t.cosine:+.2f} ({t.ci95[0]:+.2f} to {t.ci95[1]:+.2f})") for t in most]
            parts.append(aligned([("trait", "cosine with the axis"), *listed]))
        if self.filter is not None:
            kept = self.filter
            counts = ", ".join(f"{n} of {score}" for score, n in kept.scores.items())
            parts.append(
                f"judge {visible(kept.judge)}: scores {counts}; kept {kept.kept} with at least {kept.keep}. Against "
                f"all rollouts: cosine of the axes {decimals(kept.cosine)}, order {decimals(kept.order)}"
            )
        low, high = spearman_interval(here.rating, self._rated) if here.rating is not None else (0.0, 0.0)
        if here.rating is not None:
            parts.append(
                f"agreement with the rating of {self._rated} roles at {self.target}: {here.rating:.2f} ({low:.2f} to "
                f"{high:.2f}; p = {self.rating_p:.4f} by exchanging ratings), of PC1 {decimals(here.pc1_rating)}"
            )
        return "\n\n".join([*parts, *(wrapped(doubt) for doubt in self.doubts)])

    @property
    def _rated(self) -> int:
        return sum(role.assistant_like is not None for role in self.roles)

    def _ends(self, n: int) -> str:
        rows = [("role", "position", "PC1", "rating")]
        shown = self.roles if len(self.roles) <= 2 * n else (*self.roles[:n], None, *self.roles[-n:])
        for place in (self.default, *shown):
            if place is None:
                rows.append(("…", "", "", ""))
                continue
            rating = "" if place.assistant_like is None else str(place.assistant_like)
            rows.append((visible(place.name), place.interval(), decimals(place.pc1, 1), rating))
        note = (
            "position: projection on the axis, 0 the mean of the roles, 1 the Assistant (95 % interval over questions)"
        )
        return aligned(rows, note=note)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per role, the Assistant first."""
        return [
            {
                "role": place.name, "family": place.family, "human": place.human,
                "assistant_like": place.assistant_like, "rollouts": place.rollouts, "position": place.position,
                "low": place.ci95[0], "high": place.ci95[1], "pc1": place.pc1, "pc1_low": place.pc1_ci95[0],
                "pc1_high": place.pc1_ci95[1], "pc2": place.pc2,
            }
            for place in (self.default, *self.roles)
        ]  # fmt: skip

    def correlations(self) -> np.ndarray:
        """float64 [L, L]: correlation of the roles' places on PC1 between blocks."""
        found: np.ndarray = np.corrcoef([layer.pc1 for layer in self.layers])
        return found

    def strip(self, *, pc1: bool = False) -> Figure:
        """The roles along the axis (or along PC1), with intervals."""
        return figures.strip(self.default, self.roles, pc1=pc1).figure

    def scatter(self) -> Figure:
        """The roles on PC1 and PC2."""
        return figures.scatter(self.default, self.roles).figure

    def blocks(self) -> Figure:
        """What is found at every block."""
        return figures.blocks(self.layers, self.target).figure

    def heat_map(self) -> Figure:
        """``correlations``."""
        return figures.correlations(self.layers, self.correlations()).figure

    def plot(self) -> Figure:
        """``strip``."""
        return self.strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likeness(Result):
    """How alike the characters of two models, or of two runs, are ordered."""

    first: str
    second: str
    shared: CountFrom0
    """Roles that both have."""
    positions: float
    """Rank correlation of their positions on each one's axis."""
    positions_ci95: Interval
    pc1: float
    """Of their places on each one's PC1."""
    pc1_ci95: Interval

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each measure."""
        return [
            {"measure": name, "correlation": value, "low": low, "high": high, "roles": self.shared}
            for name, value, (low, high) in (
                ("positions", self.positions, self.positions_ci95), ("pc1", self.pc1, self.pc1_ci95),
            )
        ]  # fmt: skip

    def table(self) -> str:
        """Both correlations."""
        rows = [("order of the roles", "rank correlation")]
        for row in self.to_rows():
            rows.append((row["measure"], f"{row['correlation']:.2f} ({row['low']:.2f} to {row['high']:.2f})"))
        return aligned(rows, note=f"{visible(self.first)} and {visible(self.second)}, {self.shared} roles of both")


def compare(first: AxisResult, second: AxisResult) -> Likeness:
    """How alike two results order the roles that both have. Raises ``UserError`` for fewer than 4."""
    one, other = ({place.name: place for place in result.roles} for result in (first, second))
    shared = [name for name in one if name in other and name != DEFAULT]
    if len(shared) < 4:
        raise UserError(f"the two results share {len(shared)} roles: at least 4 are needed to compare an order")
    sides = [[(table[name].position, table[name].pc1) for name in shared] for table in (one, other)]
    a, b = (np.asarray(side) for side in sides)
    positions, pc1 = (spearman(a[:, i], b[:, i]) for i in range(2))
    return Likeness(
        first=first.model, second=second.model, shared=len(shared),
        positions=positions, positions_ci95=spearman_interval(positions, len(shared)),
        pc1=pc1, pc1_ci95=spearman_interval(pc1, len(shared)),
    )  # fmt: skip
