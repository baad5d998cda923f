"""Attribution: gradient times difference, for every value at sites, every writer of the stream, and every edge.

Two runs of the same tokens (or of two texts of equal length) are compared, the run of ``rows`` and its source. With
D_u what writer u adds in the source minus what it adds in the run, and g the gradient of the metric in between:

    edge  IE(u -> d) = sum over tokens of D_u . g at the input of reader d
    node  IE(u)      = sum over tokens of D_u . g behind writer u     = the sum of its edges: the stream is a sum

"inputs" (EAP-IG, 2403.17806): g is averaged along the straight line between the streams before the first block of the
graph; with a steering vector added there, that is along its coefficient, and IE(input) tends to the whole effect. One
step with ``rule="left"`` is EAP (2310.10348). "activations": g is averaged while the outputs of attention, or of the
MLP, of one layer go along their own line, and everything above follows. "nodes": likewise, but every head goes alone,
so that a node's score tends to its exact effect; attention takes as many times as long as a layer has heads.

Letters: B rows, T tokens, D width, N heads, K key/value heads, l blocks of the graph, S writers, R readers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph, Per
from jaxsteer.circuits.memory import abstract_rows, row_bytes, rows_at_once
from jaxsteer.circuits.rows import Rows, check_answer, check_lengths, metric_of, on_devices
from jaxsteer.circuits.runs import Written, alphas, score_from, stream_before, two_runs, written
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sites import Site
from jaxsteer.models.taps import NO_TAP, Intervention, Tap, checked
from jaxsteer.objectives.reads import Needs, Objective
from jaxsteer.objectives.terms import check_choice
from jaxsteer.processes import to_host

Method = Literal["inputs", "activations", "nodes"]
Rule = Literal["midpoint", "left", "half"]


def attribute_edges(
    model: Model,
    rows: Rows,
    metric: Objective,
    source: Rows | Intervention,
    *,
    start: int = 0,
    edits: Intervention | None = None,
    method: str = "inputs",
    steps: int = 10,
    rule: str = "midpoint",
    per: Per = "head",
    batch: int | None = None,
) -> EdgeScores:
    """Scores of all edges and nodes: how much of the metric's change each carries, in the mean over rows.

    Rows count by their number of readings, so that a metric per reading is averaged over all of them. Many parameters:
    what is compared, and how the gradients are taken.

    Args:
        source: edits that steer the same tokens, or another text of equal lengths.
        start: the first block of the graph. Its input is the stream before that block, so that edits of the source must
            act on it, or below: the source is what follows from there.
        edits: under which both runs are; with patterns and norms replaced by fixed ones the model is linear, say.
        steps: points on the way from the run to its source.
        rule: their places: the middles of equal parts, their left ends (as released code has it), or the middles of
            equal parts of the "half" that begins at the run. An edge alone changes its reader by less than the whole
            way does, so that "half" ranks edges better; but its scores do not add up to the whole change.
        per: whether queries, keys and values are read head by head, or layer by layer.
        batch: rows of one pass, by default as many as fit.

    Raises:
        UserError: for sources of other lengths, edits of the source above ``start``, edits with an array per row, and
            metrics that are not one finite number per reading.
    """
    check_choice("method", method, get_args(Method))
    check_choice("rule", rule, get_args(Rule))
    graph = Graph.of(model.config, start=start, per=per)
    pytree, found = metric_of(metric, model.config)
    check_answer(found, rows)
    if isinstance(source, Rows):
        check_lengths(rows, source)
    for each in (edits, source):
        if isinstance(each, Intervention):
            checked(each, model.config, None)
            if each.rows is not None:
                raise UserError("give edits that serve all rows, not one for each")
    size = batch or rows_at_once(
        "Attribution",
        model,
        _bytes_of_a_row(model.config, rows, graph),
        len(rows.tokens),
        lambda n: _lowered(model, abstract_rows(model, rows, n), edits, pytree, steps, needs=found, graph=graph),
        advice="shorten the texts, or begin at a later block (start).",
    )
    weights = rows.readings.sum(-1) / rows.readings.sum()
    matrix: Any = 0.0
    nodes: Any = 0.0
    ends: list[np.ndarray] = []
    for begin in range(0, len(rows.tokens), size):
        index = np.arange(begin, begin + size)
        spare, index = index >= len(rows.tokens), index % len(rows.tokens)
        part = on_devices(model, rows.take(index))
        other = on_devices(model, source.take(index)) if isinstance(source, Rows) else part
        streams, scored = two_runs(model, part, other, source, edits, pytree, found, start)
        weight = jnp.asarray(np.where(spare, 0, weights[index]), jnp.float32)
        given = (model.params, model.config, part, *streams, edits, pytree, weight, alphas(steps, rule))
        if method == "inputs":
            edges, own = along_inputs(*given, needs=found, start=start, per=per)
        else:
            edges, own = _activations(*given, alone=method == "nodes", needs=found, start=start, per=per)
        matrix, nodes = matrix + to_host(edges).astype(np.float64), nodes + to_host(own).astype(np.float64)
        ends.append(scored[:, ~spare])
    base, target = np.concatenate(ends, axis=1).astype(np.float64) @ weights
    values = np.where(graph.edges, matrix, 0.0)
    if not np.isfinite(values).all():
        raise UserError(f"scores are NaN or infinite. {LOGITS_NOT_FINITE}")
    return EdgeScores(
        model=model.name, fingerprint=model.fingerprint, n_layers=graph.n_layers, heads=graph.heads,
        kv_heads=graph.kv_heads, start=start, per=per, method=method, steps=steps, rule=rule, rows=len(rows.tokens),
        readings=int(rows.readings.sum()), base=float(base), target=float(target),
        nodes=tuple(nodes.tolist()), values=tuple(values[graph.edges].tolist()),
    )  # fmt: skip


def _bytes_of_a_row(config: ModelConfig, rows: Rows, graph: Graph) -> int:
    """About what one row takes: what is written, read and differentiated in all blocks is held at once."""
    length, blocks = rows.tokens.shape[1], config.n_layers - graph.start
    inputs = blocks * (config.n_heads + 2 * config.n_kv_heads + 3)
    streams = 4 * length * config.d_model * (3 * len(graph.writers) + 2 * inputs)
    return streams + blocks * row_bytes(config, length, 0) + row_bytes(config, 0, rows.read.shape[1])


def _lowered(
    model: Model, rows: Rows, edits: Intervention | None, metric: Any, steps: int, *, needs: Needs, graph: Graph
) -> jax.stages.Lowered:
    """The program for rows of these shapes."""
    before = lambda params, rows: stream_before(params, model.config, rows, edits, start=graph.start)  # noqa: E731
    x = abstract_rows(model, jax.eval_shape(before, model.params, rows))
    weight = abstract_rows(model, jax.ShapeDtypeStruct(x.shape[:1], jnp.float32))
    given = (model.params, model.config, rows, x, x, edits, metric, weight, np.zeros(steps, np.float32))
    return along_inputs.lower(*given, needs=needs, start=graph.start, per=graph.per)


# Gradients


def _gradients(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    edits: Intervention | None,
    metric: Any,
    *,
    needs: Needs,
    start: int,
    tap: Tap = NO_TAP,
) -> dict[str, Array]:
    """Gradients of the summed scores at the inputs of all readers and behind all writers, by kind of site [l, B, T,
    ...]; at the stream before block ``start`` under "input". Many parameters: as ``score_from``."""
    count, length, width = x.shape
    blocks = range(start, config.n_layers)
    heads = {"hook_q_input": config.n_heads, "hook_k_input": config.n_kv_heads, "hook_v_input": config.n_kv_heads}
    shapes: dict[str, tuple[int, ...]] = {kind: (count, length, n, width) for kind, n in heads.items()}
    shapes |= {kind: x.shape for kind in ("hook_mlp_in", "hook_attn_out", "hook_mlp_out")}
    zeros = {Site(layer, kind): jnp.zeros(shape, x.dtype) for kind, shape in shapes.items() for layer in blocks}
    last = Site(config.n_layers - 1, "hook_resid_post")
    zeros[last] = jnp.zeros_like(x)

    def score(x: Array, added: dict[Site, Array]) -> Array:
        given = dict(params=params, config=config, rows=rows, edits=edits, metric=metric)
        return score_from(x=x, needs=needs, start=start, tap=tap, added=added, **given).sum()

    slope, slopes = jax.grad(score, argnums=(0, 1))(x, zeros)
    found = {kind: jnp.stack([slopes[Site(layer, kind)] for layer in blocks]).astype(jnp.float32) for kind in shapes}
    return found | {"input": slope.astype(jnp.float32), "logits": slopes[last].astype(jnp.float32)}


def _readers(slopes: dict[str, Array], per: str) -> Float[Array, "R B T D"]:
    """The gradients at the inputs of all readers, in the graph's order."""
    parts = []
    for kind in ("hook_q_input", "hook_k_input", "hook_v_input"):
        heads = jnp.moveaxis(slopes[kind], 3, 1)
        parts.append(heads if per == "head" else heads.sum(1, keepdims=True))
    layers = jnp.concatenate([*parts, slopes["hook_mlp_in"][:, None]], axis=1)
    return jnp.concatenate([layers.reshape(-1, *layers.shape[2:]), slopes["logits"][None]])


