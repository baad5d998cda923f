"""Sparse steering vectors: which of a vector's dimensions its effect needs (2604.08524).

With e_i the attribution of dimension i of the steered stream (summed over tokens, in the mean over readings) and s the
vector, "gradient" drops i if |e_i| / |e| < rho |s_i| / |s|: since e_i = g_i s_i, that is a threshold on the gradient.
"effect" keeps the largest |e_i|, "magnitude" the largest |s_i|, "random" any. What is kept is scaled to |s|.

Letters: D width, P levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxsteer.circuits.rows import Rows, check_answer, metric_of, on_devices
from jaxsteer.circuits.runs import score_rows
from jaxsteer.circuits.value_vectors import first_block
from jaxsteer.circuits.values import attribute_values
from jaxsteer.display import INK, Plot, aligned, in_style, panels, percent
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.sites import Site
from jaxsteer.objectives.reads import Objective
from jaxsteer.objectives.terms import check_choice
from jaxsteer.processes import to_host
from jaxsteer.runs.result import Result
from jaxsteer.steer.vectors import Vectors

By = Literal["gradient", "effect", "magnitude", "random"]
RHO = (0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5)
"""Thresholds of the paper."""


def dimension_effects(
    model: Model, rows: Rows, metric: Objective, vectors: Vectors, *, steps: int = 10
) -> Float[np.ndarray, " D"]:
    """The attribution of every dimension of the steered stream to the metric, along the coefficient (float64).

    Rows count by their number of readings. Raises ``UserError`` for vectors at several sites, or outside the stream.
    """
    site = _one_site(vectors)
    block = first_block(model, site)
    if block >= model.config.n_layers:
        raise UserError(f"{site} is behind the last block: there is nothing that reads the vector")
    before = Site(block, "hook_resid_pre").name
    found = attribute_values(
        model, rows, metric, vectors.edits(), before, start=block, steps=steps, rule="midpoint"
    )  # fmt: skip
    weights = rows.readings.sum(-1) / rows.readings.sum()
    return np.einsum("btd,b->d", found.scores(before).astype(np.float64), weights)


def kept_dimensions(
    vector: Float[np.ndarray, " D"],
    effects: Float[np.ndarray, " D"],
    by: str,
    *,
    keep: int | None = None,
    rho: float | None = None,
    seed: int = 0,
) -> Bool[np.ndarray, " D"]:
    """The dimensions that are kept: ``keep`` of them, or (by "gradient") those above the threshold ``rho``.

    Raises ``UserError`` for another ``by``, unless one of ``keep`` and ``rho`` is given, and where nothing is left.
    """
    check_choice("by", by, get_args(By))
    s, e = np.abs(np.asarray(vector, np.float64)), np.abs(np.asarray(effects, np.float64))
    if (keep is None) == (rho is None) or (rho is not None and by != "gradient"):
        raise UserError("give either how many dimensions to keep, or a threshold rho by 'gradient'")
    if rho is not None:
        kept = e / np.linalg.norm(e) >= rho * s / np.linalg.norm(s)
        if not (kept & (s > 0)).any():
            raise UserError(f"rho {rho} leaves no dimension of the vector: choose a smaller one")
        return kept
    if keep is None or not 1 <= keep <= len(s):
        raise UserError(f"keep must be a number of dimensions from 1 to {len(s)}, got {keep}")
    order = {
        "gradient": np.divide(e, s, out=np.zeros_like(e), where=s > 0),
        "effect": e,
        "magnitude": s,
        "random": np.random.default_rng(seed).random(len(s)),
    }[by]
    return np.isin(np.arange(len(s)), np.argsort(-order, kind="stable")[:keep])


def sparsified(vectors: Vectors, kept: Bool[np.ndarray, " D"]) -> Vectors:
    """The vectors with other dimensions set to 0, of the same length. Raises ``UserError`` where nothing is left."""
    site = _one_site(vectors)
    vector = vectors.arrays[site].astype(np.float64)
    rest = np.where(kept, vector, 0.0)
    if not rest.any():
        raise UserError("no dimension of the vector is left")
    scaled = (rest * np.linalg.norm(vector) / np.linalg.norm(rest)).astype(np.float32)
    metadata = {**vectors.metadata, "kept_dimensions": f"{int(np.count_nonzero(rest))} of {len(vector)}"}
    return dataclasses.replace(vectors, arrays={site: scaled}, metadata=metadata)


def overlap(first: Bool[np.ndarray, " D"], second: Bool[np.ndarray, " D"]) -> float:
    """Dimensions that both keep over those that either keeps."""
    return float((first & second).sum() / max(1, (first | second).sum()))


def _one_site(vectors: Vectors) -> str:
    if len(vectors.arrays) != 1 or vectors.operation != "add":
        raise UserError(
            f"a sparse vector is made of one that is added at one site; these are {vectors.operation} at "
            f"{len(vectors.arrays)} sites. Choose one with Vectors.at"
        )
    return vectors.sites[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level(Record):
    """One sparse vector."""

    by: str
    kept: int
    """Dimensions that are not 0."""
    metric: float
    share: float
    """Of the whole vector's effect on the metric."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityCurve(Result):
    """The effect of a vector against the number of dimensions that are kept."""

    model: str
    site: str
    dimensions: int
    base: float
    """The metric without steering, in the mean over readings."""
    whole: float
    """With the whole vector."""
    levels: tuple[Level, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every sparse vector."""
        return [level.to_json() for level in self.levels]

    def table(self) -> str:
        """A line for every number of dimensions, a column for every way to choose them."""
        ways = list(dict.fromkeys(level.by for level in self.levels))
        found = {(level.by, level.kept): level.share for level in self.levels}
        counts = sorted({level.kept for level in self.levels}, reverse=True)
        lines = [
            [str(n), percent(1 - n / self.dimensions), *(percent(found.get((w, n))) for w in ways)] for n in counts
        ]
        return aligned(
            [["kept", "zeros", *ways], *lines],
            left=(),
            note=f"Share of the effect of the vector at {self.site} of {self.model}: the metric goes from "
            f"{self.base:.4f} to {self.whole:.4f}.",
        )

    def plot(self) -> Plot:
        """The shares against the number of dimensions."""
        return _drawn(self)


@in_style
def _drawn(found: SparsityCurve) -> Plot:
    figure, (axis,) = panels(width=6.4, height=3.6)
    for by in dict.fromkeys(level.by for level in found.levels):
        own = sorted((level for level in found.levels if level.by == by), key=lambda level: level.kept)
        axis.plot(
            [level.kept for level in own], [100 * level.share for level in own], marker="o", markersize=3, label=by
        )
    axis.axhline(100, color=INK, linewidth=0.8)
    counts = sorted({level.kept for level in found.levels})
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("dimensions that are kept")
    axis.set_ylabel("% of the effect")
    axis.legend(frameon=False, fontsize=8)
    return Plot(name="sparsity", title="Effect of sparse vectors", figure=figure, rows=tuple(found.to_rows()))


def sparsity_curve(
    model: Model,
    rows: Rows,
    metric: Objective,
    vectors: Vectors,
    keep: Sequence[int],
    *,
    by: Sequence[str] = get_args(By),
    effects: Float[np.ndarray, " D"] | None = None,
    seed: int = 0,
) -> SparsityCurve:
    """The metric under sparse vectors of ``keep`` dimensions, chosen in each way of ``by``.

    ``effects`` are those of ``dimension_effects``, which are measured on ``rows`` unless they come from others (better:
    what is chosen on some texts is measured on others). Errors as ``kept_dimensions``.
    """
    site = _one_site(vectors)
    pytree, found = metric_of(metric, model.config)
    check_answer(found, rows)
    if effects is None:
        effects = dimension_effects(model, rows, metric, vectors)
    spread, weights = on_devices(model, rows), rows.readings.sum(-1) / rows.readings.sum()

    def score(edits: Any) -> float:
        edits = jax.tree.map(np.asarray, edits)
        scores = to_host(score_rows(model.params, model.config, spread, edits, pytree, needs=found))
        return float(scores.astype(np.float64) @ weights)

    base, whole = score(None), score(vectors.edits())
    if base == whole:
        raise UserError("the vector does not change the metric at all: there is no effect to keep")
    levels = []
    for way in by:
        for count in keep:
            kept = kept_dimensions(vectors.arrays[site], effects, way, keep=count, seed=seed)
            value = score(sparsified(vectors, kept).edits())
            share = (value - base) / (whole - base)
            levels.append(Level(by=way, kept=int(count), metric=value, share=share))
    return SparsityCurve(
        model=model.name, site=site, dimensions=len(effects), base=base, whole=whole, levels=tuple(levels)
    )
