"""The house of docs/architecture.md: its rooms, their imports, and the picture of both.

``python docs/house.py`` draws docs/images/house.svg; tests/test_architecture.py checks that the picture is current.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "house.svg"

ROOMS = (
    "cli",
    "serve",
    "report",
    "axis",
    "study",
    "planning",
    "circuits",
    "explain",
    "evals",
    "prompt_search",
    "lens",
    "rewrite",
    "personas",
    "engine",
    "sae",
    "objectives",
    "steer",
    "prompts",
    "organisms",
    "runs",
    "checkpoints",
    "checkpoints_convert",
    "models",
    "writers",
    "display",
    "files",
    "statistics",
    "processes",
    "ranges",
    "errors",
)
"""From the roof to the ground, also those that are still to be built. A module may import its own room and the rooms
after it; checkpoints_convert is a package of its own that stands among those of jaxsteer."""

MODULES = sorted(path for package in ("jaxsteer", "checkpoints_convert") for path in (ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    """The module's import name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    """The package that a module's relative imports start from."""
    return dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every name that a module imports, wherever the statement stands: ``from a.b import c`` gives ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The room that an import name belongs to; None for the package root and for other packages."""
    parts = name.split(".")
    if parts[0] == "checkpoints_convert":
        return parts[0]
    return parts[1] if parts[0] == "jaxsteer" and len(parts) > 1 and parts[1] in ROOMS else None


def arrows() -> dict[str, set[str]]:
    """Room -> the other rooms that it imports, for the rooms that exist."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        here = room(dotted(path))
        if here:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            there = {room(name) for name in imports(tree, package_of(path))}
            found.setdefault(here, set()).update(name for name in there if name and name != here)
    return found


def purpose(name: str) -> str:
    """The first line of a room's docstring, up to its colon or full stop."""
    base = ROOT / ("" if name == "checkpoints_convert" else "jaxsteer") / name
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "").rstrip(".")


# The picture: a row per room, an arrow for every import that does not follow from others.

ROW, BOX, LEFT, LANE = 34, 24, 24, 11
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .name { font-weight: 600 }
    .what { fill: #59636e; font-size: 12px }
    rect { fill: #eef2f7; stroke: #8c959f }
    path { fill: none; stroke: #0b62c4; stroke-width: 1.1; opacity: .55 }
    circle { fill: #0b62c4 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .what { fill: #9198a1 } rect { fill: #1f2630; stroke: #59636e }
      path { stroke: #6cb0ff } circle { fill: #6cb0ff }
    }"""


def needed(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows of ``graph`` that do not follow from a longer way: its transitive reduction."""
    reach: dict[str, set[str]] = {}
    for name in reversed(ROOMS):
        if name in graph:
            reach[name] = graph[name].union(*(reach[below] for below in graph[name]))
    return [
        (name, below)
        for name in ROOMS
        for below in sorted(graph.get(name, ()), key=ROOMS.index)
        if not any(below in reach[other] for other in graph[name])
    ]


def draw() -> str:
    """The SVG of the house."""
    graph = arrows()
    rows = {name: number for number, name in enumerate(name for name in ROOMS if name in graph)}
    lanes: list[list[tuple[int, int]]] = []  # arrows bend in lanes on the left, where they do not overlap
    paths = []
    for above, below in sorted(needed(graph), key=lambda pair: rows[pair[1]] - rows[pair[0]]):
        first, last = rows[above], rows[below]
        lane = next((i for i, taken in enumerate(lanes) if all(last <= a or first >= b for a, b in taken)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((first, last))
        paths.append((lane, first, last))
    edge = LEFT + LANE * (len(lanes) + 1)
    height = ROW * len(rows) + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {edge + 860} {height}" role="img" '
        f'aria-label="Rooms of jaxsteer; imports point down">',
        f"  <style>{STYLE}\n  </style>",
    ]
    for lane, first, last in paths:
        x, top, bottom = edge - LANE * (lane + 1), ROW * first + 24, ROW * last + 20
        corners = f"H{x + 5}Q{x} {top} {x} {top + 5}V{bottom - 5}Q{x} {bottom} {x + 5} {bottom}H{edge}"
        out.append(f'  <path d="M{edge} {top}{corners}"/>')
        out.append(f'  <circle cx="{edge - 2}" cy="{bottom}" r="2.5"/>')
    for name, number in rows.items():
        y = ROW * number + 10
        out.append(f'  <rect x="{edge}" y="{y}" width="166" height="{BOX}" rx="4"/>')
        out.append(f'  <text class="name" x="{edge + 10}" y="{y + 16}">{name}</text>')
        out.append(f'  <text class="what" x="{edge + 180}" y="{y + 16}">{html.escape(purpose(name))}</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
