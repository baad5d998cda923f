"""Files of circuits: one that EAP-IG itself wrote, names of grouped heads there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer import UserError
from jaxsteer.circuits.circuit import pruned, random_edges, top_edges
from jaxsteer.circuits.circuit_files import OWN, load_circuit, save_circuit, ungrouped
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph, Per
from jaxsteer.models.model import Model
from tests.helpers.checkpoints import random_model, tiny_config

THEIRS = Path(__file__).parent / "eap_ig.json"
"""Written by hannamw/EAP-IG 795f560: ``Graph.from_model`` of 2 layers of 4 heads, random scores in three decimals,
``apply_topn(30)``, ``to_json``."""
GROUPED = dataclasses.replace(random_model(tiny_config(n_layers=2)), fingerprint="grouped")
PLAIN = random_model(tiny_config(n_layers=2, n_kv_heads=4))
RNG = np.random.default_rng(0)


def scores_of(model: Model, start: int = 0, per: Per = "head") -> EdgeScores:
    graph = Graph.of(model.config, start=start, per=per)
    values = RNG.standard_normal(graph.n_edges)
    matrix = np.zeros(graph.edges.shape)
    matrix[graph.edges] = values
    return EdgeScores(
        model=model.name, fingerprint=model.fingerprint, n_layers=2, heads=4, kv_heads=model.config.n_kv_heads,
        start=start, per=per, method="inputs", steps=3, rule="midpoint", rows=2, readings=2, base=-1.0, target=2.5,
        nodes=tuple(matrix.sum(0).tolist()), values=tuple(values.tolist()),
    )  # fmt: skip


def test_a_file_of_eap_ig_is_read_edge_by_edge() -> None:
    record = json.loads(THEIRS.read_text())
    found = load_circuit(THEIRS, PLAIN)
    names = found.scores.names
    assert sorted(names) == sorted(record["edges"])
    assert dict(zip(names, found.scores.values, strict=True)) == {n: e["score"] for n, e in record["edges"].items()}
    inside = {name for name, here in zip(names, found.edges[found.scores.graph.edges], strict=True) if here}
    assert inside == {name for name, edge in record["edges"].items() if edge["in_graph"]} and 0 < len(inside) <= 30
    # What is pruned there is pruned here, and the nodes of the circuit are the same.
    np.testing.assert_array_equal(pruned(found.scores.graph, found.edges), found.edges)
    np.testing.assert_array_equal(pruned(found.scores.graph, top_edges(found.scores, 30)), found.edges)
    graph = found.scores.graph
    writes = {name for name, here in zip(graph.writers, found.edges.any(0), strict=True) if here}
    assert writes | {"logits"} == {name for name, node in record["nodes"].items() if node["in_graph"]}
    assert found.scores.method == "EAP-IG file" and found.divided == 0 and found.scores.base != found.scores.base


def test_their_heads_are_the_heads_of_groups() -> None:
    """The same file for a model whose four heads share two keys and values: scores are added up."""
    record = json.loads(THEIRS.read_text())
    found = load_circuit(THEIRS, GROUPED)
    score = lambda name: record["edges"][name]["score"]  # noqa: E731
    inside = lambda name: record["edges"][name]["in_graph"]  # noqa: E731
    assert found.scores.of("m0->a1.g1<k>") == score("m0->a1.h2<k>") + score("m0->a1.h3<k>")
    assert found.scores.of("m0->a1.h2<q>") == score("m0->a1.h2<q>")
    divided = 0
    for layer in range(2):
        for writer in ("input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0")[: 1 if layer == 0 else 6]:
            for group in range(2):
                for kind in "kv":
                    both = [inside(f"{writer}->a{layer}.h{h}<{kind}>") for h in (2 * group, 2 * group + 1)]
                    edge = found.scores.graph.edge(f"{writer}->a{layer}.g{group}<{kind}>")
                    assert found.edges[edge] == any(both)
                    divided += any(both) and not all(both)
    assert found.divided == divided > 0
    np.testing.assert_allclose(found.scores.matrix.sum(0), found.scores.nodes, rtol=1e-12)
    total = sum(edge["score"] for edge in record["edges"].values())
    assert sum(found.scores.values) == pytest.approx(total)


@pytest.mark.parametrize(("start", "per"), [(0, "head"), (1, "head"), (0, "layer"), (1, "layer")])
def test_what_is_written_is_read_again(tmp_path: Path, start: int, per: Per) -> None:
    scores = scores_of(GROUPED, start, per)
    circuit = random_edges(scores.graph, 10, 0)
    save_circuit(tmp_path / "c.json", GROUPED, scores, circuit)
    found = load_circuit(tmp_path / "c.json", GROUPED)
    np.testing.assert_array_equal(found.edges, circuit)
    assert found.divided == 0
    np.testing.assert_allclose(found.scores.values, scores.values, rtol=1e-14)
    assert dataclasses.replace(found.scores, values=scores.values) == scores
    record = json.loads((tmp_path / "c.json").read_text())
    theirs = {name for name in json.loads(THEIRS.read_text())["edges"]}
    assert set(record["edges"]) <= theirs and (start or set(record["edges"]) == theirs)
    inside = {n for n, node in record["nodes"].items() if node["in_graph"]}
    own = scores.graph.owners
    for edge, reader in zip(*np.nonzero(circuit.T), strict=True):
        assert scores.graph.writers[edge] in inside
        assert not own[reader].any() or {scores.graph.writers[i] for i in np.flatnonzero(own[reader])} & inside
    save_circuit(tmp_path / "all.json", GROUPED, scores)
    assert load_circuit(tmp_path / "all.json", GROUPED).edges.sum() == scores.graph.n_edges


def test_names_of_shared_readers() -> None:
    graph = Graph.of(GROUPED.config)
    names = {reader.name: ungrouped(graph, reader) for reader in graph.readers}
    assert names["a1.g1<k>"] == ["a1.h2<k>", "a1.h3<k>"] and names["a1.h2<q>"] == ["a1.h2<q>"]
    assert names["m0"] == ["m0"] and names["logits"] == ["logits"]
    layers = Graph.of(GROUPED.config, per="layer")
    assert ungrouped(layers, layers.readers[1]) == [f"a0.h{h}<k>" for h in range(4)]


def test_nodes_outside_take_their_edges_along(tmp_path: Path) -> None:
    """A circuit of nodes, as the benchmark also takes them: all edges between the nodes that are in."""
    record = json.loads(THEIRS.read_text())
    for edge in record["edges"].values():
        edge["in_graph"] = True
    for name, node in record["nodes"].items():
        node["in_graph"] = name in ("input", "a0.h1", "m1", "logits")
    (tmp_path / "c.json").write_text(json.dumps(record))
    found = load_circuit(tmp_path / "c.json", PLAIN)
    inside = [n for n, here in zip(found.scores.names, found.edges[found.scores.graph.edges], strict=True) if here]
    assert sorted(inside) == sorted(
        ["input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "input->m1", "a0.h1->m1", "input->logits",
         "a0.h1->logits", "m1->logits"]
    )  # fmt: skip


def changed(**parts: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(THEIRS.read_text())
    for key, part in parts.items():
        record[key] = {**record[key], **part} if isinstance(part, dict) and key in record else part
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "holds a list where a JSON object"),
        ({"cfg": {}, "nodes": {}}, "no circuit in EAP-IG's layout: 'edges' is missing"),
        (changed(edges=3), "'edges' is a number, expected an object"),
        (changed(cfg={"n_layers": 12}), "another model: its n_layers is 12, that of random is 2"),
        (changed(cfg={"d_model": 768}), "another model: its d_model is 768"),
        (changed(cfg={"parallel_attn_mlp": True}), "MLPs run beside attention"),
        (changed(edges={"m1->a0.h0<q>": {"score": 0.0, "in_graph": False}}), "no edge 'm1->a0.h0<q>'"),
        (changed(edges={"input->m0": {"score": "1", "in_graph": True}}), "edges.input->m0.score must be a finite"),
        (changed(edges={"input->m0": {"score": float("nan"), "in_graph": True}}), "must be a finite number, got nan"),
        (changed(edges={"input->m0": {"score": 1.0, "in_graph": 1}}), "edges.input->m0.in_graph must be true or false"),
        (changed(edges={"input->m0": 1.0}), "edges.input->m0.in_graph must be true or false"),
        (changed(nodes={"m7": {"in_graph": True}}), "there is no node 'm7'"),
        (changed(nodes={"m0": {"in_graph": True, "neurons": [True, False]}}), "m0 is in the circuit with some neurons"),
        (changed(**{OWN: 3}), "'jaxsteer' is a number"),
        (changed(**{OWN: {"model": "m"}}), "fingerprint is missing"),
    ],
)
def test_what_is_refused(tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        load_circuit(tmp_path / "c.json", PLAIN)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    scores = scores_of(GROUPED)
    save_circuit(tmp_path / "c.json", GROUPED, scores)
    other = dataclasses.replace(GROUPED, fingerprint="x" * 64, name="other")
    with pytest.raises(UserError, match=r"of another model: of random \(fingerprint 'grouped'\), not of other"):
        load_circuit(tmp_path / "c.json", other)
    with pytest.raises(UserError, match="the scores are of random, not of other"):
        save_circuit(tmp_path / "d.json", other, scores)
    with pytest.raises(UserError, match="must be edges of the graph"):
        save_circuit(tmp_path / "d.json", GROUPED, scores, ~scores.graph.edges)
    with pytest.raises(UserError, match="it does not exist"):
        load_circuit(tmp_path / "d.json", GROUPED)
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_circuit(tmp_path / "e.json", GROUPED)
