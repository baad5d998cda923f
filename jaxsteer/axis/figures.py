"""The figures of a study of characters."""

from __future__ import annotations

from collections.abc import Sequence

from jaxsteer.axis.places import Layer, Place
from jaxsteer.display import ACCENT, BAND, INK, MUTED, OTHER, Plot, in_style, panels, short

PALETTE = ("#1f6feb", "#c2571a", "#2e7d32", "#8e44ad", "#b8860b", "#00838f", "#c2185b", "#5d6675", "#6d4c41", "#455a64")
"""One colour after the other for families of roles."""
LABELLED = 40
"""Roles of a scatter plot that carry their name: the outermost."""


def _tip(place: Place) -> str:
    family = f", {place.family}" if place.family else ""
    return f"{place.name}{family}: position {place.interval()}, PC1 {place.pc1:.1f}, n = {place.rollouts}"


def _rows(default: Place, roles: Sequence[Place]) -> tuple[dict[str, object], ...]:
    return tuple(
        {"role": p.name, "family": p.family, "position": p.position, "low": p.ci95[0], "high": p.ci95[1],
         "pc1": p.pc1, "pc1_low": p.pc1_ci95[0], "pc1_high": p.pc1_ci95[1], "pc2": p.pc2, "rollouts": p.rollouts}
        for p in (default, *roles)
    )  # fmt: skip


@in_style
def strip(default: Place, roles: Sequence[Place]) -> Plot:
    """The roles along the axis with 95 % intervals over questions, the Assistant's end on top."""
    figure, (axis,) = panels(width=9.2, height=0.8 + 0.155 * (len(roles) + 1))
    ordered = [default, *sorted(roles, key=lambda place: -place.position)]
    tips = {}
    axis.axvspan(*default.ci95, color=BAND, zorder=0)
    for at, place in enumerate(ordered):
        colour = INK if place is default else ACCENT if place.position > 0 else OTHER
        axis.plot(place.ci95, [at, at], color=colour, linewidth=1.6, solid_capstyle="butt")
        axis.plot(place.position, at, "o", markersize=3.6, color=colour, gid=f"strip-{at}")
        tips[f"strip-{at}"] = _tip(place)
    axis.axvline(0, color=MUTED, linewidth=0.8)
    axis.set_yticks(range(len(ordered)), [short(place.name, 28) for place in ordered], fontsize=7.5)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("position on the axis: 0 the mean of the roles, 1 the Assistant; 95 % intervals over questions")
    title = "The roles along the assistant axis"
    return Plot(name="strip", title=title, figure=figure, rows=_rows(default, roles), tips=tips)


@in_style
def scatter(default: Place, roles: Sequence[Place]) -> Plot:
    """The roles on PC1 and PC2, coloured by family."""
    figure, (axis,) = panels(width=9.2, height=6.4)
    families = list(dict.fromkeys(place.family for place in roles))
    colours = {family: PALETTE[i % len(PALETTE)] for i, family in enumerate(families)}
    far = sorted(roles, key=lambda place: -(place.pc1**2 + place.pc2**2))[:LABELLED]
    tips = {}
    for at, place in enumerate(roles):
        axis.plot(place.pc1, place.pc2, "o", markersize=5, color=colours[place.family], alpha=0.8, gid=f"scatter-{at}")
        tips[f"scatter-{at}"] = _tip(place)
        if place in far:
            axis.annotate(
                short(place.name, 24), (place.pc1, place.pc2), xytext=(4, 3), textcoords="offset points", fontsize=7,
                color=MUTED,
            )  # fmt: skip
    axis.plot(default.pc1, default.pc2, "*", markersize=14, color=INK, gid="scatter-default")
    tips["scatter-default"] = _tip(default)
    axis.annotate("the Assistant", (default.pc1, default.pc2), xytext=(7, 5), textcoords="offset points", color=INK)
    axis.set_xlabel("PC1 of the roles, towards the Assistant (units of the stream)")
    axis.set_ylabel("PC2")
    title = "The roles on their first two principal components"
    return Plot(name="scatter", title=title, figure=figure, rows=_rows(default, roles), tips=tips)


@in_style
def blocks(layers: Sequence[Layer], target: str) -> Plot:
    """At every block: agreement of halves, the axis beside PC1 with its base rate, and the rating."""
    figure, (left, right) = panels(2, width=11, height=4)
    depth = [int(layer.site.split(".")[1]) for layer in layers]
    at = next(i for i, layer in enumerate(layers) if layer.site == target)
    left.plot(depth, [layer.halves for layer in layers], color=INK, label="axes of two halves (cosine)")
    left.plot(depth, [layer.order for layer in layers], color=ACCENT, label="order of two halves")
    left.plot(depth, [layer.shuffled_order for layer in layers], color=MUTED, linestyle=":", label="roles exchanged")
    if layers[0].rating is not None:
        rating = [float("nan") if layer.rating is None else layer.rating for layer in layers]
        left.plot(depth, rating, color=OTHER, label="order and rating by people")
    low, high = zip(*(layer.cosine_ci95 for layer in layers), strict=True)
    right.fill_between(depth, low, high, color=BAND)
    right.plot(depth, [layer.cosine for layer in layers], color=INK, label="cosine of axis and PC1")
    right.plot(
        depth, [layer.base_cosine for layer in layers], color=MUTED, linestyle=":", label="a role in its place (median)"
    )
    right.plot(depth, [layer.edge for layer in layers], color=ACCENT, label="the Assistant's distance from PC1's end")
    for axis in (left, right):
        axis.axvline(depth[at], color=MUTED, linewidth=0.8)
        axis.set_xlabel("block (vertical line: the target)")
        axis.legend(frameon=False, fontsize=8)
        axis.set_ylim(top=1.02)
    rows = tuple(
        {name: getattr(layer, name) for name in (
            "site", "of_stream", "halves", "order", "shuffled_order", "other_order", "cosine", "scaled_cosine",
            "base_cosine", "base_share", "needed", "edge", "rating", "pc1_rating",
        )}
        for layer in layers
    )  # fmt: skip
    return Plot(name="blocks", title="The axis at every block", figure=figure, rows=rows)
