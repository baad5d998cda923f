"""The stages of a study of circuits that only a vector has: what it says, and how many of its dimensions it needs."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxsteer.circuits.sparsify import dimension_effects, kept_dimensions, sparsified
from jaxsteer.circuits.study_result import Level, Stays
from jaxsteer.circuits.study_stages import Advance, Bench, Scores
from jaxsteer.circuits.value_vectors import ablate_value_vectors, value_vectors
from jaxsteer.files.records import Record
from jaxsteer.lens.words import Words, read_words
from jaxsteer.steer import Edits

ZEROS = (0.5, 0.75, 0.9, 0.95, 0.99)
"""Shares of a vector's dimensions that are set to 0."""
HEADS = 5
"""Heads whose value vectors are read: the longest."""


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
