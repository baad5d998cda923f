"""Circuits as files: the JSON of EAP-IG (hannamw/EAP-IG), which the MIB benchmark takes.

    {"cfg": {"n_layers", "n_heads", "d_model", "parallel_attn_mlp"},
     "nodes": {"a5.h2": {"in_graph": true, "score": 0.1}, ...},
     "edges": {"m3->a5.h2<q>": {"score": 0.1, "in_graph": true}, ...}}

There every head has keys and values of its own. A reader that several heads share here ("a5.g1<k>", or a whole layer's
"a5<q>") is written as the readers of all its heads, each with an equal part of the score, and in the circuit like it;
read back, parts are added up. So sums of scores (a node is the sum of its edges) are the same in both.

A file of ours has one more object, "jaxsteer", which says of which model and how; others leave it alone. The scores of
others are of the same sign: the metric with the corrupted value minus the metric without it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsteer.circuits.circuit import Edges
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph, Reader
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files.json_files import kind_of, read_json
from jaxsteer.files.whole import write_text
from jaxsteer.models.model import Model

OWN = "jaxsteer"
"""Where a file says what EAP-IG's layout has no place for."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedCircuit:
    """A circuit from a file, with the scores that chose it."""

    scores: EdgeScores
    """Of another tool's file: its ``method`` is "EAP-IG file", and what the file does not say is 0 or NaN."""
    edges: Edges
    """Whether each edge is in the circuit, by reader and writer."""
    divided: int
    """Edges to a shared reader of which the file has only some heads in its circuit. They are in ``edges``."""


def save_circuit(path: str | os.PathLike[str], model: Model, scores: EdgeScores, edges: Edges | None = None) -> None:
    """Write scores and a circuit (by default every edge) in EAP-IG's layout, whole or not at all.

    Of a graph that begins above block 0 the file has its own blocks alone; its input is the stream before them.
    Raises ``UserError`` for scores of another model, and for edges beyond the graph.
    """
    graph = scores.graph
    if scores.fingerprint != model.fingerprint:
        raise UserError(f"the scores are of {scores.model}, not of {model.name}: give the model that they are of")
    edges = graph.edges if edges is None else edges
    if edges.shape != graph.edges.shape or (edges & ~graph.edges).any():
        raise UserError(f"a circuit must be edges of the graph, bool {list(graph.edges.shape)}")
    matrix, ours = scores.matrix, graph.owners
    read = np.asarray(edges.any(1))
    used = np.asarray(edges.any(0) | (ours & read[:, None]).any(0))
    nodes: dict[str, Any] = {
        name: {"in_graph": bool(used[i]), "score": scores.nodes[i]} for i, name in enumerate(graph.writers)
    }
    nodes["logits"] = {"in_graph": True}
    table: dict[str, Any] = {}
    for row, reader in enumerate(graph.readers):
        names = ungrouped(graph, reader)
        for column in range(reader.writers):
            value = {"score": float(matrix[row, column]) / len(names), "in_graph": bool(edges[row, column])}
            table |= {f"{graph.writers[column]}->{name}": value for name in names}
    config = model.config
    record = {
        "cfg": {"n_layers": config.n_layers, "n_heads": config.n_heads, "parallel_attn_mlp": False,
                "d_model": config.d_model},
        "nodes": nodes, "edges": table,
        OWN: {name: value for name, value in scores.to_json().items() if name not in ("nodes", "values")},
    }  # fmt: skip
    write_text(path, json.dumps(record) + "\n")


def load_circuit(path: str | os.PathLike[str], model: Model) -> SavedCircuit:
    """The scores and the circuit in a file of EAP-IG's layout, for a model.

    An edge is in the circuit where the file says so of it and of both its nodes. Edges that the file does not name are
    outside, with score 0. Where it gives no scores of nodes, a node's is the sum of its edges.

    Raises:
        UserError: for a file that is none, of other sizes or of another model, with nodes or edges that the graph does
            not have, with circuits of single neurons, and with values of other types; the message names the place.
    """
    record = read_json(path, nan=True)
    parts = {}
    for key in ("cfg", "nodes", "edges"):
        if not isinstance(record.get(key), Mapping):
            raise UserError(
                f"{path} is no circuit in EAP-IG's layout: {key!r} is "
                f"{kind_of(record[key]) if key in record else 'missing'}, expected an object"
            )
        parts[key] = record[key]
    _check_sizes(path, parts["cfg"], model)
    own = _own(path, record.get(OWN), model)
    graph = own.graph
    inside = {name: _flag(path, "nodes", name, entry) for name, entry in parts["nodes"].items()}
    refuse_unknown(inside, (*graph.writers, "logits"), "node", f"{path}: ")
    for name, entry in parts["nodes"].items():
        if entry.get("neurons") is not None and not all(map(bool, entry["neurons"])):
            raise UserError(f"{path}: node {name} is in the circuit with some neurons: only whole nodes are read")
    matrix, heads, edges = _edges(path, parts["edges"], graph, inside)
    values = matrix[graph.edges]
    nodes = _node_scores(path, parts["nodes"], graph)
    scores = dataclasses.replace(
        own, values=tuple(values.tolist()), nodes=tuple((matrix.sum(0) if nodes is None else nodes).tolist())
    )
    divided = int(((heads > 0) & (heads < edges)).sum())
    return SavedCircuit(scores=scores, edges=heads > 0, divided=divided)