def _products(readers: Float[Array, "R B T D"], writers: Float[Array, "S B T D"]) -> Float[Array, "R S"]:
    return jnp.einsum("rbtd,sbtd->rs", readers, writers, precision=lax.Precision.HIGHEST)


def _of_nodes(slopes: dict[str, Array], change: Written, weight: Float[Array, " B"]) -> Float[Array, " S"]:
    """The writers' own scores, by the gradients behind them."""
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    heads = product("lbtnd,lbtd,b->ln", change.heads, slopes["hook_attn_out"], weight)
    mlps = product("lbtd,lbtd,b->l", change.mlps, slopes["hook_mlp_out"], weight)
    first = product("btd,btd,b->", change.input, slopes["input"], weight)
    return jnp.concatenate([first[None], jnp.concatenate([heads, mlps[:, None]], axis=1).reshape(-1)])


def averaged(gradients: Callable[[Array], Any], alphas: Float[Array | np.ndarray, " n"]) -> Any:
    """The mean of the gradients (a tree of arrays) at points on the way, one after the other."""
    shapes = jax.eval_shape(gradients, jax.ShapeDtypeStruct((), jnp.float32))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = lax.scan(lambda sums, at: (jax.tree.map(jnp.add, sums, gradients(at)), None), zeros, jnp.asarray(alphas))
    return jax.tree.map(lambda a: a / len(alphas), total)


