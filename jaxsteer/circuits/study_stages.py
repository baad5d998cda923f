"""The stages of a study of circuits, each of one push: what is patched, attributed, cut out, frozen, written, read.

Every stage runs the push and the first of its random pushes alike, and gives shares of the push's own effect.

Letters: B rows, n patches or circuits, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import CircuitScores, Edges, greedy_edges, pruned, random_edges, run_circuits
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.freeze_table import FreezeTable, freeze_table
from jaxsteer.circuits.freezing import freeze
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.patch_map import PatchMap
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.rows import Rows
from jaxsteer.circuits.sparsify import dimension_effects, kept_dimensions, sparsified
from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.circuits.study_result import Circuits, CircuitSize, Grid, Level, Said, Stays, as_grid
from jaxsteer.circuits.study_setting import Push, Task, row_scores
from jaxsteer.circuits.value_vectors import ablate_value_vectors, value_vectors
from jaxsteer.files.records import Record
from jaxsteer.lens.words import Words, read_words
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import Decoding
from jaxsteer.models.taps import Intervention
from jaxsteer.prompts.generate import generate
from jaxsteer.statistics import rate_interval, ratio_draws
from jaxsteer.steer import Edits

ENOUGH = 0.85
"""Faithfulness of a circuit that is said to be enough."""
FROZEN = ("patterns", "queries and keys", "values", "attention", "mlps", "attention+mlps")
"""What is frozen in scoring, in all blocks above the push."""
BY_LAYER = ("patterns", "values", "mlps")
WRITTEN = ("patterns", "values", "attention", "mlps")
"""What is frozen while replies are written."""
ZEROS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""Shares of a vector's dimensions that are set to 0."""
HEADS = 5
"""Heads whose value vectors are read: the longest."""
BYTES = 1 << 30
"""What the writers of one pass of circuits may take, about."""
Source = Intervention | Rows
Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores(Record):
    """The metric of every row."""

    base: tuple[float, ...]
    pushed: tuple[float, ...]
    controls: tuple[tuple[float, ...], ...]
    plain: tuple[float, ...] = ()
    """Of a prompt: without any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaysTable(Record):
    """Lines about freezing."""

    lines: tuple[Stays, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaidTable(Record):
    """Replies under every condition."""

    lines: tuple[Said, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelTable(Record):
    """Sparse vectors."""

    dimensions: int
    lines: tuple[Level, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueWords(Record):
    """What value vectors say, and what taking them out costs."""

    words: Words
    control: Words
    ablated: Stays


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


def patch_grid(bench: Bench, kind: str, advance: Advance) -> Grid:
    """Exact patching of every head (or MLP) from the pushed run, all tokens together."""
    model, task, rows = bench.model, bench.task, len(bench.task.rows.tokens)

    def patched(source: Source, before: int) -> PatchMap:
        return patch(
            model, task.rows, task.metric, kind, source, layers=list(bench.blocks), positions="together",
            heads="each" if kind == "attn.hook_z" else "together",
            progress=lambda done, _: advance(before + done, 2 * rows),
        )  # fmt: skip

    found, other = patched(bench.source, 0), patched(bench.controls[0], rows)
    whole = np.asarray(found.other) - np.asarray(found.base)
    shares, (low, high) = bench.shares(found.effects.reshape(rows, -1), whole)
    control, _ = bench.shares(other.effects.reshape(rows, -1), whole)
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


def measure_circuits(bench: Bench, found: EdgeScores, control: EdgeScores, advance: Advance) -> Circuits:
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
    got = _run(bench, bench.task.metric, graph, every, advance)
    whole = got.target - got.base
    moved, k = (got.scores - got.base).T, len(chosen)
    shares, (low, high) = bench.shares(moved, whole)
    drawn = ratio_draws(
        moved[:, :k] * bench.task.weights[:, None], whole * bench.task.weights, bench.task.groups, seed=options.seed
    )
    matched = [None] * k
    if bench.task.match is not None:
        own = _run(bench, bench.task.match, graph, chosen, lambda *_: None)
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


def _run(bench: Bench, metric: Any, graph: Graph, circuits: Sequence[Edges], advance: Advance) -> CircuitScores:
    """``run_circuits`` a few rows and a few circuits at a time."""
    task, count = bench.task, len(bench.task.rows.tokens)
    one = 16 * len(graph.writers) * task.rows.tokens.shape[1] * bench.model.config.d_model
    size = max(1, min(count, BYTES // one))
    several, parts = 25, []
    total = -(-count // size) * len(circuits)
    for begin in range(0, count, size):
        index = np.minimum(np.arange(begin, begin + size), count - 1)
        own = min(size, count - begin)
        source = bench.source.take(index) if isinstance(bench.source, Rows) else bench.source
        found = []
        for first in range(0, len(circuits), several):
            got = run_circuits(
                bench.model, task.rows.take(index), metric, source, graph, circuits[first : first + several]
            )
            found.append(got.scores[:, :own])
            advance(begin // size * len(circuits) + min(first + several, len(circuits)), total)
        parts.append((got.base[:own], got.target[:own], np.concatenate(found)))
    base, target, scores = zip(*parts, strict=True)
    return CircuitScores(
        semantics=got.semantics, base=np.concatenate(base).astype(np.float64),
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


# Vectors


def value_words(bench: Bench, scores: Scores) -> ValueWords:
    """The words of the vector, of all heads' value vectors and of the longest ones; and what taking them out leaves."""
    model, vectors, heads = bench.model, bench.push.vectors, bench.model.config.n_heads
    assert vectors is not None
    site = bench.push.site
    values = value_vectors(model, vectors.arrays[site], site)
    flat = values.heads.reshape(-1, values.heads.shape[-1])
    longest = np.argsort(-np.linalg.norm(flat, axis=1), kind="stable")[:HEADS]
    names = ["the vector", "all heads", *(f"a{i // heads}.h{i % heads}" for i in longest)]
    words = read_words(model, np.stack([vectors.arrays[site], values.summed, *flat[longest]]), names)
    other = bench.push.controls[0].arrays[site]
    control = read_words(model, np.stack([other, value_vectors(model, other, site).summed]), ["random", "its heads"])
    without = ablate_value_vectors(model, vectors.arrays[site], site, positions=vectors.positions or "all")
    base = np.asarray(scores.base)
    assert isinstance(bench.source, Edits)
    moved = bench.scores_of(Edits((*bench.source.edits, without))) - base
    share, (low, high) = bench.shares(moved[:, None], np.asarray(scores.pushed) - base)
    first, last = bench.blocks[0], bench.blocks[-1]
    ablated = Stays(
        what="value vectors out", layers=f"{first}–{last}", share=float(share[0]), ci95=(float(low[0]), float(high[0]))
    )
    return ValueWords(words=words, control=control, ablated=ablated)


