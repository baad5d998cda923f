"""A circuit drawn as a graph: writers and readers by layer, edges by their scores. Plain SVG that a script brings to
life; what it says without one stands in titles."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

from jaxsteer.circuits.study_result import PushStudy

MOST = 120
"""Edges that are drawn, those of the largest scores."""
WIDE, STEP, MARGIN = 46, 62, 46
_LAYER = re.compile(r"[am](\d+)")


def node_of(reader: str) -> str:
    """The node that a reader belongs to: "a3.h1<q>" is the head a3.h1, "a3.g0<k>" the group a3.g0."""
    return reader.split("<")[0]


def circuit_svg(one: PushStudy, number: int) -> Markup:
    """The circuit's graph, and the largest edges outside of it (dashed), with a title for every node and edge."""
    scores = {edge.name: edge for edge in one.edges}
    inside = set(one.circuits.drawn)
    largest = lambda name: -abs(scores[name].share) if name in scores else 0.0  # noqa: E731
    names = sorted(inside, key=largest)[:MOST]
    names += [edge.name for edge in one.edges if edge.name not in inside][: max(0, min(30, MOST - len(names)))]
    ends = [(name.split("->")[0], node_of(name.split("->")[1])) for name in names]
    places, width, height = _places({node for pair in ends for node in pair})
    most = max((abs(scores[name].share) for name in names if name in scores), default=1.0) or 1.0
    lines = [_edge(name, pair, places, scores, inside, most) for name, pair in zip(names, ends, strict=True)]
    shares = {node.name: node.share for node in one.nodes}
    marks = [_node(node, at, shares.get(node)) for node, at in places.items()]
    labels = [
        f'<text x="6" y="{y + 4:.0f}" class="layer">{layer}</text>'
        for layer, y in {_layer(node): at[1] for node, at in places.items() if _LAYER.match(node)}.items()
    ]
    return Markup(
        f'<svg class="graph" id="graph-{number}" role="img" aria-label="circuit of {escape(one.name)}" '
        f'viewBox="0 0 {width} {height}" style="width:100%;max-width:{width * 1.3:.0f}px">'
        f"{''.join(labels)}<g>{''.join(lines)}</g><g>{''.join(marks)}</g></svg>"
    )  # nosec: every name is escaped where it is put in


def _layer(node: str) -> int:
    found = _LAYER.match(node)
    return int(found[1]) if found else -1


def _places(nodes: set[str]) -> tuple[dict[str, tuple[float, float]], int, int]:
    """Where nodes stand: layers from below, heads to the left of their MLP; the input below, the unembedding on top."""
    layers = sorted({_layer(node) for node in nodes if _LAYER.match(node)})
    rows: list[list[str]] = [["input"]]
    for layer in layers:
        rows += [sorted(node for node in nodes if _layer(node) == layer and node[0] == "a")]
        rows += [[node for node in nodes if node == f"m{layer}"]]
    rows += [["logits"]]
    rows = [row for row in rows if row]
    wide = max(len(row) for row in rows)
    width, height = max(420, 2 * MARGIN + wide * WIDE * 2), 2 * 30 + (len(rows) - 1) * STEP
    places: dict[str, tuple[float, float]] = {}
    for up, row in enumerate(rows):
        for i, node in enumerate(row):
            x = MARGIN + (i + 1) * (width - 2 * MARGIN) / (len(row) + 1)
            places[node] = (x, height - 30 - up * STEP)
    return places, width, height


def _edge(
    name: str, ends: tuple[str, str], places: dict[str, Any], scores: dict[str, Any], inside: set[str], most: float
) -> str:
    (x, y), (to_x, to_y) = (places[node] for node in ends)
    found = scores.get(name)
    share = 0.0 if found is None else found.share
    told = (
        name
        if found is None
        else f"{name}: {100 * share:+.1f} % of the effect; random push {100 * found.control:+.1f} %"
    )
    middle = (y + to_y) / 2
    bend = (hash_of(name) % 41) - 20
    path = f"M{x:.0f} {y:.0f}C{x + bend:.0f} {middle:.0f} {to_x + bend:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
    return (
        f'<path class="edge {"up" if share >= 0 else "down"}{"" if name in inside else " outside"}" d="{path}" '
        f'stroke-width="{0.6 + 5 * min(1.0, abs(share) / most):.1f}" data-from="{escape(ends[0])}" '
        f'data-to="{escape(ends[1])}" data-share="{share:.4f}"><title>{escape(told)}</title></path>'
    )


def hash_of(name: str) -> int:
    """A number of a name that is the same in every process, so that curves beside each other part."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name))


def _node(name: str, at: tuple[float, float], share: float | None) -> str:
    told = name if share is None else f"{name}: {100 * share:+.1f} % of the effect by attribution"
    return (
        f'<g class="node" tabindex="0" data-name="{escape(name)}"><title>{escape(told)}</title>'
        f'<rect x="{at[0] - 23:.0f}" y="{at[1] - 11:.0f}" width="46" height="22" rx="5"/>'
        f'<text x="{at[0]:.0f}" y="{at[1] + 4:.0f}">{escape(name)}</text></g>'
    )
