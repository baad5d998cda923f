"""The house of docs/architecture.md stays standing: imports point down, modules stay short, no forbidden parts."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from docs.house import MODULES, PICTURE, ROOMS, ROOT, dotted, draw, imports, package_of, room

# The only module that may see pickle: its unpickler imports and calls nothing.
UNPICKLES = "jaxsteer.files.torchfile"
FORBIDDEN = ("flax.nnx", "torch", "jax.pmap", "jax.experimental.shard_map", "jax.experimental.pjit", "pickle")
# Rooms that parse, print and draw, and what they would compute with.
PRINTERS = ("cli", "serve", "report")
COMPUTES = ("jax.numpy", "scipy", "optax", "flax", "einops", "sklearn")
ONLY_DRAWS = ("numpy",)  # pages arrange numbers in arrays to draw them
LONGEST_MODULE = 400
MOST_PARAMETERS = 8
REASON = "Many parameters: "  # begins the sentence of a docstring that says why a function has more


def under(name: str, packages: tuple[str, ...]) -> bool:
    """Whether an import name is one of these packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def complaints(module: str, package: str, source: str) -> list[str]:
    """What ``source`` imports although it must not, in words."""
    found = []
    here = room(module)
    for name in imports(ast.parse(source), package):
        target = room(name)
        if here and target and ROOMS.index(target) < ROOMS.index(here):
            found.append(f"{module} imports {name}: {target} is above {here}")
        if here in PRINTERS and under(name, COMPUTES if here == "report" else COMPUTES + ONLY_DRAWS):
            found.append(f"{module} imports {name}: {here} computes nothing")
        if not (module == UNPICKLES and name in ("pickle", "pickletools")):
            found += [f"{module} imports {name}"] * under(name, FORBIDDEN)
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module_keeps_the_rules(path: Path):
    source, module = path.read_text(encoding="utf-8"), dotted(path)
    assert not complaints(module, package_of(path), source)
    assert ".pmap(" not in source and "trust_remote_code=True" not in source


def too_large(module: str, source: str) -> set[str]:
    """The module if it is too long, and its functions with too many parameters and no reason for them."""
    found = {module} if source.count("\n") > LONGEST_MODULE else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            names = {p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p} - {"self", "cls"}
            if len(names) > MOST_PARAMETERS and REASON not in " ".join((ast.get_docstring(node) or "").split()):
                found.add(f"{module}.{node.name}")
    return found


def test_modules_and_calls_stay_small():
    found = set().union(*(too_large(dotted(path), path.read_text(encoding="utf-8")) for path in MODULES))
    assert not found, f"more than {LONGEST_MODULE} lines or {MOST_PARAMETERS} parameters; see REASON"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(a, b, c, d, *, e, f, g, h): ...", set()),
        ("def f(a, b, c, d, *e, f, g, h, **i): ...", {"m.f"}),
        ("class A:\n    async def f(self, a, b, c, d, e, f, g, h, i): ...", {"m.f"}),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...", set()),
        ("def f(a, b, c, d, e, f, g, h, i):\n    'Adds. Many\\n    parameters: one per planet.'", set()),
        ("\n" * 401, {"m"}),
    ],
)
def test_the_check_sees_what_is_too_large(source: str, found: set[str]):
    assert too_large("m", source) == found


def test_every_room_of_the_package_has_its_place():
    known = {path.stem if path.is_file() else path.name for path in (ROOT / "jaxsteer").iterdir()}
    rooms = {name for name in known if (ROOT / "jaxsteer" / name / "__init__.py").exists()}
    modules = {name for name in known if (ROOT / "jaxsteer" / f"{name}.py").exists()} - {"__init__", "__main__"}
    assert rooms | modules <= set(ROOMS)


def test_no_module_imports_itself_by_a_detour():
    """Inside a room too: every import counts, also those in functions, but for those that only a type checker sees."""
    known = {dotted(path): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        tree = without_typing(ast.parse(path.read_text(encoding="utf-8")))
        targets = {name if name in known else name.rpartition(".")[0] for name in imports(tree, package_of(path))}
        graph[module] = {target for target in targets if target in known and not module.startswith(f"{target}.")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


def without_typing(tree: ast.Module) -> ast.Module:
    """The module without its ``if TYPE_CHECKING`` blocks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef):
            node.body = [
                part
                for part in node.body
                if not (isinstance(part, ast.If) and ast.unparse(part.test).endswith("TYPE_CHECKING"))
            ]
    return tree


def test_the_picture_of_the_house_is_current():
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run `python docs/house.py`"


def test_the_package_root_imports_no_room():
    """Its public names are imported when they are first used, so that no room can depend on another through it."""
    tree = without_typing(ast.parse((ROOT / "jaxsteer" / "__init__.py").read_text(encoding="utf-8")))
    assert not [name for name in imports(tree, "jaxsteer") if room(name)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxsteer.prompt_search.algorithms.epo", "from jaxsteer.evals import choice"),
        ("jaxsteer.prompt_search.algorithms.epo", "def f():\n    import jaxsteer.cli.demo"),
        ("jaxsteer.prompt_search.epo", "from .. import report"),
        ("jaxsteer.models.config", "import checkpoints_convert"),
        ("jaxsteer.models.config", "from flax import nnx"),
        ("jaxsteer.models.config", "from torch.nn import functional"),
        ("jaxsteer.files.whole", "from jaxsteer.models import config"),
        ("jaxsteer.report.page", "from scipy import stats"),
        ("jaxsteer.cli.vector", "import numpy as np"),
        ("jaxsteer.cli.vector", "from jax import numpy"),
        ("checkpoints_convert.convert", "from jaxsteer.prompt_search import epo"),
        ("jaxsteer.models.config", "import checkpoints_convert.hf"),
        ("checkpoints_convert.convert", "def f():\n    from jaxsteer.checkpoints import loading"),
    ],
)
def test_the_check_sees_what_is_forbidden(module: str, source: str):
    assert complaints(module, module.rpartition(".")[0], source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxsteer.evals.choice", "from jaxsteer.models.transformer import embed"),
        ("jaxsteer.checkpoints.loading", "from checkpoints_convert import convert"),
        ("jaxsteer.prompt_search.algorithms.epo", "from . import pareto"),
        ("checkpoints_convert.convert", "from jaxsteer.models.config import ModelConfig"),
        ("jaxsteer.models.config", "import torchlike"),
    ],
)
def test_the_check_allows_what_is_right(module: str, source: str):
    assert not complaints(module, module.rpartition(".")[0], source)