def sparse_vectors(bench: Bench, scores: Scores, advance: Advance) -> LevelTable:
    """The effect of sparse vectors, whose dimensions were chosen on other questions."""
    vectors, site, held = bench.push.vectors, bench.push.site, bench.held
    assert vectors is not None and held is not None
    array, model, options = vectors.arrays[site], bench.model, bench.options
    effects = dimension_effects(model, held[0].rows, held[0].metric, vectors, steps=options.steps)
    counts = sorted({max(1, round((1 - zeros) * len(array))) for zeros in ZEROS}, reverse=True)
    plans = [(by, n, options.seed) for by in ("gradient", "effect", "magnitude") for n in counts]
    plans += [("random", n, options.seed + i) for n in counts for i in range(options.draws)]
    base, moved = np.asarray(scores.base), []
    for done, (by, n, seed) in enumerate(plans, 1):
        kept = kept_dimensions(array, effects, by, keep=n, seed=seed)
        moved.append(bench.scores_of(sparsified(vectors, kept).edits()) - base)
        advance(done, len(plans))
    whole = np.asarray(scores.pushed) - base
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for (by, n, _), change in zip(plans, moved, strict=True):
        found.setdefault((by, n), []).append(change)
    lines = []
    for (by, n), changes in found.items():
        each, _ = bench.shares(np.stack(changes, 1), whole)
        mean, (low, high) = bench.shares(np.mean(changes, axis=0)[:, None], whole)
        spread = (float(each.min()), float(each.max())) if by == "random" else None
        lines.append(Level(by=by, kept=n, share=float(mean[0]), ci95=(float(low[0]), float(high[0])), spread=spread))
    return LevelTable(dimensions=len(array), lines=tuple(lines))
