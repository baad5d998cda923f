"""How much of steering's effect stays while parts are frozen, part by part and layer by layer.

Every part and layer is a pair of rows of one program.

Letters: B rows, F freezings, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.freezing import FREEZES, Frozen, kinds_of
from jaxsteer.circuits.rows import Rows, check_answer, check_lengths, metric_of, on_devices
from jaxsteer.circuits.runs import score_rows
from jaxsteer.display import INK, Plot, aligned, in_style, panels, percent
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention, checked
from jaxsteer.objectives.reads import Objective
from jaxsteer.processes import to_host
from jaxsteer.runs.result import Result
from jaxsteer.statistics import bootstrap
from jaxsteer.steer.completions import room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Freezing(Record):
    """One freezing."""

    what: str
    """A name of ``FREEZES``, or a kind of site."""
    layers: tuple[int, ...]
    scores: tuple[float, ...]
    """The metric of every row."""
    share: float
    """Of the whole effect, what stays: sum of the effects of all rows over the sum of the effects without freezing."""
    ci95: tuple[float, float]
    """Bootstrap over rows, or groups of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeTable(Result):
    """What stays of an effect with parts frozen."""

    model: str
    steered_by: str
    base: tuple[float, ...]
    """The metric of every row without steering."""
    steered: tuple[float, ...]
    """With it, nothing frozen."""
    whole: tuple[Freezing, ...]
    """Frozen in all layers that were asked for."""
    by_layer: tuple[Freezing, ...] = ()
    """In one layer each."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every freezing."""
        return [
            {"frozen": f.what, "layers": _layers(f.layers), "share": f.share, "low": f.ci95[0], "high": f.ci95[1],
             "metric": float(np.mean(f.scores))}
            for f in (*self.whole, *self.by_layer)
        ]  # fmt: skip

    def table(self) -> str:
        """The shares that stay."""
        lines = [
            [row["frozen"], row["layers"], percent(row["share"]), f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
             f"{row['metric']:.3f}"]
            for row in self.to_rows()
        ]  # fmt: skip
        return aligned(
            [["frozen", "layers", "stays", "95 %", "metric"], *lines],
            left=(0, 1),
            note=f"The metric goes from {np.mean(self.base):.3f} to {np.mean(self.steered):.3f} in the mean of "
            f"{len(self.base)} rows, by {self.steered_by} in {self.model}. 'stays' is the share of that change that is "
            f"left; intervals by resampling rows.",
        )

    def plot(self) -> Plot:
        """Shares layer by layer. Raises ``UserError`` for a table without them."""
        if not self.by_layer:
            raise UserError("nothing was frozen layer by layer: call freeze_table with by_layer=True")
        return _drawn(self)


@in_style
def _drawn(found: FreezeTable) -> Plot:
    figure, (axis,) = panels(width=7.2, height=3.6)
    for what in dict.fromkeys(f.what for f in found.by_layer):
        own = [f for f in found.by_layer if f.what == what]
        axis.plot([f.layers[0] for f in own], [100 * f.share for f in own], marker="o", markersize=3, label=what)
    axis.axhline(100, color=INK, linewidth=0.8)
    axis.set_xlabel("frozen layer")
    axis.set_ylabel("% of the effect that stays")
    axis.legend(frameon=False, fontsize=8)
    rows = tuple(row for row in found.to_rows() if row["layers"].isdecimal())
    return Plot(name="freezing", title="What stays of the effect with one layer frozen", figure=figure, rows=rows)


