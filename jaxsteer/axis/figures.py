"""The figures of a study of characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsteer.axis.places import Layer, Place, TraitPlace
from jaxsteer.display import ACCENT, BAND, INK, MUTED, OTHER, PAGE, Plot, in_style, panels, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

PALETTE = ("#1f6feb", "#c2571a", "#2f9e44", "#a855c7", "#b58a00", "#0d9aa8", "#e0437f", "#7a8494", "#a0694f", "#6b8e23")
"""One colour after the other for families of roles; they can be told from a white page and from a dark one."""
SHAPES = "os^D"
"""Markers: the next one when all colours are used."""
COLUMN, COLUMNS = 60, 3
"""Roles of a strip below each other before it has another column, and columns at most."""
LEVELS = 10
"""Shades of a heat map, for each sign."""


def _tip(place: Place) -> str:
    family = f", {place.family}" if place.family else ""
    return f"{place.name}{family}: position {place.interval()}, PC1 {place.pc1:.1f}, n = {place.rollouts}"


def _rows(default: Place, roles: Sequence[Place]) -> tuple[dict[str, object], ...]:
    return tuple(
        {"role": p.name, "family": p.family, "position": p.position, "low": p.ci95[0], "high": p.ci95[1],
         "pc1": p.pc1, "pc1_low": p.pc1_ci95[0], "pc1_high": p.pc1_ci95[1], "pc2": p.pc2, "rollouts": p.rollouts}
        for p in (default, *roles)
    )  # fmt: skip


def gids(default: Place, roles: Sequence[Place]) -> list[tuple[str, Place]]:
    """What the mark of each place is called in a figure: ``default``, and ``role-3`` for ``roles[3]``. The name that
    stands beside it is called ``name-default`` and ``name-role-3``."""
    return [("default", default), *((f"role-{i}", place) for i, place in enumerate(roles))]


def _label(gid: str, place: Place) -> str:
    return "the Assistant" if gid == "default" else short(place.name, 26)


@in_style
def strip(default: Place, roles: Sequence[Place], *, pc1: bool = False) -> Plot:
    """The roles along the axis (or PC1) with 95 % intervals over questions, the Assistant's end on top.

    Many roles stand in several columns, which go on below each other.
    """
    where = {place.name: (place.pc1, place.pc1_ci95) if pc1 else (place.position, place.ci95) for place in roles}
    at_default = (default.pc1, default.pc1_ci95) if pc1 else (default.position, default.ci95)
    ordered = sorted(gids(default, roles)[1:], key=lambda pair: -where[pair[1].name][0])
    ordered = [("default", default), *ordered]
    count = min(COLUMNS, math.ceil(len(ordered) / COLUMN))
    size = math.ceil(len(ordered) / count)
    figure, axes = panels(count, width=11.4 if count > 1 else 9.2, height=0.8 + 0.155 * size)
    ends = [end for _, ci95 in (*where.values(), at_default) for end in ci95]
    margin = 0.02 * (max(ends) - min(ends))
    tips = {}
    for column, axis in enumerate(axes):
        axis.axvspan(*at_default[1], color=BAND, zorder=0)
        axis.axvline(at_default[0], color=INK, linewidth=0.8, linestyle=":")
        axis.axvline(0, color=MUTED, linewidth=0.8)
        part = ordered[column * size : (column + 1) * size]
        for at, (gid, place) in enumerate(part):
            value, (low, high) = at_default if place is default else where[place.name]
            colour = INK if place is default else ACCENT if value > 0 else OTHER
            axis.plot(
                [low, value, high], [at, at, at], "-o", color=colour, linewidth=1.6, solid_capstyle="butt",
                markersize=3.6, markevery=[1], clip_on=False, gid=gid,
            )  # fmt: skip
            tips[gid] = _tip(place)
        axis.set_yticks(range(len(part)), [_label(gid, place) for gid, place in part], fontsize=7.5)
        for label, (gid, _) in zip(axis.get_yticklabels(), part, strict=True):
            label.set_gid(f"name-{gid}")
        axis.set_xlim(min(ends) - margin, max(ends) + margin)
        axis.set_ylim(size - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
    unit = "PC1, towards the Assistant (units of the stream)" if pc1 else "0 the mean of the roles, 1 the Assistant"
    figure.supxlabel(f"{unit}; 95 % intervals over questions; dotted: the Assistant", fontsize=9, color=MUTED)
    name, title = ("strip-pc1", "The roles along PC1") if pc1 else ("strip", "The roles along the assistant axis")
    return Plot(name=name, title=title, figure=figure, rows=_rows(default, roles), tips=tips)


@in_style
def scatter(default: Place, roles: Sequence[Place]) -> Plot:
    """The roles on PC1 and PC2, by family; those that stand free carry their name."""
    figure, (axis,) = panels(width=10.5, height=6.6)
    families = families_of(roles)
    style = {
        family: (PALETTE[i % len(PALETTE)], SHAPES[i // len(PALETTE) % len(SHAPES)])
        for i, family in enumerate(families)
    }
    tips = {}
    for gid, place in gids(default, roles):
        colour, shape, size = (INK, "*", 15.0) if place is default else (*style[place.family], 6.0)
        axis.plot(
            place.pc1, place.pc2, shape, markersize=size, color=colour, markeredgecolor=PAGE, markeredgewidth=0.6,
            clip_on=False, gid=gid,
        )  # fmt: skip
        tips[gid] = _tip(place)
    axis.set_xlabel("PC1 of the roles, towards the Assistant (units of the stream)")
    axis.set_ylabel("PC2")
    if len(families) > 1:
        _family_legend(figure, style)
    _name_points(figure, axis, gids(default, roles))
    title = "The roles on their first two principal components"
    return Plot(name="scatter", title=title, figure=figure, rows=_rows(default, roles), tips=tips)


def families_of(roles: Sequence[Place]) -> list[str]:
    """Their families in the order of colours; ``family-2`` is what the legend's entry of the third is called."""
    return sorted({place.family for place in roles})