@partial(jax.jit, static_argnames=("config", "needs", "start", "per"))
def along_inputs(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    other: Float[Array, "B T D"],
    edits: Intervention | None,
    metric: Any,
    weight: Float[Array, " B"],
    alphas: Float[Array | np.ndarray, " n"],
    *,
    needs: Needs,
    start: int,
    per: str,
) -> tuple[Float[Array, "R S"], Float[Array, " S"]]:
    """Edges and nodes with gradients along the line between the two streams. Many parameters: both runs and the way."""

    def at(alpha: Array) -> dict[str, Array]:
        between = (x + alpha * (other.astype(jnp.float32) - x.astype(jnp.float32))).astype(x.dtype)
        return _gradients(params, config, rows, between, edits, metric, needs=needs, start=start)

    runs = [written(params, config, rows, each, edits, start=start) for each in (x, other)]
    change = jax.tree.map(lambda a, b: b - a, *runs)
    slopes = averaged(at, alphas)
    edges = _products(_readers(slopes, per), change.stacked() * weight[:, None, None])
    return edges, _of_nodes(slopes, change, weight)


def _activations(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    other: Float[Array, "B T D"],
    edits: Intervention | None,
    metric: Any,
    weight: Float[Array, " B"],
    alphas: Float[np.ndarray, " n"],
    *,
    alone: bool,
    needs: Needs,
    start: int,
    per: str,
) -> tuple[Float[np.ndarray, "R S"], Float[np.ndarray, " S"]]:
    """Edges and nodes with gradients along every layer's own line, or that of each head ``alone``. Many parameters: as
    ``along_inputs``."""
    heads, blocks = config.n_heads, range(start, config.n_layers)
    whole = along_inputs(
        params, config, rows, x, other, edits, metric, weight, alphas, needs=needs, start=start, per=per
    )
    edges, nodes = (np.array(to_host(each)) for each in whole)  # of which the input's are right already
    runs = [written(params, config, rows, each, edits, start=start) for each in (x, other)]
    call = partial(_one_layer, params, config, rows, x, *runs, edits, metric, weight, alphas)
    for step, layer in enumerate(blocks):
        first = 1 + step * (heads + 1)
        for kind, own in (
            ("hook_attn_out", slice(first, first + heads)),
            ("hook_mlp_out", slice(first + heads, first + heads + 1)),
        ):
            moving = range(heads) if alone and kind == "hook_attn_out" else (-1,)
            given = dict(kind=kind, needs=needs, start=start, per=per)
            parts = [to_host(call(jnp.int32(layer), jnp.int32(head), **given)) for head in moving]
            edges[:, own], nodes[own] = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
    return edges, nodes


