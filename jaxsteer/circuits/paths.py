"""Direct path patching: what a writer says to one reader, replaced, and nothing else (edges by forward passes).

The writer's change from the run to its source is added to the input of the reader alone. What the reader then does goes
on through the model; all that lies between the two stays as it was. Edges are a batch axis of one program.

Letters: B rows, T tokens, D width, E edges, S = G B slots of a call with G edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsteer.circuits.graph import Graph, Per
from jaxsteer.circuits.memory import abstract_rows, row_bytes, rows_at_once
from jaxsteer.circuits.rows import Rows, check_answer, check_lengths, metric_of, on_devices
from jaxsteer.circuits.runs import score_from, stream_before, two_runs, written
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.taps import Intervention, Tap
from jaxsteer.objectives.reads import Needs, Objective
from jaxsteer.processes import to_host
from jaxsteer.steer.completions import room

SITES = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_resid_post")
"""Where readers read; the unembedding reads the last stream."""


@struct.dataclass
class _Readers:
    """The reader of every slot."""

    site: Int[Array | np.ndarray, " S"]
    """Index into ``SITES``."""
    layer: Int[Array | np.ndarray, " S"]
    head: Int[Array | np.ndarray, " S"]
    """-1 for all heads, or where there are none."""

    def tap(self, change: Float[Array, "S T D"]) -> Tap:
        """The tap that adds each slot's change to what its reader is given."""

        def add(kind: str, layer: Any, value: Array) -> Array:
            here = (self.site == SITES.index(kind)) & (self.layer == layer)
            if value.ndim == 3:
                return value + jnp.where(here[:, None, None], change, 0).astype(value.dtype)
            own = (self.head[:, None] < 0) | (self.head[:, None] == jnp.arange(value.shape[2]))
            own = (here[:, None] & own)[:, None, :, None]
            return value + jnp.where(own, change[:, :, None], 0).astype(value.dtype)

        return Tap(frozenset(SITES), add)


def patch_edges(
    model: Model,
    rows: Rows,
    metric: Objective,
    source: Rows | Intervention,
    edges: Sequence[str],
    *,
    start: int = 0,
    edits: Intervention | None = None,
    per: Per = "head",
) -> Float[np.ndarray, "B E"]:
    """The exact effects of edges, one at a time: the metric with the edge patched minus the metric without it.

    Many parameters: those of ``attribute_edges``, whose errors these are. ``edges`` are names ("a0.h1->a2.h3<q>",
    "input->logits"). Raises ``UserError`` for one that the graph does not have.
    """
    graph = Graph.of(model.config, start=start, per=per)
    pytree, found = metric_of(metric, model.config)
    check_answer(found, rows)
    if isinstance(source, Rows):
        check_lengths(rows, source)
    if not edges:
        raise UserError("no edge was given: name at least one, e.g. 'input->logits'")
    places = [graph.edge(edge) for edge in edges]
    count, length = rows.tokens.shape
    slots = rows_at_once(
        "Patching edges",
        model,
        row_bytes(model.config, length, rows.read.shape[1]) + 4 * len(graph.writers) * length * model.config.d_model,
        count * max(1, min(len(edges), room() // (count * length))),
        lambda n: _lowered(
            model, abstract_rows(model, rows, n // count * count or n), edits, pytree, count, needs=found, graph=graph
        ),
    )
    if slots < count:  # not even one edge for all rows: some rows after the others
        parts = [slice(i, i + slots) for i in range(0, count, slots)]
        sources = [source.take(part) if isinstance(source, Rows) else source for part in parts]
        given: dict[str, Any] = dict(edges=edges, start=start, edits=edits, per=per)
        pairs = zip(parts, sources, strict=True)
        return np.concatenate([patch_edges(model, rows.take(part), metric, own, **given) for part, own in pairs])
    groups = math.ceil(len(edges) / math.ceil(len(edges) / (slots // count)))
    many = on_devices(model, jax.tree.map(lambda a: np.tile(a, (groups, *[1] * (np.ndim(a) - 1))), rows))
    one = on_devices(model, rows)
    other = on_devices(model, source) if isinstance(source, Rows) else one
    streams, _ = two_runs(model, one, other, source, edits, pytree, found, start)
    wrote = [written(model.params, model.config, one, x, edits, start=start) for x in streams]
    writers = _changes(*wrote)
    go = partial(_patched, model.params, model.config, many, jnp.tile(streams[0], (groups, 1, 1)), edits, pytree)
    go = partial(go, needs=found, start=start)
    none = _Readers(*np.full((3, groups * count), -2, np.int32))
    base = to_host(go(writers, np.zeros(groups, np.int32), none))
    effects = []
    for begin in range(0, len(edges), groups):
        here = places[begin : begin + groups]
        readers = [graph.readers[reader] for reader, _ in here]
        table = [[SITES.index(r.site), r.layer, r.head] for r in readers] + [[-2] * 3] * (groups - len(here))
        columns = np.asarray(table, np.int32).repeat(count, axis=0).T
        from_writer = np.asarray([writer for _, writer in here] + [0] * (groups - len(here)), np.int32)
        moved = to_host(go(writers, from_writer, _Readers(*columns))) - base
        effects.append(moved.reshape(groups, count)[: len(here)])
    return np.concatenate(effects).T


def _lowered(
    model: Model, rows: Rows, edits: Intervention | None, metric: Any, count: int, *, needs: Needs, graph: Graph
) -> jax.stages.Lowered:
    """The program for slots of these shapes, of ``count`` rows for each edge, or fewer where there are not so many."""
    before = lambda params, rows: stream_before(params, model.config, rows, edits, start=graph.start)  # noqa: E731
    x = abstract_rows(model, jax.eval_shape(before, model.params, rows))
    slots, one = len(rows.tokens), min(count, len(rows.tokens))
    changes = jax.ShapeDtypeStruct((len(graph.writers), one, *x.shape[1:]), jnp.float32)
    numbers = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (slots // one, slots, slots, slots)]
    readers: Any = numbers[1:]
    given = (model.params, model.config, rows, x, edits, metric, changes, numbers[0], _Readers(*readers))
    return _patched.lower(*given, needs=needs, start=graph.start)


@jax.jit
def _changes(run: Any, source: Any) -> Float[Array, "W B T D"]:
    return source.stacked() - run.stacked()


@partial(jax.jit, static_argnames=("config", "needs", "start"))
def _patched(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "S T D"],
    edits: Intervention | None,
    metric: Any,
    changes: Float[Array, "W B T D"],
    writer: Int[Array | np.ndarray, " G"],
    readers: _Readers,
    *,
    needs: Needs,
    start: int,
) -> Float[Array, " S"]:
    """Scores of the slots. Many parameters: the run, and what is put into it."""
    change = changes[writer].reshape(x.shape)
    tap = readers.tap(change)
    return score_from(params, config, rows, x, edits, metric, needs=needs, start=start, tap=tap)
