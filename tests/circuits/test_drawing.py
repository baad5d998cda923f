"""Drawings: every edge is there once, from its writer to all that read it, and looks like its score."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxsteer import UserError
from jaxsteer.circuits.circuit import random_edges
from jaxsteer.circuits.drawing import circuit_dot, circuit_svg
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph
from jaxsteer.display import ACCENT, MUTED, OTHER

GRAPH = Graph(n_layers=2, heads=4, kv_heads=2)
NAMES = ["input->a0.g0<v>", "input->a0.h0<q>", "a0.h1->m0", "m0->a1.g1<k>", "a0.h0->a1.h2<q>", "a1.h2->logits",
         "a1.h3->logits", "m0->logits"]  # fmt: skip
LINES = {("input", "a0.h0"), ("a0.h1", "m0"), ("m0", "a1.h2"), ("m0", "a1.h3"), ("a0.h0", "a1.h2"),
         ("a1.h2", "logits"), ("a1.h3", "logits"), ("m0", "logits")}  # fmt: skip
DOT = re.compile(
    r'"([^"]+)" -> "([^"]+)" \[(?:label=(\w), fontsize=9, )?style=(\w+), penwidth=([\d.]+), '
    r'color="(#\w+)", tooltip="([^"]+)"\];'
)


def of_names(names: list[str]) -> np.ndarray:
    edges = np.zeros(GRAPH.edges.shape, bool)
    for name in names:
        edges[GRAPH.edge(name)] = True
    return edges


def scores() -> EdgeScores:
    matrix = np.zeros(GRAPH.edges.shape)
    for i, name in enumerate(NAMES):
        matrix[GRAPH.edge(name)] = (-1) ** i * (i + 1) / 10
    return EdgeScores(
        model="m", fingerprint="f", n_layers=2, heads=4, kv_heads=2, start=0, per="head", method="inputs", steps=1,
        rule="left", rows=1, readings=1, base=0.0, target=1.0, nodes=tuple(matrix.sum(0).tolist()),
        values=tuple(matrix[GRAPH.edges].tolist()),
    )  # fmt: skip


def test_the_text_of_graphviz() -> None:
    text = circuit_dot(GRAPH, of_names(NAMES), scores())
    found = DOT.findall(text)
    # A value that head 1 of block 0 reads is that of group 0, which is head 0's and head 1's.
    assert {(writer, node) for writer, node, *_ in found} == LINES | {("input", "a0.h1")}
    assert len(found) == text.count(" -> ") and text.startswith("digraph circuit {") and text.endswith("}\n")
    by_edge = {tip: (letter, style, float(width), colour) for _, _, letter, style, width, colour, tip in found}
    assert by_edge["input->a0.h0<q>: -0.2000"] == ("q", "dashed", pytest.approx(5 * 0.2 / 0.8, abs=0.01), OTHER)
    assert by_edge["m0->a1.g1<k>: -0.4000"] == ("k", "dotted", pytest.approx(2.5), OTHER)
    assert by_edge["a1.h3->logits: +0.7000"] == ("", "solid", pytest.approx(5 * 0.7 / 0.8, abs=0.01), ACCENT)
    ranks = re.findall(r"rank=same; (.*?)}", text)
    assert ranks == ['"input";', '"a0.h0"; "a0.h1";', '"m0";', '"a1.h2"; "a1.h3";', '"logits";']
    plain = DOT.findall(circuit_dot(GRAPH, of_names(NAMES)))
    assert {(width, colour) for *_, width, colour, _ in plain} == {("1.20", MUTED)}


def test_the_svg() -> None:
    root = ET.fromstring(circuit_svg(GRAPH, of_names(NAMES), scores(), title='Refusal <"DIM">'))
    space = {"s": "http://www.w3.org/2000/svg"}
    paths = root.findall(".//s:path", space)
    assert {(p.get("data-from"), p.get("data-to")) for p in paths} == LINES | {("input", "a0.h1")}
    assert (
        root.get("aria-label") == 'Refusal <"DIM">' and root.findtext("s:title", namespaces=space) == 'Refusal <"DIM">'
    )
    boxes = {
        node.get("data-name"): [float(node.find("s:rect", space).get(key)) for key in ("x", "y", "width", "height")]
        for node in root.findall(".//s:g", space)
    }
    assert set(boxes) == {name for line in LINES for name in line} | {"a0.h1"}
    heights = [boxes[name][1] for name in ("input", "a0.h0", "m0", "a1.h2", "logits")]
    assert heights == sorted(heights, reverse=True) and boxes["a0.h0"][1] == boxes["a0.h1"][1]
    width, height = (float(n) for n in root.get("viewBox").split()[2:])
    for x, y, w, h in boxes.values():
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    for path in paths:  # a line begins on top of its writer and ends under its node
        x, y = map(float, re.match(r"M([\d.]+) ([\d.]+)C", path.get("d")).groups())
        box = boxes[path.get("data-from")]
        assert box[0] <= x <= box[0] + box[2] and y == box[1]
        to_x, to_y = map(float, path.get("d").split()[-2:])
        box = boxes[path.get("data-to")]
        assert box[0] <= to_x <= box[0] + box[2] and to_y == box[1] + box[3]


@pytest.mark.parametrize("per", ["head", "layer"])
def test_random_circuits_of_any_graph_are_drawn(per: str) -> None:
    graph = Graph(n_layers=4, heads=4, kv_heads=1, start=1, per=per)
    edges = random_edges(graph, 40, 0)
    tips = {tip for *_, tip in DOT.findall(circuit_dot(graph, edges))}
    names = {f"{graph.writers[w]}->{graph.readers[r].name}" for r, w in zip(*np.nonzero(edges), strict=True)}
    assert tips == names
    ET.fromstring(circuit_svg(graph, edges))


def test_what_is_refused() -> None:
    edges = of_names(NAMES)
    for bad in (~GRAPH.edges, edges[:2]):
        with pytest.raises(UserError, match="must be edges of the graph"):
            circuit_dot(GRAPH, bad)
    with pytest.raises(UserError, match="of 0 edges cannot be drawn"):
        circuit_svg(GRAPH, edges & False)
    large = Graph(n_layers=12, heads=12, kv_heads=12)
    with pytest.raises(UserError, match="of 32,491 edges cannot be drawn: give 1 to 5,000"):
        circuit_dot(large, large.edges)
    with pytest.raises(UserError, match="another graph"):
        circuit_dot(GRAPH, edges, dataclasses.replace(scores(), kv_heads=4))