@partial(jax.jit, static_argnames=("config", "kind", "needs", "start", "per"))
def _one_layer(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    run: Written,
    other: Written,
    edits: Intervention | None,
    metric: Any,
    weight: Float[Array, " B"],
    alphas: Float[Array | np.ndarray, " n"],
    layer: Array,
    head: Array,
    *,
    kind: str,
    needs: Needs,
    start: int,
    per: str,
) -> tuple[Float[Array, "R s"], Float[Array, " s"]]:
    """Edges and nodes of the writers of one kind in one layer, or of one ``head`` (not -1) and 0 for the others. Many
    parameters: as ``along_inputs``."""
    own = lambda a: lax.dynamic_index_in_dim(a, layer - start, 0, keepdims=False)  # noqa: E731
    if kind == "hook_attn_out":
        before, after = (jnp.moveaxis(own(each.heads), 2, 0) for each in (run, other))
    else:
        before, after = (own(each.mlps)[None] for each in (run, other))
    moves = (head < 0) | (jnp.arange(len(before)) == head)
    difference = jnp.where(moves[:, None, None, None], after - before, 0)
    base, way = before.sum(0), difference.sum(0)
    if kind == "hook_attn_out" and params.layers.o_bias is not None:  # no head writes it
        base = base + lax.dynamic_index_in_dim(params.layers.o_bias, layer, 0, keepdims=False)

    def at(alpha: Array) -> dict[str, Array]:
        def change(_: str, here: Any, value: Array) -> Array:
            return jnp.where(jnp.asarray(here) == layer, (base + alpha * way).astype(value.dtype), value)

        tap = Tap(frozenset({kind}), change)
        return _gradients(params, config, rows, x, edits, metric, needs=needs, start=start, tap=tap)

    slopes, change = averaged(at, alphas), difference * weight[:, None, None]
    nodes = jnp.einsum("sbtd,btd->s", change, own(slopes[kind]), precision=lax.Precision.HIGHEST)
    return _products(_readers(slopes, per), change), nodes
