"""What a study of circuits found (``jaxsteer circuits``): for every vector, or for a prompt, what carries its effect.

Effects are shares: the metric's change that a part makes, over the change that the whole push makes, both summed over
rows. Intervals resample questions. ``control`` is the same for a random push of equal size, over the same whole change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.overlap import Overlap
from jaxsteer.display import aligned, decimals, percent, short, visible, wrapped
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.lens.words import Words
from jaxsteer.ranges import CountFrom0
from jaxsteer.runs.files import METRICS
from jaxsteer.runs.result import Result

Interval = tuple[float, float]
TOP = 5
"""Heads and edges that the table lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect(Record):
    """What a run does to the metric."""

    name: str
    metric: float
    """In the mean over questions."""
    change: float
    """From the base run."""
    ci95: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Record):
    """Exact patching at one kind of site, layer by layer and head by head (MLPs have one column)."""

    kind: str
    layers: tuple[CountFrom0, ...]
    shares: tuple[tuple[float, ...], ...]
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    control: tuple[tuple[float, ...], ...]

    def name(self, layer: int, column: int) -> str:
        """Of a cell, as writers are called."""
        return f"m{layer}" if self.kind == "hook_mlp_out" else f"a{layer}.h{column}"

    def cells(self) -> list[tuple[str, float, Interval, float]]:
        """(name, share, interval, control), the largest shares first."""
        found = [
            (self.name(layer, j), value, (self.low[i][j], self.high[i][j]), self.control[i][j])
            for i, layer in enumerate(self.layers)
            for j, value in enumerate(self.shares[i])
        ]
        return sorted(found, key=lambda cell: -abs(cell[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Record):
    """The score of an edge or of a node."""

    name: str
    share: float
    control: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitSize(Record):
    """A circuit of one size, and what it stands beside."""

    asked: int
    """Edges that were chosen."""
    edges: int
    """Edges that are left when what hangs loose is pruned."""
    faithfulness: float
    ci95: Interval
    complement: float
    """Faithfulness of all other edges."""
    control: float
    """Faithfulness of the circuit of as many edges that the random push's scores choose."""
    random: tuple[float, float, float]
    """Of random circuits of as many edges that hang together: 2.5 %, median, 97.5 %."""
    as_close: float
    """Share of them whose faithfulness is as close to 1."""
    match: float | None = None
    """Share of the readings at which the circuit likes the steered run's token best; of metric "tokens"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circuits(Record):
    """Circuits of several sizes."""

    semantics: str
    ablation: str
    end: str
    n_edges: int
    sizes: tuple[CircuitSize, ...]
    needed: int | None = None
    """Edges of the smallest circuit from which on all have a faithfulness of at least ``ENOUGH``; None: of none."""
    needed_ci95: Interval | None = None
    """As shares of all edges, 1 where none suffices."""
    drawn: tuple[str, ...]
    """Names of the edges of the circuit that the page draws."""

    @property
    def needed_share(self) -> float | None:
        """Of all edges."""
        return None if self.needed is None else self.needed / self.n_edges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stays(Record):
    """What stays of the effect with something frozen, or taken out."""

    what: str
    layers: str
    share: float
    ci95: Interval
    control: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said(Record):
    """Replies under one condition, written token by token with a cache."""

    condition: str
    shown: float
    """Share of the replies that show the persona; a reply that cannot be read does not."""
    ci95: Interval
    unread: float
    replies: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level(Record):
    """Sparse vectors of one size, chosen in one way."""

    by: str
    kept: int
    share: float
    ci95: Interval
    spread: Interval | None = None
    """Of random choices: the smallest and the largest share of several draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unexplained(Record):
    """A part of the effect that a stage does not account for."""

    what: str
    share: float
    told: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushStudy(Record):
    """One vector, or the prompt."""

    name: str
    label: str
    """How the model is pushed."""
    site: str = ""
    start: CountFrom0
    """First block of the graph."""
    norm: float | None = None
    rows: int
    readings: int
    effects: tuple[Effect, ...]
    """The base run, the push, the random pushes (and for a prompt: the questions without any prompt)."""
    heads: Grid
    mlps: Grid
    edges: tuple[Scored, ...]
    """The largest, by attribution."""
    nodes: tuple[Scored, ...]
    completeness: float
    """The score of the input over the whole change."""
    method: str
    circuits: Circuits
    frozen: tuple[Stays, ...]
    by_layer: tuple[Stays, ...]
    generated: tuple[Said, ...]
    words: Words | None = None
    control_words: Words | None = None
    ablated: Stays | None = None
    """With the steering value vectors taken out of all values."""
    explained: float | None = None
    """What that costs, over what freezing the values costs: the value vectors' share of the effect through values."""
    dimensions: int | None = None
    sparsity: tuple[Level, ...] = ()
    unexplained: tuple[Unexplained, ...]

    @property
    def effect(self) -> Effect:
        """Of the push."""
        return self.effects[1]

    @property
    def controls(self) -> tuple[Effect, ...]:
        """Of the random pushes."""
        return tuple(e for e in self.effects[2:] if e.name.startswith("random"))

    def stays(self, what: str) -> Stays:
        """The line of what was frozen."""
        return next(line for line in self.frozen if line.what == what)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitStudy(Result):
    """What carries the effect of vectors, or of a prompt, on a persona."""

    model: str
    fingerprint: str
    persona: str
    goal: str
    metric: str
    told: str
    """The metric in words."""
    prompt: str = ""
    filler: str = ""
    """What stands in the place of the prompt in the base run."""
    questions: tuple[str, ...]
    flipped: bool = False
    """Whether questions were chosen because the pushes change which answer is preferred."""
    pushes: tuple[PushStudy, ...]
    overlap: Overlap | None = None
    """Of several vectors' circuits, and of those of random pushes."""
    cosines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of pairs of vectors at one site, "first, second"."""
    seed: CountFrom0 = 0

    @classmethod
    def read(cls, folder: str | Path) -> CircuitStudy:
        """The result in a directory of ``jaxsteer circuits``. Raises ``UserError`` where there is none."""
        path = Path(folder) / METRICS
        return cls.from_json(read_json(path, nan=True), str(path))

    def push(self, name: str) -> PushStudy:
        """One vector by its name."""
        return next(one for one in self.pushes if one.name == name)

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every share that was measured: vector, stage, part, share, interval, control."""
        rows = []
        for one in self.pushes:
            parts = [("patched", *cell) for grid in (one.heads, one.mlps) for cell in grid.cells()]
            parts += [("edge", e.name, e.share, (np.nan, np.nan), e.control) for e in one.edges]
            parts += [("node", e.name, e.share, (np.nan, np.nan), e.control) for e in one.nodes]
            parts += [
                ("circuit", f"{size.edges} edges", size.faithfulness, size.ci95, size.random[1])
                for size in one.circuits.sizes
            ]
            parts += [
                ("frozen", f"{s.what}, {s.layers}", s.share, s.ci95, np.nan if s.control is None else s.control)
                for s in (*one.frozen, *one.by_layer)
            ]
            parts += [("replies", s.condition, s.shown, s.ci95, np.nan) for s in one.generated]
            parts += [("sparse", f"{s.kept} {s.by}", s.share, s.ci95, np.nan) for s in one.sparsity]
            rows += [
                {"push": one.name, "stage": stage, "part": part, "share": share, "low": ci[0], "high": ci[1],
                 "control": control}
                for stage, part, share, ci, control in parts
            ]  # fmt: skip
        return rows

    def table(self) -> str:
        """The main numbers of every vector, then how alike they are."""
        head = (
            f"{visible(self.persona)} of {visible(self.model)}, {len(self.questions)} questions"
            f"{', chosen because the pushes flip them' if self.flipped else ''}. Metric: {self.told}."
        )
        parts = [wrapped(head), *map(_push_table, self.pushes)]
        if self.overlap is not None:
            parts.append(self.overlap.table())
        if self.cosines:
            lines = [[pair, decimals(cosine)] for pair, cosine in self.cosines.items()]
            parts.append(aligned([["vectors", "cosine"], *lines]))
        return "\n\n".join(parts)


def within(share: float, ci95: Interval | None) -> str:
    """A share with its interval."""
    if ci95 is None or ci95[0] != ci95[0]:
        return percent(share)
    return f"{percent(share)} ({100 * ci95[0]:.0f} to {100 * ci95[1]:.0f})"


def _push_table(one: PushStudy) -> str:
    base, effect = one.effects[0], one.effect
    lines = [[one.name, "", "share (95 %)", "control"]]
    lines.append(["effect", f"{base.metric:+.2f} to {effect.metric:+.2f}", "100 %", _list(one, effect.change)])
    for grid, word in ((one.heads, "head"), (one.mlps, "MLP")):
        for name, share, ci95, control in grid.cells()[: TOP if word == "head" else 3]:
            lines.append([f"{word} patched", name, within(share, ci95), percent(control)])
    for edge in one.edges[:TOP]:
        lines.append(["edge", edge.name, percent(edge.share), percent(edge.control)])
    for size in one.circuits.sizes:
        lines.append(
            ["circuit", f"{size.edges} of {one.circuits.n_edges} edges", within(size.faithfulness, size.ci95),
             f"{percent(size.random[1])} ({100 * size.random[0]:.0f} to {100 * size.random[2]:.0f})"]
        )  # fmt: skip
    lines += [["frozen", s.what, within(s.share, s.ci95), percent(s.control)] for s in one.frozen]
    lines += [["replies shown", s.condition, within(s.shown, s.ci95), ""] for s in one.generated]
    if one.ablated is not None:
        lines.append(["value vectors out", "", within(one.ablated.share, one.ablated.ci95), ""])
        lines.append(["explained of values", "", percent(one.explained), ""])
    for level in one.sparsity:
        spread = "" if level.spread is None else f"{percent(level.spread[0])} to {percent(level.spread[1])}"
        lines.append(["sparse", f"{level.kept} by {level.by}", within(level.share, level.ci95), spread])
    lines += [["not explained", part.what, percent(part.share), ""] for part in one.unexplained]
    needed = one.circuits.needed_share
    note = (
        f"{short(one.label, 90)}. Edges needed for 85 %: "
        f"{'more than were tried' if needed is None else percent(needed)}."
    )
    return aligned(lines, left=(0, 1), note=note)


def _list(one: PushStudy, whole: float) -> str:
    return ", ".join(percent(control.change / whole) for control in one.controls)


def as_grid(values: Float[np.ndarray, "layers columns"]) -> tuple[tuple[float, ...], ...]:
    """Numbers as a record keeps them."""
    return tuple(tuple(float(v) for v in row) for row in values)