def _family_legend(figure: Figure, style: Mapping[str, tuple[str, str]]) -> Legend:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], linestyle="", marker=shape, color=colour, markersize=6, label=short(family, 24) or "no family")
        for family, (colour, shape) in style.items()
    ]
    legend = figure.legend(handles=marks, loc="outside right upper", frameon=False, fontsize=9)
    for i, (handle, text) in enumerate(zip(legend.legend_handles, legend.get_texts(), strict=True)):
        assert handle is not None
        handle.set_gid(f"family-mark-{i}")
        text.set_gid(f"family-{i}")
    return legend


def _name_points(figure: Figure, axis: Axes, points: Sequence[tuple[str, Place]]) -> None:
    """Names beside points, the outermost first, where they cover no other name and no point."""
    figure.draw_without_rendering()  # settles the layout, so that places in the figure are known
    scale = 72 / figure.dpi
    spots = scale * axis.transData.transform([(place.pc1, place.pc2) for _, place in points])
    frame = axis.get_window_extent()
    (left, bottom), (right, top) = scale * np.asarray(frame.min), scale * np.asarray(frame.max)
    middle, taken = spots.mean(0), list[tuple[float, float, float, float]]()
    far = sorted(range(len(points)), key=lambda i: (i != 0, -float(((spots[i] - middle) ** 2).sum())))
    for i in far:
        gid, place = points[i]
        text = _label(gid, place)
        size, bold = (9.0, "bold") if gid == "default" else (7.5, "normal")
        wide, high, gap = 0.62 * size * len(text), 1.15 * size, 5.0 if i else 9.0
        x, y = map(float, spots[i])
        for dx, dy, align in ((gap, -high / 2, "left"), (-gap - wide, -high / 2, "right"), (-wide / 2, gap, "center"),
                              (-wide / 2, -gap - high, "center")):  # fmt: skip
            box = (x + dx, y + dy, x + dx + wide, y + dy + high)
            inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
            others = np.delete(spots, i, axis=0)
            over = ((others > (box[0] - 3, box[1] - 2)) & (others < (box[2] + 3, box[3] + 2))).all(1).any()
            if inside and not over and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                anchor = {"left": gap, "right": -gap, "center": 0.0}[align]
                axis.annotate(
                    text, (place.pc1, place.pc2), xytext=(anchor, dy + high / 2), textcoords="offset points", ha=align,
                    va="center", fontsize=size, fontweight=bold, color=INK, gid=f"name-{gid}",
                )  # fmt: skip
                break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@in_style
