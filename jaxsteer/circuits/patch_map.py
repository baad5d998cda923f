"""What a sweep of patches found, as an object with named axes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.display import OTHER, Plot, aligned, decimals, in_style, panels
from jaxsteer.errors import UserError
from jaxsteer.runs.result import Result

SHOWN = 12
"""Patches that the table lists: those of the largest effects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchMap(Result):
    """Effects of patches on a metric: the metric with the patch minus the metric without it."""

    model: str
    kind: str
    """The kind of site."""
    source: str
    """Where the values came from."""
    axes: tuple[str, ...]
    """Names of the axes of ``effects``: "row", "layer", and "position", "head" if they were patched one by one."""
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None = None
    """None: all of them together."""
    heads: tuple[int, ...] | None = None
    shape: tuple[int, ...]
    values: tuple[float, ...]
    """The effects, flat; NaN at positions behind a row's end."""
    base: tuple[float, ...]
    """The metric of every row without a patch."""
    other: tuple[float, ...]
    """That of the run that the values came from; NaN where it was none."""

    @property
    def effects(self) -> Float[np.ndarray, "row layer ..."]:
        """The effects, with the axes of ``axes``."""
        return np.asarray(self.values, np.float32).reshape(self.shape)

    def mean(self) -> Float[np.ndarray, "layer ..."]:
        """Effects in the mean over the rows that have them; NaN where none has."""
        counted = np.isfinite(self.effects)
        total, count = np.where(counted, self.effects, 0).sum(0, dtype=np.float64), counted.sum(0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    @property
    def _places(self) -> list[tuple[str, tuple[int, ...]]]:
        """Axes behind that of the rows, with what stands along them."""
        along = {"layer": self.layers, "position": self.positions or (), "head": self.heads or ()}
        return [(name, along[name]) for name in self.axes[1:]]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every row and patch that there is."""
        names = [name for name, _ in self._places]
        places = list(itertools.product(range(self.shape[0]), *(values for _, values in self._places)))
        return [
            {"row": row, **dict(zip(names, place)), "effect": effect, "metric": self.base[row] + effect}
            for (row, *place), effect in zip(places, self.values, strict=True)
            if effect == effect
        ]

    def table(self) -> str:
        """The largest effects, in the mean over rows."""
        means = self.mean()
        order = [i for i in np.argsort(-np.abs(means), axis=None) if means.flat[i] == means.flat[i]][:SHOWN]
        places = list(itertools.product(*(values for _, values in self._places)))
        lines = [[*map(str, places[i]), decimals(float(means.flat[i]), 4)] for i in order]
        other = float(np.mean(self.other))
        return aligned(
            [[*(name for name, _ in self._places), "effect"], *lines],
            left=(),
            note=f"{self.kind} of {self.model}, patched from {self.source}; the metric is {np.mean(self.base):.4f} "
            f"without" + (f", {other:.4f} in the source" if other == other else "") + f", in the mean over "
            f"{self.shape[0]} rows.",
        )

    def heat_map(self, *, head: int | None = None, labels: Sequence[str] = ()) -> Plot:
        """Mean effects over layers and positions, or layers and heads; ``labels`` are texts of the positions.

        Of a sweep over both, ``head`` chooses one. Raises ``UserError`` where it is missing.
        """
        means, names = self.mean(), [name for name, _ in self._places]
        if len(names) == 3:
            if self.heads is None or head not in self.heads:
                raise UserError(f"the sweep has positions and heads: choose one of the heads {self.heads} to draw")
            means, names = means[:, :, self.heads.index(head)], names[:2]
        if means.ndim == 1:
            means, names = means[:, None], [*names, "all"]
        across = dict(self._places).get(names[1], (0,))
        return _drawn(self, means, names[1], across, labels)


@in_style
def _drawn(
    found: PatchMap, means: Float[np.ndarray, "layer across"], name: str, across: tuple[int, ...], labels: Sequence[str]
) -> Plot:
    from matplotlib.colors import LinearSegmentedColormap

    figure, (axis,) = panels(width=min(14.0, 2.4 + 0.32 * means.shape[1]), height=1.4 + 0.26 * means.shape[0])
    most = float(np.nanmax(np.abs(means), initial=0.0)) or 1.0
    colours = LinearSegmentedColormap.from_list("effects", [OTHER, "#ffffff", "#1f6feb"])
    image = axis.imshow(means, cmap=colours, vmin=-most, vmax=most, aspect="auto", origin="lower")
    axis.set_yticks(range(len(found.layers)), [str(layer) for layer in found.layers], fontsize=7)
    texts = list(labels) or [str(number) for number in across]
    axis.set_xticks(range(len(across)), texts[: len(across)], rotation=90 if labels else 0, fontsize=7)
    axis.grid(visible=False)
    axis.set_ylabel("layer")
    axis.set_xlabel(name)
    figure.colorbar(image, ax=axis, label="effect")
    rows = tuple(
        {"layer": layer, name: number, "effect": float(means[i, j])}
        for i, layer in enumerate(found.layers)
        for j, number in enumerate(across)
    )
    title = f"Effects of patching {found.kind} from {found.source}"
    return Plot(name=f"patch-{found.kind.replace('.', '-')}", title=title, figure=figure, rows=rows)
