"""Circuits: which edges are enough, chosen by their scores and judged by running them.

Two ways to run a circuit give different numbers, so that every result says which it is (and edges carry values of the
other run: the ablation is by patching):

    "ablate outside"  the source runs, and every edge outside of the circuit carries what it carries in the run
    "patch inside"    the run runs, and the circuit's edges carry what they carry in the source

The rest carries what its writer writes now. Circuits are a batch axis of one program.

Letters: B rows, T tokens, D width, l blocks, N query heads, K key/value heads, W writers, R readers, C circuits,
S = G B slots of a call with G circuits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.memory import abstract_rows, row_bytes, rows_at_once
from jaxsteer.circuits.rows import (
    Rows,
    check_answer,
    check_lengths,
    layout_of,
    metric_of,
    on_devices,
    opened_rows,
    scores,
)
from jaxsteer.circuits.runs import stream_before, two_runs, written
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import layer_weights
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.taps import Intervention, Tap, Visit, joined
from jaxsteer.models.transformer import block, norm_weight
from jaxsteer.objectives.reads import Needs, Objective, composed
from jaxsteer.objectives.terms import check_choice
from jaxsteer.processes import to_host
from jaxsteer.steer.completions import room

Semantics = Literal["ablate outside", "patch inside"]
READERS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
Edges = Bool[np.ndarray, "R W"]


# Choosing


def top_edges(found: EdgeScores, count: int) -> Edges:
    """The ``count`` edges of the largest scores, whichever sign. Raises ``UserError`` for more than there are."""
    _check_count(found.graph, count)
    order = np.argsort(-np.abs(found.values), kind="stable")[:count]
    chosen = np.zeros(found.graph.n_edges, bool)
    chosen[order] = True
    edges = np.zeros(found.graph.edges.shape, bool)
    edges[found.graph.edges] = chosen
    return edges


def greedy_edges(found: EdgeScores, count: int, *, end: str = "output") -> Edges:
    """``count`` edges, one after the other: always the largest that hangs together with what is there, from one end.

    From the "output" an edge joins when its reader is the unembedding or belongs to a node of the circuit; from the
    "input" when its writer does. Raises ``UserError`` for more edges than there are.
    """
    check_choice("end", end, ("output", "input"))
    graph = found.graph
    _check_count(graph, count)
    owners, size = graph.owners, np.where(graph.edges, np.abs(found.matrix), -1.0)
    edges = np.zeros(graph.edges.shape, bool)
    inside = np.arange(len(graph.writers)) == 0
    for _ in range(count):
        if end == "output":
            inside[:] = edges.any(0)
            joins = (owners[:, inside].any(1) | (np.arange(len(owners)) == len(owners) - 1))[:, None]
        else:
            inside |= owners[edges.any(1)].any(0)
            joins = inside[None]
        best = np.where(joins & ~edges, size, -1.0)
        edges[np.unravel_index(best.argmax(), best.shape)] = True
    return edges & graph.edges


def pruned(graph: Graph, edges: Edges) -> Edges:
    """Those edges that lie on a way from the input to the unembedding: the rest can neither hear nor be heard."""
    owners, kept = graph.owners, edges & graph.edges
    while True:
        heard = np.r_[True, np.zeros(len(graph.writers) - 1, bool)] | owners[kept.any(1)].any(0)
        hears = owners[:, kept.any(0)].any(1) | (np.arange(len(owners)) == len(owners) - 1)
        left = kept & heard & hears[:, None]
        if (left == kept).all():
            return kept
        kept = left


def random_edges(graph: Graph, count: int, seed: int) -> Edges:
    """A random circuit that hangs together, of ``count`` edges or a few more: ways from input to output through random
    edges, until there are enough."""
    _check_count(graph, count)
    rng, owners = np.random.default_rng(seed), graph.owners
    edges, order = np.zeros(graph.edges.shape, bool), np.argwhere(graph.edges)
    for reader, writer in order[rng.permutation(len(order))]:
        if edges.sum() >= count:
            break
        edges[reader, writer] = True
        while writer != 0:  # down to the input
            below = rng.choice(np.flatnonzero(owners[:, writer]))
            writer = int(rng.integers(graph.readers[below].writers))
            edges[below, writer] = True
        while reader != len(owners) - 1:  # up to the unembedding
            node = int(rng.choice(np.flatnonzero(owners[reader])))
            above = np.flatnonzero(graph.edges[:, node])
            reader = int(rng.choice(above))
            edges[reader, node] = True
    return edges


def _check_count(graph: Graph, count: int) -> None:
    if not 1 <= count <= graph.n_edges:
        raise UserError(f"a circuit has 1 to {graph.n_edges} edges of this graph, got {count}")


# Running


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CircuitScores:
    """What circuits make of the metric."""

    semantics: str
    base: Float[np.ndarray, " B"]
    """The metric of the run."""
    target: Float[np.ndarray, " B"]
    """That of its source."""
    scores: Float[np.ndarray, "C B"]
    weights: Float[np.ndarray, " B"]
    """Of rows in means: their share of all readings."""

    @property
    def faithfulness(self) -> Float[np.ndarray, " C"]:
        """The share of the metric's change that a circuit makes: a ratio of sums, no mean of ratios."""
        change = float((self.target - self.base) @ self.weights)
        return ((self.scores - self.base) @ self.weights) / change


