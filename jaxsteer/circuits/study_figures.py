"""Figures of a study of circuits: patch maps, circuits beside random ones, freezing, sparse vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.study_result import CircuitStudy, PushStudy, Stays
from jaxsteer.display import ACCENT, BAND, INK, MUTED, OTHER, Plot, in_style, panels

COLOURS = {"gradient": ACCENT, "effect": OTHER, "magnitude": INK, "random": MUTED}


def figures(study: CircuitStudy) -> list[Plot]:
    """All of them; of several pushes each has its number in its name."""
    found = []
    for number, one in enumerate(study.pushes):
        found += [patch_map(one, number), circuit_curve(one, number), freezing(one, number)]
        if one.by_layer:
            found.append(layers(one, number))
        if one.sparsity:
            found.append(sparsity(one, number))
    return found


@in_style
def patch_map(one: PushStudy, number: int = 0) -> Plot:
    """Shares of the effect that heads and MLPs carry, beside those under the random push."""
    from matplotlib.colors import LinearSegmentedColormap

    heads, mlps = np.asarray(one.heads.shares), np.asarray(one.mlps.shares)
    both = [np.concatenate([heads, mlps], axis=1)]
    both.append(np.concatenate([np.asarray(one.heads.control), np.asarray(one.mlps.control)], axis=1))
    most = float(np.nanmax(np.abs(both[0]), initial=0.0)) or 1.0
    height = 1.3 + 0.24 * len(heads)
    figure, axes = panels(2, width=min(15.0, 3.6 + 0.62 * both[0].shape[1]), height=height, share_y=True)
    colours = LinearSegmentedColormap.from_list("shares", [OTHER, "#ffffff", ACCENT])
    names = [*map(str, range(heads.shape[1])), "MLP"]
    for axis, values, title in zip(axes, both, (one.name, "random push"), strict=True):
        image = axis.imshow(values, cmap=colours, vmin=-most, vmax=most, aspect="auto", origin="lower")
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_yticks(range(len(heads)), [str(layer) for layer in one.heads.layers], fontsize=7)
        axis.grid(visible=False)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head")
        if values.size <= 120:
            for (i, j), value in np.ndenumerate(values):
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color="#000000")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="share of the effect")
    rows = tuple(
        {"part": name, "share": share, "low": ci[0], "high": ci[1], "control": control}
        for grid in (one.heads, one.mlps)
        for name, share, ci, control in grid.cells()
    )
    return Plot(name=f"patched-{number}", title=f"What each head and MLP carries: {one.name}", figure=figure, rows=rows)


@in_style
def circuit_curve(one: PushStudy, number: int = 0) -> Plot:
    """Faithfulness against size, with the band of random circuits."""
    sizes = one.circuits.sizes
    figure, (axis,) = panels(width=7.2, height=3.8)
    x = [max(0.5, size.edges) for size in sizes]
    random = np.asarray([size.random for size in sizes])
    axis.fill_between(x, random[:, 0], random[:, 2], color=BAND, label="random circuits, 95 %")
    axis.plot(x, random[:, 1], color=MUTED, linewidth=1, label="their median")
    low, high = (np.asarray([size.ci95[i] for size in sizes]) for i in (0, 1))
    y = np.asarray([size.faithfulness for size in sizes])
    axis.errorbar(x, y, yerr=_bars(y, low, high), color=ACCENT, marker="o", markersize=4, label="circuit")
    axis.plot(x, [size.complement for size in sizes], color=OTHER, linestyle="--", marker=".", label="all other edges")
    axis.plot(x, [size.control for size in sizes], color=INK, linestyle=":", label="circuit of the random push")
    axis.axhline(1, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{size.edges:,}" for size in sizes])
    axis.set_xticks([], minor=True)
    axis.set_ylim(min(-0.3, float(y.min()) - 0.1), max(1.4, float(y.max()) + 0.1))
    axis.set_xlabel(f"edges, of {one.circuits.n_edges:,}")
    axis.set_ylabel("faithfulness")
    axis.legend(frameon=False, fontsize=8)
    rows = tuple(size.to_json() for size in sizes)
    return Plot(name=f"circuits-{number}", title=f"What circuits do: {one.name}", figure=figure, rows=rows)


@in_style
def freezing(one: PushStudy, number: int = 0) -> Plot:
    """What stays with parts frozen in all layers."""
    lines = [*one.frozen, *([one.ablated] if one.ablated else [])]
    figure, (axis,) = panels(width=7.2, height=0.9 + 0.34 * len(lines))
    for at, line in enumerate(lines):
        axis.plot([100 * end for end in line.ci95], [at, at], color=ACCENT, linewidth=2, solid_capstyle="butt")
        axis.plot(100 * line.share, at, "o", markersize=5, color=ACCENT)
        if line.control is not None:
            axis.plot(100 * line.control, at, "x", markersize=5, color=MUTED)
    axis.axvline(100, color=INK, linewidth=0.8)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(lines)), [line.what for line in lines])
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlabel("% of the effect that stays (cross: the random push, of the same effect)")
    rows = tuple(line.to_json() for line in lines)
    return Plot(name=f"frozen-{number}", title=f"What stays with parts frozen: {one.name}", figure=figure, rows=rows)


@in_style
def layers(one: PushStudy, number: int = 0) -> Plot:
    """What stays with one layer frozen."""
    figure, (axis,) = panels(width=7.2, height=3.4)
    whats: Sequence[str] = list(dict.fromkeys(line.what for line in one.by_layer))
    for what, colour in zip(whats, (MUTED, ACCENT, OTHER), strict=False):
        own: list[Stays] = [line for line in one.by_layer if line.what == what]
        x, y = [int(line.layers) for line in own], np.asarray([100 * line.share for line in own])
        low, high = (np.asarray([100 * line.ci95[i] for line in own]) for i in (0, 1))
        axis.errorbar(x, y, yerr=_bars(y, low, high), color=colour, marker="o", markersize=3, capsize=2, label=what)
    axis.axhline(100, color=INK, linewidth=0.8)
    axis.set_xlabel("frozen layer")
    axis.set_ylabel("% of the effect that stays")
    axis.legend(frameon=False, fontsize=8)
    rows = tuple(line.to_json() for line in one.by_layer)
    return Plot(name=f"layers-{number}", title=f"With one layer frozen: {one.name}", figure=figure, rows=rows)


@in_style
def sparsity(one: PushStudy, number: int = 0) -> Plot:
    """What sparse vectors keep of the effect."""
    figure, (axis,) = panels(width=6.8, height=3.6)
    for by in dict.fromkeys(level.by for level in one.sparsity):
        own = sorted((level for level in one.sparsity if level.by == by), key=lambda level: level.kept)
        x, y = [level.kept for level in own], np.asarray([100 * level.share for level in own])
        colour: Any = COLOURS.get(by, INK)
        if by == "random":
            ends = np.asarray([level.spread or level.ci95 for level in own]) * 100
            axis.fill_between(x, ends[:, 0], ends[:, 1], color=BAND)
        low, high = (np.asarray([100 * level.ci95[i] for level in own]) for i in (0, 1))
        axis.errorbar(x, y, yerr=_bars(y, low, high), color=colour, marker="o", markersize=3, capsize=2, label=by)
    axis.axhline(100, color=INK, linewidth=0.8)
    counts = sorted({level.kept for level in one.sparsity})
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(f"dimensions that are kept, of {one.dimensions}")
    axis.set_ylabel("% of the effect")
    axis.legend(frameon=False, fontsize=8)
    rows = tuple(level.to_json() for level in one.sparsity)
    return Plot(name=f"sparse-{number}", title=f"Effect of sparse vectors: {one.name}", figure=figure, rows=rows)


def _bars(
    values: Float[np.ndarray, " n"], low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]
) -> list[Float[np.ndarray, " n"]]:
    """Lengths of error bars; an interval may lie beside its value where few questions were drawn."""
    return [np.maximum(values - low, 0), np.maximum(high - values, 0)]
