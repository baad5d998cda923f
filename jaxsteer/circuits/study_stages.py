"""The stages of a study of circuits, each of one push: what is patched, attributed, cut out, frozen, written, read.

Every stage runs the push and the first of its random pushes alike, and gives shares of the push's own effect.

Letters: B rows, n patches or circuits, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import CircuitScores, Edges, greedy_edges, pruned, random_edges, run_circuits
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.freeze_table import FreezeTable, freeze_table
from jaxsteer.circuits.freezing import freeze
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.rows import Rows
from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.circuits.study_result import Circuits, CircuitSize, Grid, Said, Stays, as_grid
from jaxsteer.circuits.study_setting import Push, Task, row_scores
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import Decoding
from jaxsteer.models.taps import Intervention
from jaxsteer.prompts.generate import generate
from jaxsteer.statistics import rate_interval, ratio_draws

ENOUGH = 0.85
"""Faithfulness of a circuit that is said to be enough."""
FROZEN = ("patterns", "queries and keys", "values", "attention", "mlps", "attention+mlps")
"""What is frozen in scoring, in all blocks above the push."""
BY_LAYER = ("patterns", "values", "mlps")
WRITTEN = ("patterns", "values", "attention", "mlps")
"""What is frozen while replies are written."""
BYTES = 1 << 30
"""What the writers of one pass of circuits may take, about."""
Source = Intervention | Rows
Advance = Callable[[int, int], None]
ROWS = 4
"""Rows of one part of a patch map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores(Record):
    """The metric of every row."""

    base: tuple[float, ...]
    pushed: tuple[float, ...]
    controls: tuple[tuple[float, ...], ...]
    plain: tuple[float, ...] = ()
    """Of a prompt: without any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Record):
    """Some rows of a long stage: the metric in the base run and in the pushed one, and what n patches make of it (the
    change, rows first) or n circuits (the metric itself, circuits first)."""

    base: tuple[float, ...]
    pushed: tuple[float, ...]
    each: tuple[tuple[float, ...], ...]


Keep = Callable[[str, Callable[[], Part]], Part]
"""A part by name: as it was kept, or made now and kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaysTable(Record):
    """Lines about freezing."""

    lines: tuple[Stays, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaidTable(Record):
    """Replies under every condition."""

    lines: tuple[Said, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """One push, ready to be run."""

    model: Model
    options: CircuitOptions
    push: Push
    task: Task
    source: Source
    controls: tuple[Source, ...]
    contexts: tuple[tuple[np.ndarray, ...], ...]
    """Questions as token ids: in the base run, in the pushed one, under the first random push."""
    held: tuple[Task, Source] | None
    """Other questions, on which dimensions are chosen."""

    @property
    def blocks(self) -> range:
        """Those that the push reaches."""
        return range(self.push.start, self.model.config.n_layers)

    def scores_of(self, source: Source | None) -> Float[np.ndarray, " B"]:
        """The metric of every row in a run: None for the base run."""
        if isinstance(source, Rows):
            return row_scores(self.model, source, self.task.metric, None)
        return row_scores(self.model, self.task.rows, self.task.metric, source)

    def shares(
        self, moved: Float[np.ndarray, "B n"], whole: Float[np.ndarray, " B"], rows: np.ndarray | None = None
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "2 n"]]:
        """Shares of the whole change, sums over rows, with intervals over questions."""
        at = np.arange(len(whole)) if rows is None else rows
        weights, groups = self.task.weights[at], np.asarray(self.task.groups)[at]
        over, under = np.asarray(moved, np.float64) * weights[:, None], whole * weights
        drawn = ratio_draws(over, under, list(groups), seed=self.options.seed)
        return over.sum(0) / under.sum(), np.percentile(drawn, [2.5, 97.5], axis=0)


def score_runs(bench: Bench, plain: Task | None, advance: Advance) -> Scores:
    """The metric in every run."""
    sources = [None, bench.source, *bench.controls]
    found = []
    for done, source in enumerate(sources, 1):
        found.append(tuple(bench.scores_of(source).tolist()))
        advance(done, len(sources))
    alone = () if plain is None else tuple(row_scores(bench.model, plain.rows, plain.metric, None).tolist())
    return Scores(base=found[0], pushed=found[1], controls=tuple(found[2:]), plain=alone)


def patch_grid(bench: Bench, kind: str, keep: Keep, advance: Advance) -> Grid:
    """Exact patching of every head (or MLP) from the pushed run, all tokens together."""
    model, task, count = bench.model, bench.task, len(bench.task.rows.tokens)

    def patched(source: Source, index: np.ndarray) -> Part:
        found = patch(
            model, task.rows.take(index), task.metric, kind, source.take(index) if isinstance(source, Rows) else source,
            layers=list(bench.blocks), positions="together", heads="each" if kind == "attn.hook_z" else "together",
        )  # fmt: skip
        moved = found.effects.reshape(len(index), -1)
        return Part(base=found.base, pushed=found.other, each=tuple(map(tuple, moved.tolist())))

    found = []
    for which, source in enumerate((bench.source, bench.controls[0])):
        parts = []
        for begin in range(0, count, ROWS):
            index = np.arange(begin, min(begin + ROWS, count))
            parts.append(keep(f"{which}-{begin}", partial(patched, source, index)))
            advance(which * count + begin + len(index), 2 * count)
        base, pushed, each = (np.concatenate(some) for some in zip(*((p.base, p.pushed, p.each) for p in parts)))
        found.append((np.asarray(pushed) - np.asarray(base), each))
    shares, (low, high) = bench.shares(found[0][1], found[0][0])
    control, _ = bench.shares(found[1][1], found[0][0])
    tables = [as_grid(each.reshape(len(bench.blocks), -1)) for each in (shares, low, high, control)]
    return Grid(
        kind=kind, layers=tuple(bench.blocks), shares=tables[0], low=tables[1], high=tables[2], control=tables[3]
    )


def score_edges(bench: Bench, source: Source) -> EdgeScores:
    """Attribution of all edges and nodes to a push."""
    options = bench.options
    return attribute_edges(
        bench.model, bench.task.rows, bench.task.metric, source, start=bench.push.start, method=options.method,
        steps=options.steps,
    )  # fmt: skip


def measure_circuits(bench: Bench, found: EdgeScores, control: EdgeScores, keep: Keep, advance: Advance) -> Circuits:
    """Circuits of several sizes, their complements, those of the random push's scores, and random ones."""
    options, graph = bench.options, found.graph
    counts = sorted({min(graph.n_edges, max(1, round(share * graph.n_edges))) for share in options.sizes})
    chosen = [pruned(graph, greedy_edges(found, n, end=options.end)) for n in counts]
    others = [pruned(graph, greedy_edges(control, n, end=options.end)) for n in counts]
    random = [
        random_edges(graph, max(1, int(edges.sum())), (options.seed * 1_000_003 + i) * 101 + j)
        for j, edges in enumerate(chosen)
        for i in range(options.random)
    ]
    every = [*chosen, *(graph.edges & ~edges for edges in chosen), *others, *random]
    got = _run(bench, bench.task.metric, graph, every, keep, advance)
    whole = got.target - got.base
    moved, k = (got.scores - got.base).T, len(chosen)
    shares, (low, high) = bench.shares(moved, whole)
    drawn = ratio_draws(
        moved[:, :k] * bench.task.weights[:, None], whole * bench.task.weights, bench.task.groups, seed=options.seed
    )
    matched = [None] * k
    if bench.task.match is not None:
        own = _run(bench, bench.task.match, graph, chosen, lambda _, make: make(), lambda *_: None)
        matched = (own.scores @ bench.task.weights).tolist()
    edges = [int(one.sum()) for one in chosen]
    sizes = []
    for i, n in enumerate(counts):
        band = shares[3 * k + i * options.random :][: options.random]
        sizes.append(
            CircuitSize(
                asked=n, edges=edges[i], faithfulness=float(shares[i]), ci95=(float(low[i]), float(high[i])),
                complement=float(shares[k + i]), control=float(shares[2 * k + i]),
                random=tuple(np.percentile(band, [2.5, 50, 97.5]).tolist()),
                as_close=float((np.abs(band - 1) <= abs(shares[i] - 1)).mean()), match=matched[i],
            )
        )  # fmt: skip
    ends = np.percentile([_needed(row, edges, graph.n_edges)[1] for row in drawn], [2.5, 97.5])
    needed, _ = _needed(shares[:k], edges, graph.n_edges)
    least = next((i for i, n in enumerate(edges) if n == needed), k - 1)
    return Circuits(
        semantics="ablate outside", ablation="patching from the base run", end=options.end, n_edges=graph.n_edges,
        sizes=tuple(sizes), needed=needed, needed_ci95=(float(ends[0]), float(ends[1])),
        drawn=edge_names(graph, chosen[least]),
    )  # fmt: skip


def edge_names(graph: Graph, edges: Edges) -> tuple[str, ...]:
    """Names of a circuit's edges, in the graph's order."""
    return tuple(f"{graph.writers[s]}->{graph.readers[r].name}" for r, s in zip(*np.nonzero(edges), strict=True))


def _needed(faithful: Float[np.ndarray, " n"], edges: Sequence[int], every: int) -> tuple[int | None, float]:
    """Edges of the smallest circuit from which on all are good enough, and their share of all (1: none is)."""
    good = np.asarray(faithful) >= ENOUGH
    first = len(good) - int(np.argmin(good[::-1])) if not good.all() else 0
    return (None, 1.0) if first == len(good) else (edges[first], edges[first] / every)


def _run(
    bench: Bench, metric: Any, graph: Graph, circuits: Sequence[Edges], keep: Keep, advance: Advance
) -> CircuitScores:
    """``run_circuits`` a few rows and a few circuits at a time."""
    task, count = bench.task, len(bench.task.rows.tokens)
    one = 16 * len(graph.writers) * task.rows.tokens.shape[1] * bench.model.config.d_model
    size = max(1, min(count, BYTES // one))
    several, parts = 25, []
    total = -(-count // size) * len(circuits)

    def ran(index: np.ndarray, own: int, some: Sequence[Edges]) -> Part:
        source = bench.source.take(index) if isinstance(bench.source, Rows) else bench.source
        got = run_circuits(bench.model, task.rows.take(index), metric, source, graph, some)
        each = tuple(map(tuple, got.scores[:, :own].tolist()))
        return Part(base=tuple(got.base[:own].tolist()), pushed=tuple(got.target[:own].tolist()), each=each)

    for begin in range(0, count, size):
        index = np.minimum(np.arange(begin, begin + size), count - 1)
        own = min(size, count - begin)
        found = []
        for first in range(0, len(circuits), several):
            some = circuits[first : first + several]
            found.append(keep(f"{begin}-{first}", partial(ran, index, own, some)))
            advance(begin // size * len(circuits) + first + len(some), total)
        parts.append((found[0].base, found[0].pushed, np.concatenate([part.each for part in found])))
    base, target, scores = zip(*parts, strict=True)
    return CircuitScores(
        semantics="ablate outside", base=np.concatenate(base).astype(np.float64),
        target=np.concatenate(target).astype(np.float64), scores=np.concatenate(scores, axis=1), weights=task.weights,
    )  # fmt: skip


# Freezing


def freeze_parts(bench: Bench, advance: Advance, *, by_layer: bool = False) -> StaysTable:
    """What stays with parts frozen in all blocks above the push; ``by_layer`` in one block at a time, on fewer
    questions."""
    task, model = bench.task, bench.model
    at = task.take(bench.options.layer_questions) if by_layer else np.arange(len(task.rows.tokens))
    runs = (bench.source,) if by_layer else (bench.source, bench.controls[0])
    tables: list[FreezeTable] = []
    for i, source in enumerate(runs):

        def part(done: int, total: int, before: int = i) -> None:
            advance(before * total + done, len(runs) * total)

        tables.append(
            freeze_table(
                model, task.rows.take(at), task.metric, source.take(at) if isinstance(source, Rows) else source,
                BY_LAYER if by_layer else FROZEN, layers=list(bench.blocks), by_layer=by_layer, progress=part,
            )
        )  # fmt: skip
    return StaysTable(lines=tuple(_stays(bench, tables, at, by_layer)))


def _stays(bench: Bench, tables: Sequence[FreezeTable], at: np.ndarray, by_layer: bool) -> list[Stays]:
    whole = np.asarray(tables[0].steered) - np.asarray(tables[0].base)
    picked = [table.by_layer if by_layer else table.whole for table in tables]
    moved = [np.stack([np.asarray(f.scores) - table.base for f in some], 1) for table, some in zip(tables, picked)]
    shares, (low, high) = bench.shares(moved[0], whole, at)
    control = None if by_layer else bench.shares(moved[1], whole, at)[0]
    first, last = bench.blocks[0], bench.blocks[-1]
    return [
        Stays(
            what=f.what, layers=str(f.layers[0]) if by_layer or first == last else f"{first}–{last}",
            share=float(shares[i]), ci95=(float(low[i]), float(high[i])),
            control=None if control is None else float(control[i]),
        )
        for i, f in enumerate(picked[0])
    ]  # fmt: skip


def write_replies(
    bench: Bench, shown: Callable[[str, int], bool | None], groups: Sequence[str], advance: Advance
) -> SaidTable:
    """Greedy replies, the base run's, the push's, the random push's, and with parts frozen; all from cached decoding.

    ``shown`` reads a reply to the question of this number: whether it shows the persona, None where nothing tells.
    """
    model, n = bench.model, len(bench.contexts[0])
    edits = [None if isinstance(s, Rows) else s for s in (bench.source, bench.controls[0])]
    plans: list[tuple[str, Any]] = [("as it is", (0, None)), ("pushed", (1, edits[0])), ("random push", (2, edits[1]))]
    made: list[tuple[str, tuple[str, ...]]] = []
    greedy = Decoding(temperature=0, max_new_tokens=bench.options.max_new_tokens)
    for name, (which, edit) in plans:
        made.append((name, generate(model, list(bench.contexts[which]), greedy, edits=edit).texts))
        advance(len(made), len(plans) + len(WRITTEN))
    pairs = [row for pair in zip(bench.contexts[0], bench.contexts[1], strict=True) for row in pair]
    for what in WRITTEN:
        frozen = freeze(model, edits[0], [what], n, layers=list(bench.blocks), spoken=True)
        made.append((f"{what} frozen", generate(model, pairs, greedy, edits=frozen, batch=2 * n).texts[1::2]))
        advance(len(made), len(plans) + len(WRITTEN))
    lines = []
    for name, texts in made:
        read = [shown(text, i) for i, text in enumerate(texts)]
        values = np.asarray([one is True for one in read], np.float64)
        lines.append(
            Said(
                condition=name, shown=float(values.mean()), ci95=rate_interval(values, list(groups)),
                unread=float(np.mean([one is None for one in read])), replies=tuple(texts),
            )
        )  # fmt: skip
    return SaidTable(lines=tuple(lines))
