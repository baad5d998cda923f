"""Drift: where conversations go along an axis, turn by turn, and by how much kinds of conversation differ in it.

The unit of every interval is the conversation. Two controls stand beside a slope: that of random directions, which says
how far anything moves, and that of the same turns in another order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxsteer.axis.movers import Movers, find_movers
from jaxsteer.axis.projection import along, axis_sites, calibration, encoded, scale, units
from jaxsteer.display import ACCENT, MUTED, OTHER, aligned, decimals, in_style, panels, short, visible, wrapped
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.personas.passages import Passage
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.runs.result import Result
from jaxsteer.statistics import rate_interval, student, welch
from jaxsteer.steer.vectors import Vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILE = 25.0
"""Of the default's rollouts: a turn below it has drifted."""
RANDOM, SHUFFLES = 8, 2000
"""Random directions, and orders of the turns, that a slope is compared with."""
SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slope(Record):
    """Change along the axis per assistant turn."""

    value: float
    """Mean over conversations of the least-squares slope, in units of the stream per turn."""
    ci95: Interval | None
    """Student's, over conversations; None for one."""

    @classmethod
    def of(cls, slopes: Sequence[float] | np.ndarray) -> Slope:
        """The mean of the slopes of several conversations."""
        return cls(value=float(np.mean(slopes)), ci95=student(slopes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory(Record):
    """One conversation on the axis."""

    id: str
    domain: str
    turns: tuple[int, ...]
    """Numbers of the messages that were read, those of the assistant."""
    along: tuple[float, ...]
    """Mean projection over the content tokens of each, in units of the stream."""
    slope: float | None
    """Least squares, per assistant turn; None for a single turn."""
    below: tuple[int, ...]
    """Numbers of the messages that lie below the threshold."""
    texts: tuple[str, ...]
    """How the turns begin."""

    def by_turn(self) -> dict[int, float]:
        """The projections by the number of the message."""
        return dict(zip(self.turns, self.along, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain(Record):
    """The conversations of one kind. Every interval is over conversations."""

    name: str
    conversations: CountFrom0
    level: float
    """Mean over conversations of their mean projection."""
    level_ci95: Interval | None
    first: float
    """Mean projection of the first turn."""
    last: float
    """And of the last."""
    slope: Slope | None
    """None where all conversations have a single turn."""
    below: Share
    """Share of turns below the threshold."""
    below_ci95: Interval
    drifted: Share
    """Share of conversations that end below it."""
    random_slopes: tuple[float, ...] = ()
    """The same conversations along random directions."""
    shuffled_p: Share | None = None
    """Share of orders of the turns (the same for no conversation) whose mean slope is at least as steep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Record):
    """Two domains: the first minus the second, with Welch's intervals over conversations."""

    first: str
    second: str
    level: float
    level_ci95: Interval | None
    slope: float | None
    slope_ci95: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift(Result):
    """Conversations on an axis, turn by turn."""

    model: str
    axis: str
    """What going along it means."""
    site: str
    threshold: float
    """A turn below it has drifted; in units of the stream."""
    percentile: float
    calibrated_on: str
    """What the threshold is the percentile of."""
    roles: float | None = None
    """Projection of the mean of the roles, where the axis says it: position 0."""
    default: float | None = None
    """Of the default: position 1."""
    domains: tuple[Domain, ...]
    contrasts: tuple[Contrast, ...]
    conversations: tuple[Trajectory, ...]
    movers: Movers | None = None
    """Which user messages move it; None where there are too few of them to tell."""

    def position(self, value: float) -> float | None:
        """A projection from 0, the mean of the roles, to 1, the default."""
        if self.roles is None or self.default is None:
            return None
        return (value - self.roles) / (self.default - self.roles)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per turn."""
        return [
            {
                "id": one.id, "domain": one.domain, "turn": number, "message": turn, "along": value,
                "position": self.position(value), "below": turn in one.below, "text": text,
            }
            for one in self.conversations
            for number, (turn, value, text) in enumerate(zip(one.turns, one.along, one.texts, strict=True), 1)
        ]  # fmt: skip

    def table(self) -> str:
        """The domains, how they differ, and what moves conversations."""
        head = (
            f"Drift of {visible(self.model)} along the axis at {self.site}: {len(self.conversations)} conversations, "
            f"{sum(len(one.turns) for one in self.conversations)} turns. Below {self.threshold:.4g} a turn has drifted "
            f"(percentile {self.percentile:g} of {self.calibrated_on})."
        )
        rows: list[tuple[str, ...]] = [
            ("domain", "n", "first", "last", "slope per turn", "random", "shuffled p", "turns below", "end below")
        ]
        for one in self.domains:
            random = f"±{max(map(abs, one.random_slopes)):.3g}" if one.random_slopes else "–"
            low, high = (f"{100 * end:.0f}" for end in one.below_ci95)
            ends = [
                decimals(self.position(end)) if self.roles is not None else f"{end:.4g}"
                for end in (one.first, one.last)
            ]
            below = f"{100 * one.below:.0f} % ({low}–{high})"
            rows.append(
                (one.name, str(one.conversations), *ends, self._slope(one), random, decimals(one.shuffled_p, 3), below,
                 f"{100 * one.drifted:.0f} %")
            )  # fmt: skip
        unit = "units of the stream" if self.roles is None else "positions (0 the mean of the roles, 1 the default)"
        note = (
            f"first and last turn in {unit}; slope in units of the stream with its interval over conversations; "
            "random: the steepest of the same conversations along random directions; shuffled p: share of orders of "
            "the turns that are as steep."
        )
        parts = [wrapped(head), aligned(rows, note=note)]
        if self.contrasts:
            table = [("difference", "level", "slope")]
            for c in self.contrasts:
                table.append((f"{c.first} - {c.second}", _with(c.level, c.level_ci95), _with(c.slope, c.slope_ci95)))
            parts.append(aligned(table, note="Welch's intervals over conversations; in units of the stream."))
        if self.movers is not None:
            parts.append(self.movers.table())
        return "\n\n".join(parts)

    def _place(self, value: float) -> str:
        return f"{value:.4g}" if self.roles is None else decimals(self.position(value))

    def _slope(self, one: Domain) -> str:
        return "–" if one.slope is None else _with(one.slope.value, one.slope.ci95)

    @in_style
    def plot(self) -> Figure:
        """Every conversation as a thin line, the mean of each domain as a thick one with its interval, the threshold, 0
        and 1."""
        figure, axes = panels(len(self.domains), width=max(5.0, 3.2 * len(self.domains)), height=3.4, share_y=True)
        for axis, domain in zip(axes, self.domains, strict=True):
            own = [one.along for one in self.conversations if one.domain == domain.name]
            for values in own:
                axis.plot(range(1, len(values) + 1), values, color=MUTED, linewidth=0.8, alpha=0.6)
            longest = max(map(len, own))
            turns = [[values[i] for values in own if len(values) > i] for i in range(longest)]
            mean = [float(np.mean(values)) for values in turns]
            low, high = zip(*(student(v) or (m, m) for v, m in zip(turns, mean, strict=True)), strict=True)
            axis.fill_between(range(1, longest + 1), low, high, color=ACCENT, alpha=0.18, linewidth=0)
            axis.plot(range(1, longest + 1), mean, color=ACCENT, linewidth=2, marker="o", markersize=3)
            axis.axhline(self.threshold, color=OTHER, linewidth=1, linestyle="--")
            for name, end in (("roles", self.roles), ("default", self.default)):
                if end is not None:
                    axis.axhline(end, color=MUTED, linewidth=0.8)
                    above = (name == "default") == ((self.default or 0.0) >= (self.roles or 0.0))
                    place = "bottom" if above else "top"
                    axis.annotate(name, (longest, end), color=MUTED, fontsize=8, ha="right", va=place)
            axis.set_title(short(domain.name, 40), fontsize=10)
            axis.set_xlabel("assistant turn")
            axis.locator_params(axis="x", integer=True)
        axes[0].set_ylabel("along the axis")
        known = [*(value for one in self.conversations for value in one.along), self.threshold]
        known += [end for end in (self.roles, self.default) if end is not None]
        margin = 0.1 * (max(known) - min(known))
        axes[0].set_ylim(min(known) - margin, max(known) + margin)  # an interval of few conversations may be wider
        return figure


def drift_of(
    model: Model,
    axis: Vectors,
    passages: Sequence[Passage],
    *,
    site: str = "",
    percentile: float = PERCENTILE,
    calibrate_on: Sequence[Passage] = (),
    embed_at: str = "",
    any_weights: bool = False,
) -> Drift:
    """Where conversations go along ``axis`` at a ``site`` (default: as ``axis_sites``), by their group, the domain.

    The threshold is a ``percentile`` of projections: of the turns of ``calibrate_on``, where these are given, else of
    the default's rollouts as the axis file says. Those have one turn: what a model does in later turns of ordinary
    conversations counts as drift, unless it is calibrated on such. ``embed_at`` is where user messages are
    read to predict what follows (default: the axis' site). Raises ``UserError`` without a calibration, and as
    ``project`` does. Many parameters: the axis, the conversations, and how each is read.
    """
    (name,) = axis_sites(axis, model, site, any_weights=any_weights)
    if calibrate_on:
        ordinary = np.concatenate([values[0] for _, values in _values(model, axis, calibrate_on, name)])
        threshold, source = float(np.percentile(ordinary, percentile)), f"{len(ordinary)} turns that were given"
    else:
        known = calibration(axis, name)
        if percentile not in known:
            there = ", ".join(f"{p:g}" for p in known) or "none"
            raise UserError(
                f"the axis file holds no percentile {percentile:g} of the default's projections at {name} (there: "
                f"{there}): give conversations of the model as it is to calibrate on"
            )
        threshold, source = known[percentile], "the default's rollouts"
    read = _values(model, axis, passages, name)
    paths = tuple(_trajectory(p, turns, v[0], threshold) for p, (turns, v) in zip(passages, read, strict=True))
    of: dict[str, list[int]] = {}
    for i, one in enumerate(paths):
        of.setdefault(one.domain, []).append(i)
    levels = {domain: [float(np.mean(paths[i].along)) for i in own] for domain, own in of.items()}
    slopes = {domain: [s for i in own if (s := paths[i].slope) is not None] for domain, own in of.items()}
    zero, one_ = scale(axis, name) or (None, None)
    return Drift(
        model=model.name, axis=axis.sign, site=name, threshold=threshold, percentile=percentile, calibrated_on=source,
        roles=zero, default=one_,
        domains=tuple(_domain(d, [paths[i] for i in own], [read[i][1] for i in own]) for d, own in of.items()),
        contrasts=tuple(_contrast(a, b, levels, slopes) for a, b in itertools.combinations(of, 2)),
        conversations=paths,
        movers=find_movers(model, passages, [one.by_turn() for one in paths], embed_at or name),
    )  # fmt: skip


def _values(
    model: Model, axis: Vectors, passages: Sequence[Passage], site: str
) -> list[tuple[list[int], Float[np.ndarray, "k turns"]]]:
    """Numbers of the assistant's turns, and their mean projections on the axis and on random directions of norm 1."""
    own = units(axis, [site])
    random = np.random.default_rng(SEED).standard_normal((RANDOM, own.shape[-1]))
    vectors = np.concatenate([own, random / np.linalg.norm(random, axis=-1, keepdims=True)])[None].astype(np.float32)
    rows = encoded(model, passages)
    found = along(model, [ids for ids, _ in rows], vectors, [site])
    return [
        ([span.turn for span in spans], np.stack([values[0][:, span.mask].mean(-1) for span in spans], axis=-1))
        for (_, spans), values in zip(rows, found, strict=True)
    ]


def whole_projections(
    model: Model, axis: Vectors, passages: Sequence[Passage], sites: Sequence[str]
) -> Float[np.ndarray, "s n"]:
    """Mean projection of each passage over all its assistant's content tokens, at several sites."""
    rows = encoded(model, passages)
    found = along(model, [ids for ids, _ in rows], units(axis, sites)[:, None], sites)
    masks = [np.logical_or.reduce([span.mask for span in spans]) for _, spans in rows]
    return np.stack([values[:, 0][:, mask].mean(-1) for values, mask in zip(found, masks, strict=True)], axis=-1)


def _trajectory(passage: Passage, turns: Sequence[int], values: np.ndarray, threshold: float) -> Trajectory:
    texts = [m["content"] for m in passage.messages] or [passage.text]
    return Trajectory(
        id=passage.id,
        domain=passage.group or "conversations",
        turns=tuple(turns),
        along=tuple(map(float, values)),
        slope=float(_weights(len(values)) @ values) if len(values) > 1 else None,
        below=tuple(turn for turn, value in zip(turns, values, strict=True) if value < threshold),
        texts=tuple(short(texts[turn], 120) for turn in turns),
    )


def _weights(turns: int) -> np.ndarray:
    """What the values of turns are multiplied with to give their least-squares slope."""
    centred = np.arange(turns) - (turns - 1) / 2
    weights: np.ndarray = centred / (centred @ centred)
    return weights


def _domain(name: str, own: Sequence[Trajectory], values: Sequence[np.ndarray]) -> Domain:
    below = np.concatenate([[turn in one.below for turn in one.turns] for one in own])
    groups = [one.id for one in own for _ in one.turns]
    several = [v for v in values if v.shape[1] > 1]
    slopes = np.asarray([_weights(v.shape[1]) @ v.T for v in several])  # [conversations, axis and random directions]
    levels = [float(np.mean(one.along)) for one in own]
    return Domain(
        name=name, conversations=len(own), level=float(np.mean(levels)), level_ci95=student(levels),
        first=float(np.mean([one.along[0] for one in own])), last=float(np.mean([one.along[-1] for one in own])),
        slope=Slope.of(slopes[:, 0]) if several else None,
        below=float(below.mean()), below_ci95=rate_interval(below, groups),
        drifted=float(np.mean([one.turns[-1] in one.below for one in own])),
        random_slopes=tuple(map(float, slopes[:, 1:].mean(0))) if several else (),
        shuffled_p=_shuffled([v[0] for v in several], float(slopes[:, 0].mean())) if several else None,
    )  # fmt: skip


def _shuffled(values: Sequence[np.ndarray], slope: float) -> float:
    """Share of random orders of the turns, one order for each conversation, whose mean slope is as steep."""
    rng = np.random.default_rng(SEED)
    drawn = [rng.permuted(np.tile(v, (SHUFFLES, 1)), axis=1) @ _weights(len(v)) for v in values]
    return float((1 + (np.abs(np.mean(drawn, axis=0)) >= abs(slope) - 1e-12).sum()) / (1 + SHUFFLES))


def _contrast(
    first: str, second: str, levels: Mapping[str, Sequence[float]], slopes: Mapping[str, Sequence[float]]
) -> Contrast:
    level, level_ci95 = welch(levels[first], levels[second])
    slope, slope_ci95 = welch(slopes[first], slopes[second])
    assert level is not None
    return Contrast(first=first, second=second, level=level, level_ci95=level_ci95, slope=slope, slope_ci95=slope_ci95)


def _with(value: float | None, ci95: Interval | None) -> str:
    """A number of the stream with its interval."""
    if value is None:
        return "–"
    return f"{value:+.3g}" + ("" if ci95 is None else f" ({ci95[0]:+.3g} to {ci95[1]:+.3g})")