def ungrouped(graph: Graph, reader: Reader) -> list[str]:
    """EAP-IG's names of a reader: of all heads that share it."""
    if not reader.site.startswith("hook_") or reader.site in ("hook_mlp_in", "hook_resid_post"):
        return [reader.name]
    letter, each = reader.name[-2], graph.heads // graph.kv_heads
    if reader.head < 0:
        heads = range(graph.heads)
    else:
        width = 1 if letter == "q" else each
        heads = range(reader.head * width, (reader.head + 1) * width)
    return [f"a{reader.layer}.h{head}<{letter}>" for head in heads]


def _check_sizes(path: Any, given: Mapping[str, Any], model: Model) -> None:
    config = model.config
    for key, value in (("n_layers", config.n_layers), ("n_heads", config.n_heads), ("d_model", config.d_model)):
        if key in given and given[key] != value or key not in given and key != "d_model":
            found = given.get(key, "missing")
            raise UserError(
                f"{path} is a circuit of another model: its {key} is {found!r:.40}, that of {model.name} is {value}"
            )
    if given.get("parallel_attn_mlp"):
        raise UserError(f"{path} is of a model whose MLPs run beside attention; those of {model.name} run after it")


def _own(path: Any, record: Any, model: Model) -> EdgeScores:
    """The scores that the file describes, without their numbers."""
    config = model.config
    if record is None:
        return EdgeScores(
            model=model.name, fingerprint=model.fingerprint, n_layers=config.n_layers, heads=config.n_heads,
            kv_heads=config.n_kv_heads, start=0, per="head", method="EAP-IG file", steps=0, rule="", rows=0, readings=0,
            base=math.nan, target=math.nan, nodes=(), values=(),
        )  # fmt: skip
    if not isinstance(record, Mapping):
        raise UserError(f"{path}: {OWN!r} is {kind_of(record)}, expected an object")
    found = EdgeScores.from_json({**record, "nodes": [], "values": []}, f"{path}: {OWN}")
    if found.fingerprint != model.fingerprint:
        raise UserError(
            f"{path} is a circuit of another model: of {found.model} (fingerprint {found.fingerprint[:12]!r}), not of "
            f"{model.name} ({model.fingerprint[:12]!r})"
        )
    if found.graph != Graph.of(config, start=found.start, per=found.per):
        raise UserError(f"{path}: the graph {found.graph} is none of {model.name}")
    return found


def _edges(
    path: Any, given: Mapping[str, Any], graph: Graph, inside: Mapping[str, bool]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By reader and writer: scores, in how many of a reader's heads the edge is in the circuit, and of how many."""
    writers = {name: i for i, name in enumerate(graph.writers)}
    readers = {name: i for i, reader in enumerate(graph.readers) for name in ungrouped(graph, reader)}
    matrix = np.zeros(graph.edges.shape)
    heads, every = np.zeros(graph.edges.shape, int), np.zeros(graph.edges.shape, int)
    for name, entry in given.items():
        writer, _, reader = name.partition("->")
        if reader not in readers or writer not in writers or not graph.edges[readers[reader], writers[writer]]:
            raise UserError(
                f"{path}: the graph of blocks {graph.start} to {graph.n_layers - 1} has no edge {name[:60]!r}; edges "
                f"are named as 'input->a{graph.start}.h0<q>'"
            )
        place = readers[reader], writers[writer]
        chosen = _flag(path, "edges", name, entry)
        matrix[place] += _number(path, "edges", name, entry)
        heads[place] += chosen and inside.get(writer, True) and inside.get(reader.partition("<")[0], True)
        every[place] += 1
    return matrix, heads, np.maximum(every, [[len(ungrouped(graph, reader))] for reader in graph.readers])


def _node_scores(path: Any, given: Mapping[str, Any], graph: Graph) -> np.ndarray | None:
    """The writers' scores where the file has all of them."""
    found = [given.get(name, {}).get("score") for name in graph.writers]
    if any(value is None or value != value for value in found):
        return None
    return np.array([_number(path, "nodes", name, given[name]) for name in graph.writers])


def _flag(path: Any, where: str, name: str, entry: Any) -> bool:
    value = entry.get("in_graph") if isinstance(entry, Mapping) else entry
    if not isinstance(value, bool) or not isinstance(entry, Mapping):
        raise UserError(f"{path}: {where}.{name[:60]}.in_graph must be true or false, got {kind_of(value)}")
    return value


def _number(path: Any, where: str, name: str, entry: Mapping[str, Any]) -> float:
    value = entry.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {where}.{name[:60]}.score must be a finite number, got {value!r:.40}")
    return float(value)
