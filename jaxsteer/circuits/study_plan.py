"""What a study of circuits takes, in words, before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.study_stages import BY_LAYER, FROZEN, WRITTEN, Bench

GRADIENT = 3.0
"""A backward pass beside its forward pass, in forward passes."""


def passes(bench: Bench) -> dict[str, float]:
    """Rows that go through the model, by stage, in whole forward passes of one row."""
    config, options, rows = bench.model.config, bench.options, len(bench.task.rows.tokens)
    above = len(bench.blocks) / config.n_layers
    few = len(bench.task.take(options.layer_questions)) * bool(len(bench.blocks) > 1)
    circuits = len(options.sizes) * (3 + options.random)
    ways = 1 if options.method == "inputs" else 2 * len(bench.blocks)
    found = {
        "patches": 2 * rows * above * len(bench.blocks) * (config.n_heads + 1) / 2,
        "attribution": 2 * rows * above * GRADIENT * options.steps * ways,
        "circuits": rows * above * circuits,
        "freezing": 2.0 * (2 * rows * (1 + len(FROZEN)) + few * (1 + len(BY_LAYER) * (1 + len(bench.blocks)))),
    }
    if bench.push.vectors is not None:
        found["sparse vectors"] = 5.0 * rows * (3 + options.draws)
    return found


def told_plan(benches: Sequence[Bench]) -> str:
    """The work of all pushes in words."""
    bench = benches[0]
    config, options = bench.model.config, bench.options
    weights = sum(leaf.size for leaf in jax.tree.leaves(bench.model.params))
    length = float(bench.task.rows.lengths.mean())
    total: dict[str, float] = {}
    for one in benches:
        for stage, count in passes(one).items():
            total[stage] = total.get(stage, 0.0) + count
    flop = {stage: 2 * weights * length * count for stage, count in total.items()}
    written = len(bench.contexts[0]) * (3 + 2 * len(WRITTEN)) * len(benches)
    graphs = ", ".join(f"{Graph.of(config, start=one.push.start).n_edges:,}" for one in benches)
    return (
        f"{len(benches)} push{'es' if len(benches) > 1 else ''}, each beside a random one; "
        f"{len(set(bench.task.groups))} questions, {len(bench.task.rows.tokens)} rows of {length:.0f} tokens; {graphs} "
        f"edges; {len(options.sizes)} sizes of circuits and {options.random} random ones of each; {written} replies of "
        f"up to {options.max_new_tokens} tokens. Passes through the model: "
        + ", ".join(f"{stage} {count:,.0f} ({flop[stage] / 1e12:,.1f} TFLOP)" for stage, count in total.items())
    )
