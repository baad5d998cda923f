"""Circuits as pictures: the text of Graphviz, and SVG drawn without it.

Nodes stand by depth, the input at the bottom and the unembedding at the top. A line is as wide as its score is large,
blue where it raises the metric and orange where it lowers it; queries are dashed, keys dotted, all else is solid. An
edge to keys or values that several heads share leads to each of those heads that writes in the circuit.
"""

from __future__ import annotations

import html
from typing import NamedTuple

import numpy as np

from jaxsteer.circuits.circuit import Edges
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph
from jaxsteer.display import ACCENT, INK, MUTED, OTHER, PAGE, RULE
from jaxsteer.errors import UserError

MOST = 5000
"""Edges that are drawn; more are a black spot."""
THIN, THICK = 0.6, 5.0
STYLES = {"q": "dashed", "k": "dotted", "v": "solid", "": "solid"}
DASHES = {"dashed": ' stroke-dasharray="5 3"', "dotted": ' stroke-dasharray="1.5 2.5"', "solid": ""}
ACROSS, UP, BOX = 64, 62, (52, 20)
"""Points between nodes of a rank, between ranks, and of a node."""
LEFT = 74
"""Points that the names of blocks take."""


class _Line(NamedTuple):
    writer: str
    node: str
    letter: str
    """Of the reader: "q", "k", "v" or ""."""
    width: float
    colour: str
    tip: str


def circuit_dot(graph: Graph, edges: Edges, scores: EdgeScores | None = None) -> str:
    """The circuit in the language of Graphviz, for ``dot -Tsvg`` and every tool that reads it.

    Raises ``UserError`` for edges beyond the graph, none or more than ``MOST`` of them, and scores of another graph.
    """
    lines = _lines(graph, edges, scores)
    out = [
        "digraph circuit {",
        "  rankdir=BT; bgcolor=transparent;",
        f'  node [shape=box, style="rounded,filled", fillcolor="{PAGE}", color="{INK}", fontname=Helvetica];',
    ]
    for rank in _ranks(graph, lines):
        out.append(f"  {{rank=same; {' '.join(f'{_quoted(name)};' for name in rank)}}}")
    for line in lines:
        label = f" label={line.letter}, fontsize=9," if line.letter else ""
        out.append(
            f"  {_quoted(line.writer)} -> {_quoted(line.node)} [{label.strip()}{' ' if label else ''}"
            f'style={STYLES[line.letter]}, penwidth={line.width:.2f}, color="{line.colour}", '
            f"tooltip={_quoted(line.tip)}];"
        )
    return "\n".join([*out, "}", ""])


def circuit_svg(graph: Graph, edges: Edges, scores: EdgeScores | None = None, *, title: str = "A circuit") -> str:
    """The circuit as SVG that stands by itself or in a page; names and scores show over nodes and lines.

    Nodes are groups of class "node" with ``data-name``, lines are paths of class "edge" with ``data-from`` and
    ``data-to``, so that a page may answer to the mouse. Errors as ``circuit_dot``.
    """
    lines = _lines(graph, edges, scores)
    ranks = _ranks(graph, lines)
    width, height = LEFT + ACROSS * max(map(len, ranks)) + 10, UP * len(ranks)
    places: dict[str, tuple[float, float]] = {}
    for level, rank in enumerate(ranks):
        start = LEFT + (width - LEFT - ACROSS * len(rank)) / 2
        places |= {name: (start + ACROSS * (i + 0.5), height - UP * (level + 0.5)) for i, name in enumerate(rank)}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{html.escape(title)}" font-family="sans-serif" font-size="11">',
        f"<title>{html.escape(title)}</title>",
        "<style>.edge{fill:none;stroke-opacity:.65}.edge:hover{stroke-opacity:1}</style>",
    ]
    for rank in ranks:
        block = rank[0][1:].partition(".")[0]
        if block.isdecimal():
            what = "heads" if rank[0].startswith("a") else "MLP"
            out.append(f'<text x="8" y="{places[rank[0]][1] + 4:g}" fill="{MUTED}">{what} {block}</text>')
    half = BOX[1] / 2
    for line in sorted(lines, key=lambda line: line.width):
        (x, y), (to_x, to_y) = places[line.writer], places[line.node]
        y, to_y = y - half, to_y + half
        bend = (y - to_y) / 2
        out.append(
            f'<path class="edge" data-from="{line.writer}" data-to="{line.node}" stroke="{line.colour}" '
            f'stroke-width="{line.width:.2f}"{DASHES[STYLES[line.letter]]} '
            f'd="M{x:g} {y:g}C{x:g} {y - bend:g} {to_x:g} {to_y + bend:g} {to_x:g} {to_y:g}">'
            f"<title>{html.escape(line.tip)}</title></path>"
        )
    for name, (x, y) in places.items():
        tip = f"{name}: {scores.node(name):+.4f}" if scores is not None and name != "logits" else name
        out.append(
            f'<g class="node" data-name="{name}"><title>{tip}</title><rect x="{x - BOX[0] / 2:g}" y="{y - half:g}" '
            f'width="{BOX[0]}" height="{BOX[1]}" rx="5" fill="{PAGE}" stroke="{RULE}"/><text x="{x:g}" y="{y + 4:g}" '
            f'text-anchor="middle" fill="{INK}">{name}</text></g>'
        )
    return "\n".join([*out, "</svg>", ""])


def _lines(graph: Graph, edges: Edges, scores: EdgeScores | None) -> list[_Line]:
    """What is drawn: of every edge a line to each node that reads it."""
    if edges.shape != graph.edges.shape or (edges & ~graph.edges).any():
        raise UserError(f"a circuit must be edges of the graph, bool {list(graph.edges.shape)}")
    if not 1 <= edges.sum() <= MOST:
        raise UserError(f"a circuit of {int(edges.sum()):,} edges cannot be drawn: give 1 to {MOST:,}")
    if scores is not None and scores.graph != graph:
        raise UserError(f"the scores are of another graph: {scores.graph}, expected {graph}")
    matrix = None if scores is None else scores.matrix
    most = 1.0 if matrix is None else float(np.abs(matrix[edges]).max()) or 1.0
    writes, found = edges.any(0), []
    for row, column in zip(*np.nonzero(edges), strict=True):
        reader, writer = graph.readers[row], graph.writers[column]
        own = np.flatnonzero(graph.owners[row] & writes)
        own = own if len(own) else np.flatnonzero(graph.owners[row])
        letter = reader.name[-2] if reader.name.endswith(">") else ""
        edge = f"{writer}->{reader.name}"
        score = None if matrix is None else float(matrix[row, column])
        for node in [graph.writers[i] for i in own] or ["logits"]:
            found.append(
                _Line(
                    writer=writer,
                    node=node,
                    letter=letter,
                    width=1.2 if score is None else max(THIN, THICK * abs(score) / most),
                    colour=MUTED if score is None else ACCENT if score >= 0 else OTHER,
                    tip=edge if score is None else f"{edge}: {score:+.4f}",
                )
            )
    return found


def _ranks(graph: Graph, lines: list[_Line]) -> list[list[str]]:
    """The nodes that are drawn, by depth: those of a rank do not read each other."""
    used = {name for line in lines for name in (line.writer, line.node)}
    ranks = [["input"]]
    for layer in range(graph.start, graph.n_layers):
        ranks += [[f"a{layer}.h{head}" for head in range(graph.heads)], [f"m{layer}"]]
    kept = [[name for name in rank if name in used] for rank in [*ranks, ["logits"]]]
    return [rank for rank in kept if rank]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