def _layers(layers: tuple[int, ...]) -> str:
    """Numbers of layers, as a range where they are one."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def freeze_table(
    model: Model,
    rows: Rows,
    metric: Objective,
    edits: Intervention | Rows,
    what: Sequence[str] = tuple(FREEZES),
    *,
    layers: Sequence[int] | None = None,
    by_layer: bool = False,
    groups: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FreezeTable:
    """What stays of the effect of ``edits`` on ``metric`` when each of ``what`` is frozen to the run without them.

    In the place of edits there may be another text of equal lengths, run with parts frozen to that of ``rows``.

    ``what`` are names of ``FREEZES``, or kinds of site; "values+mlps" freezes both. They are frozen in all of
    ``layers`` (default: every one), and with ``by_layer`` also in each alone. Raises ``UserError`` for things that
    there are not, for edits with an array per row, and where the edits have no effect on the metric.

    ``groups`` names the group of each row (a question with its two replies, say): intervals resample groups. Many
    parameters: what is measured, what is frozen, and where.
    """
    config = model.config
    chosen = tuple(range(config.n_layers)) if layers is None else tuple(int(layer) for layer in layers)
    if not chosen or min(chosen) < 0 or max(chosen) >= config.n_layers:
        raise UserError(f"layers must be some of 0 to {config.n_layers - 1}, got {list(chosen)}")
    pytree, found = metric_of(metric, config)
    check_answer(found, rows)
    pushed = None if isinstance(edits, Rows) else edits
    if isinstance(edits, Rows):
        check_lengths(rows, edits)
    else:
        checked(edits, config, None)
        if edits.rows is not None:
            raise UserError("give edits that serve all rows, not one for each")
    kinds = {name: kinds_of(name.split("+"), config) for name in what}
    plans = [("", ())] + [(name, chosen) for name in what]
    plans += [(name, (layer,)) for name in what for layer in chosen] if by_layer else []
    every = sorted({kind for each in kinds.values() for kind in each})
    steps = np.arange(config.n_layers)
    on = {k: np.stack([np.isin(steps, at) & (k in kinds.get(name, ())) for name, at in plans]) for k in every}
    count = len(rows.tokens)
    jobs = np.stack([np.repeat(np.arange(len(plans)), count), np.tile(np.arange(count), len(plans))])
    pairs = max(1, min(jobs.shape[1], room() // (2 * rows.tokens.shape[1])))
    scores = np.zeros((len(plans), count))
    base = np.zeros(count)
    for begin in range(0, jobs.shape[1], pairs):
        index = np.arange(begin, begin + pairs)
        plan, row = jobs[:, np.minimum(index, jobs.shape[1] - 1)]
        frozen = Frozen(edits=pushed, on={kind: table[plan] for kind, table in on.items()}, pairs=pairs)
        part = on_devices(model, _side_by_side(rows.take(row), (edits if isinstance(edits, Rows) else rows).take(row)))
        got = to_host(score_rows(model.params, config, part, jax.tree.map(np.asarray, frozen), pytree, needs=found))
        scores[plan, row], base[row] = got[1::2], got[0::2]
        if progress is not None:
            progress(min(begin + pairs, jobs.shape[1]), jobs.shape[1])
    label = "another text" if isinstance(edits, Rows) else edits.label
    return _table(model, label, plans, base, scores, groups or [str(row) for row in range(count)])


def _side_by_side(rows: Rows, others: Rows) -> Rows:
    """Row after row, each before its other."""
    both = lambda a, b: np.stack([a, b], axis=1).reshape(-1, *np.shape(a)[1:])  # noqa: E731
    return jax.tree.map(both, rows, others)  # type: ignore[no-any-return]


def _table(
    model: Model,
    label: str,
    plans: list[tuple[str, tuple[int, ...]]],
    base: Float[np.ndarray, " B"],
    scores: Float[np.ndarray, "F B"],
    groups: Sequence[str],
) -> FreezeTable:
    if not np.isfinite(scores).all() or not np.isfinite(base).all():
        raise UserError(f"the metric is NaN or infinite. {LOGITS_NOT_FINITE}")
    whole = scores[0] - base
    if len(groups) != len(base):
        raise UserError(f"give a group for each of {len(base)} rows, got {len(groups)}")
    if abs(whole.sum()) < 1e-9:
        raise UserError("the edits do not change the metric at all: there is no effect of which a share could stay")
    found = []
    for (what, layers), own in zip(plans[1:], scores[1:], strict=True):
        share = lambda rows, own=own: float((own - base)[rows].sum() / whole[rows].sum())  # noqa: E731
        found.append(
            Freezing(
                what=what,
                layers=layers,
                scores=tuple(own.tolist()),
                share=share(np.arange(len(base))),
                ci95=bootstrap(share, groups, draws=2000),
            )
        )
    return FreezeTable(
        model=model.name,
        steered_by=label,
        base=tuple(base.tolist()),
        steered=tuple(scores[0].tolist()),
        whole=tuple(f for f in found if len(f.layers) > 1 or len({f.layers for f in found}) == 1),
        by_layer=tuple(f for f in found if len(f.layers) == 1 and len({f.layers for f in found}) > 1),
    )