def run_circuits(
    model: Model,
    rows: Rows,
    metric: Objective,
    source: Rows | Intervention,
    graph: Graph,
    circuits: Sequence[Edges],
    *,
    semantics: str = "ablate outside",
    edits: Intervention | None = None,
) -> CircuitScores:
    """The metric of every row under every circuit. Errors as ``attribute_edges``, and for circuits of another graph.

    Many parameters: the two runs, and what of them is put together."""
    check_choice("semantics", semantics, get_args(Semantics))
    pytree, found = metric_of(metric, model.config)
    check_answer(found, rows)
    if found.sites or found.spans:
        raise UserError("circuits are judged by what the model says: the metric may read logits and answers")
    if isinstance(source, Rows):
        check_lengths(rows, source)
    masks = np.stack([np.asarray(circuit, bool) for circuit in circuits])
    if masks.shape[1:] != graph.edges.shape or (masks & ~graph.edges).any():
        raise UserError(f"circuits must be edges of the graph {list(graph.edges.shape)}, got {list(masks.shape[1:])}")
    count, length = rows.tokens.shape
    slots = rows_at_once(
        "Running circuits",
        model,
        row_bytes(model.config, length, rows.read.shape[1]) + 12 * len(graph.writers) * length * model.config.d_model,
        count * max(1, min(len(masks), room() // (count * length))),
        lambda n: _lowered(
            model, abstract_rows(model, rows, n // count * count or n), edits, pytree, count, needs=found, graph=graph
        ),
    )
    if slots < count:  # not even one circuit for all rows: some rows after the others
        parts = [slice(i, i + slots) for i in range(0, count, slots)]
        sources = [source.take(part) if isinstance(source, Rows) else source for part in parts]
        given: dict[str, Any] = dict(graph=graph, circuits=circuits, semantics=semantics, edits=edits)
        each = [run_circuits(model, rows.take(p), metric, own, **given) for p, own in zip(parts, sources, strict=True)]
        base, target, scored = (
            np.concatenate([getattr(one, name) for one in each], axis=-1) for name in ("base", "target", "scores")
        )
        weights = rows.readings.sum(-1) / rows.readings.sum()
        return CircuitScores(semantics=semantics, base=base, target=target, scores=scored, weights=weights)
    outside = semantics == "ablate outside"
    masks = graph.edges & ~masks if outside else masks
    one = on_devices(model, rows)
    other = on_devices(model, source) if isinstance(source, Rows) else one
    streams, ends = two_runs(model, one, other, source, edits, pytree, found, graph.start)
    streams = streams if outside else streams[::-1]
    call = partial(written, model.params, model.config, one, start=graph.start)
    recorded = call(streams[0], edits).stacked()
    groups = slots // count
    many = on_devices(model, jax.tree.map(lambda a: np.tile(a, (groups, *[1] * (np.ndim(a) - 1))), rows))
    begin = jnp.tile(streams[1], (groups, 1, 1))
    values = []
    for first in range(0, len(masks), groups):
        part = masks[np.minimum(np.arange(first, first + groups), len(masks) - 1)].repeat(count, axis=0)
        got = _run(
            model.params, model.config, many, begin, recorded, jnp.asarray(part), edits, pytree,
            needs=found, start=graph.start, per=graph.per,
        )  # fmt: skip
        values.append(to_host(got).reshape(groups, count))
    weights = rows.readings.sum(-1) / rows.readings.sum()
    scored = np.concatenate(values)[: len(masks)].astype(np.float64)
    return CircuitScores(semantics=semantics, base=ends[0], target=ends[1], scores=scored, weights=weights)


def _lowered(
    model: Model, rows: Rows, edits: Intervention | None, metric: Any, count: int, *, needs: Needs, graph: Graph
) -> jax.stages.Lowered:
    """The program for slots of these shapes, of ``count`` rows for each circuit, or fewer where there are not so
    many."""
    before = lambda params, rows: stream_before(params, model.config, rows, edits, start=graph.start)  # noqa: E731
    x = abstract_rows(model, jax.eval_shape(before, model.params, rows))
    slots, one = len(rows.tokens), min(count, len(rows.tokens))
    recorded = jax.ShapeDtypeStruct((len(graph.writers), one, *x.shape[1:]), jnp.float32)
    masks = jax.ShapeDtypeStruct((slots, *graph.edges.shape), bool)
    given = (model.params, model.config, rows, x, recorded, masks, edits, metric)
    return _run.lower(*given, needs=needs, start=graph.start, per=graph.per)


def _by_layer(masks: Bool[Array, "S R W"], config: ModelConfig, per: str) -> dict[str, Array]:
    """The masks of the readers of every layer, by kind of site: [l, S, heads, W] (MLP: [l, S, 1, W])."""
    sizes = (config.n_heads, config.n_kv_heads, config.n_kv_heads, 1)
    own = sizes if per == "head" else (1, 1, 1, 1)
    layers = jnp.moveaxis(masks[:, :-1].reshape(len(masks), -1, sum(own), masks.shape[-1]), 1, 0)
    parts = jnp.split(layers, np.cumsum(own)[:-1], axis=2)
    return {
        kind: jnp.broadcast_to(part, (*part.shape[:2], size, part.shape[-1])).astype(jnp.float32)
        for kind, part, size in zip(READERS, parts, sizes, strict=True)
    }


@partial(jax.jit, static_argnames=("config", "needs", "start", "per"))
def _run(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "S T D"],
    recorded: Float[Array, "W B T D"],
    masks: Bool[Array, "S R W"],
    edits: Intervention | None,
    metric: Any,
    *,
    needs: Needs,
    start: int,
    per: str,
) -> Float[Array, " S"]:
    """Scores of slots in which every masked edge carries what was recorded. Many parameters: the run, and its edges."""
    context, own_tap = opened_rows(params, config, rows, edits)
    n, groups = config.n_heads, x.shape[0] // recorded.shape[1]
    record = jnp.tile(recorded, (1, groups, 1, 1))
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def layer_of(
        carry: tuple[Array, Array], inputs: tuple[Array, dict[str, Array]]
    ) -> tuple[tuple[Array, Array], None]:
        x, now = carry
        layer, wanted = inputs
        weights, held = layer_weights(params, layer), {"now": now}
        first = 1 + (layer - start) * (n + 1)

        def write(value: Array, at: Array) -> None:
            held["now"] = lax.dynamic_update_slice_in_dim(held["now"], value, at, 0)

        def change(kind: str, _: Any, value: Array) -> Array:
            if kind in READERS:
                gap = record - held["now"]
                added = product("snw,wstd->stnd", wanted[kind], gap)
                return value + (added if value.ndim == 4 else added[:, :, 0]).astype(value.dtype)
            if kind == "hook_mlp_out":
                write(value.astype(jnp.float32)[None], first + n)
            elif kind == "hook_attn_out":
                heads = held["attn.hook_result"].astype(jnp.float32)
                if weights.post_attn_norm is not None:
                    scaled = norm_weight(weights.post_attn_norm, config)
                    heads = heads / held["ln1_post.hook_scale"][..., None] * scaled
                write(jnp.moveaxis(heads, 2, 0), first)
            else:
                held[kind] = value
            return value

        kinds = {*READERS, "attn.hook_result", "hook_attn_out", "hook_mlp_out"}
        kinds |= {"ln1_post.hook_scale"} if config.post_norms else set()
        tap = joined(own_tap, Tap(frozenset(kinds), change))
        x = block(weights, config, x, context, Visit(tap, layer=layer))
        return (x, held["now"]), None

    now = jnp.zeros_like(record).at[0].set(x.astype(jnp.float32))
    layers = jnp.arange(start, config.n_layers), _by_layer(masks, config, per)
    (x, now), _ = lax.scan(layer_of, (x, now), layers)
    x = x + product("sw,wstd->std", masks[:, -1].astype(jnp.float32), record - now).astype(x.dtype)
    return scores(metric, composed(params, config, needs, x, ({}, {}), layout_of(rows), own_tap), rows)


def curve(
    found: EdgeScores, sizes: Sequence[int], *, end: str = "output", random: int = 100, seed: int = 0
) -> tuple[list[Edges], list[list[Edges]]]:
    """Greedy circuits of several sizes, and for each ``random`` connected ones of (about) as many edges."""
    chosen = [pruned(found.graph, greedy_edges(found, size, end=end)) for size in sizes]
    count = [max(1, int(edges.sum())) for edges in chosen]
    controls = [[random_edges(found.graph, n, seed * 1_000_003 + i) for i in range(random)] for n in count]
    return chosen, controls