def blocks(layers: Sequence[Layer], target: str) -> Plot:
    """At every block: agreement of halves, the axis beside PC1 with its base rate, and the rating."""
    figure, (left, right) = panels(2, width=11, height=4.4)
    depth = [_depth(layer) for layer in layers]
    at = next(i for i, layer in enumerate(layers) if layer.site == target)
    dots: dict[str, Any] = {"marker": "o", "markersize": 3}
    left.plot(depth, [layer.halves for layer in layers], color=INK, label="axes of two halves (cosine)", **dots)
    left.plot(depth, [layer.order for layer in layers], color=ACCENT, label="order of two halves", **dots)
    left.plot(depth, [layer.shuffled_order for layer in layers], color=MUTED, linestyle=":", label="roles exchanged")
    if layers[0].rating is not None:
        rating = [float("nan") if layer.rating is None else layer.rating for layer in layers]
        left.plot(depth, rating, color=OTHER, label="order and rating by people", **dots)
    low, high = zip(*(layer.cosine_ci95 for layer in layers), strict=True)
    right.fill_between(depth, low, high, color=BAND)
    right.plot(depth, [layer.cosine for layer in layers], color=INK, label="cosine of axis and PC1", **dots)
    right.plot(
        depth, [layer.base_cosine for layer in layers], color=MUTED, linestyle=":", label="a role in its place (median)"
    )
    edge = [layer.edge for layer in layers]
    right.plot(depth, edge, color=ACCENT, label="the Assistant's distance from PC1's end", **dots)
    for axis in (left, right):
        axis.axvline(depth[at], color=MUTED, linewidth=0.8)
        axis.set_xlabel("block (vertical line: the target)")
        axis.locator_params(axis="x", integer=True)
        axis.set_ylim(top=1.02)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    rows = tuple(
        {name: getattr(layer, name) for name in (
            "site", "of_stream", "halves", "order", "shuffled_order", "other_order", "cosine", "scaled_cosine",
            "base_cosine", "base_share", "needed", "edge", "rating", "pc1_rating",
        )}
        for layer in layers
    )  # fmt: skip
    return Plot(name="blocks", title="The axis at every block", figure=figure, rows=rows)


def _depth(layer: Layer) -> int:
    return int(layer.site.split(".")[1])


@in_style
def correlations(layers: Sequence[Layer], values: np.ndarray) -> Plot:
    """A heat map of ``values`` [L, L]: correlation of the roles' places on PC1 between blocks.

    Cells of one shade are one shape, so that the map of a deep model stays small.
    """
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Shape

    figure, (axis,) = panels(width=6.6, height=5.2)
    depth, shades = [_depth(layer) for layer in layers], np.round(LEVELS * np.nan_to_num(values)).astype(int)
    for shade in np.unique(shades):
        boxes = []
        for row in range(len(shades)):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], shades[row] == shade, [0]])))
            for start, stop in edges.reshape(-1, 2):
                corners = [(start, row), (stop, row), (stop, row + 1), (start, row + 1), (start, row)]
                boxes.append(Shape(np.asarray(corners) - 0.5, closed=True))
        if shade:
            axis.add_patch(PathPatch(Shape.make_compound_path(*boxes), linewidth=0, **_shade(shade / LEVELS)))
    if len(layers) <= 12:
        for (row, column), value in np.ndenumerate(values):
            text = "" if np.isnan(value) else f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=INK)
    step = math.ceil(len(layers) / 16)
    shown = range(0, len(layers), step)
    axis.set_xticks(shown, [str(depth[i]) for i in shown])
    axis.set_yticks(shown, [str(depth[i]) for i in shown])
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.set_aspect("equal")
    axis.grid(visible=False)
    axis.set_xlabel("block")
    axis.set_ylabel("block")
    keys = [Patch(label=f"{level:+.1f}", **_shade(level)) for level in (1.0, 0.8, 0.6, 0.4, 0.2, -0.2, -0.6, -1.0)]
    figure.legend(handles=keys, loc="outside right upper", frameon=False, fontsize=8, title="correlation")
    rows = tuple(
        {"site": layer.site, "other": other.site, "correlation": float(values[i, j])}
        for i, layer in enumerate(layers)
        for j, other in enumerate(layers)
    )
    title = "Correlation of the roles' places on PC1 between blocks"
    return Plot(name="correlations", title=title, figure=figure, rows=rows)


def _shade(value: float) -> dict[str, Any]:
    return {"facecolor": ACCENT if value > 0 else OTHER, "alpha": abs(value) * 0.9}


@in_style
def traits(found: Sequence[TraitPlace]) -> Plot:
    """Cosine of each trait's direction with the axis, with its interval."""
    ordered = sorted(found, key=lambda trait: -trait.cosine)
    figure, (axis,) = panels(width=8, height=0.9 + 0.17 * len(ordered))
    tips = {}
    axis.axvline(0, color=MUTED, linewidth=0.8)
    for at, trait in enumerate(ordered):
        low, high = trait.ci95
        axis.plot(
            [low, trait.cosine, high], [at, at, at], "-o", color=ACCENT if trait.cosine > 0 else OTHER, markersize=4,
            linewidth=1.6, markevery=[1], gid=f"trait-{at}",
        )  # fmt: skip
        tips[f"trait-{at}"] = f"{trait.name}: {trait.cosine:+.2f} ({low:+.2f} to {high:+.2f})"
    axis.set_yticks(range(len(ordered)), [short(trait.name, 28) for trait in ordered], fontsize=8)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("cosine with the axis: what goes along with the Assistant is positive; 95 % intervals")
    rows = tuple(
        {"trait": t.name, "cosine": t.cosine, "low": t.ci95[0], "high": t.ci95[1], "of_stream": t.of_stream}
        for t in ordered
    )
    return Plot(name="traits", title="Traits beside the axis", figure=figure, rows=rows, tips=tips)
