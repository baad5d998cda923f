"""Parameters from a converted checkpoint: leaves lie on disk layer by layer and are stacked on the devices.

What conversion writes (checkpoints_convert/streaming.py) is read here: ``weights/index.json`` says which of the Orbax
checkpoints ``weights/000``, ``weights/001`` ... holds a leaf.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.hf import read_json
from jaxsteer.models.params import Layers, Params, layer_shapes, top_shapes
from jaxsteer.models.sharding import (
    IN_AXES,
    from_stored,
    stack_shardings,
    stored_shape,
    stored_sharding,
    top_shardings,
)

_BATCH_BYTES = 256 << 20
"""Layers are read in batches of about this size (one layer, if a layer is larger): so much exists twice."""
_READ_BYTES = 128 << 20

Leaf = tuple[str, ...]
"""Path of a leaf in the checkpoint: ("embed",) or ("layers", "007", "q")."""
Row = dict[str, jax.Array]
"""One layer as it is stored."""


def restore(weights: Path, config: ModelConfig, *, dtype: jnp.dtype, mesh: Mesh | None) -> Params:
    """The parameters in the directory ``weights``, cast to ``dtype``, on ``mesh`` or the default device.

    Only the leaves of ``config`` are read, so a config with fewer layers reads only these; of a leaf that ``mesh``
    splits, a process reads only what its devices hold. Beside the result, one batch of layers is in memory. Raises
    ``UserError`` when the checkpoint is damaged.
    """
    index, programs = read_index(weights), _programs(config, mesh)
    shapes, outer = layer_shapes(config), top_shapes(config)

    def read(leaves: dict[Leaf, tuple[int, ...]]) -> dict[Leaf, jax.Array]:
        wanted = {
            leaf: jax.ShapeDtypeStruct(
                stored_shape(leaf[-1], shape), dtype, sharding=stored_sharding(leaf[-1], shape, mesh)
            )
            for leaf, shape in leaves.items()
        }
        return read_leaves(weights, index, wanted)

    def leaves_of(layers: range) -> dict[Leaf, tuple[int, ...]]:
        return {("layers", f"{i:03d}", name): shape for i in layers for name, shape in shapes.items()}

    def rows(found: dict[Leaf, jax.Array], layers: range) -> list[Row]:
        return [{name: found.pop(("layers", f"{i:03d}", name)) for name in shapes} for i in layers]

    every = range(config.n_layers)
    per_layer = sum(map(math.prod, shapes.values())) * dtype.itemsize
    if per_layer * config.n_layers + sum(map(math.prod, outer.values())) * dtype.itemsize <= _BATCH_BYTES:
        found = read({(name,): shape for name, shape in outer.items()} | leaves_of(every))
        top, layers = programs.whole({name: found.pop((name,)) for name in outer}, rows(found, every))
        return Params(layers=Layers(**layers), **top)
    top = {}
    for name, shape in outer.items():
        values = read({(name,): shape})[(name,)]
        top[name] = jax.block_until_ready(programs.top[name](values))
        _free([values])
    stacks, at_once = programs.empty(dtype), max(1, _BATCH_BYTES // per_layer)
    for start in every[::at_once]:
        numbers = every[start : start + at_once]
        batch = rows(read(leaves_of(numbers)), numbers)
        stacks = jax.block_until_ready(programs.put(stacks, batch, start))
        _free(batch)
    return Params(layers=Layers(**stacks), **top)


def _free(values: Any) -> None:
    """Give the memory of arrays back now: Orbax's references to them last until the garbage collector runs."""
    for leaf in jax.tree.leaves(values):
        if not leaf.is_deleted():  # as donated arrays are
            leaf.delete()


class _Programs(NamedTuple):
    whole: Callable[[dict[str, jax.Array], Sequence[Row]], tuple[dict[str, jax.Array], Row]]
    """All leaves, those outside the layers first, from their stored forms."""
    top: dict[str, Callable[[jax.Array], jax.Array]]
    """One leaf outside the layers."""
    empty: Callable[[jnp.dtype], Row]
    put: Callable[[Row, Sequence[Row], int], Row]
    """Writes layers into donated stacks, at and after an index."""


@functools.lru_cache(maxsize=16)
def _programs(config: ModelConfig, mesh: Mesh | None) -> _Programs:
    """The compiled steps of ``restore``; kept, so that loading a model again compiles nothing."""
    shapes, outer = layer_shapes(config), top_shapes(config)
    out, top_out = stack_shardings(config, mesh), top_shardings(config, mesh)

    def top(name: str) -> Callable[[jax.Array], jax.Array]:
        donated = () if name in IN_AXES else (0,)  # what is transposed needs memory of its own
        return jax.jit(
            lambda values: from_stored(name, outer[name], values), out_shardings=top_out[name], donate_argnums=donated
        )

    @functools.partial(jax.jit, out_shardings=(top_out, out))
    def whole(values: dict[str, jax.Array], rows: Sequence[Row]) -> tuple[dict[str, jax.Array], Row]:
        stacks = {
            name: jnp.stack([from_stored(name, shape, row[name]) for row in rows]) for name, shape in shapes.items()
        }
        return {name: from_stored(name, outer[name], values[name]) for name in outer}, stacks

    @functools.partial(jax.jit, out_shardings=out, static_argnums=0)
    def empty(dtype: jnp.dtype) -> Row:
        return {name: jnp.zeros((config.n_layers, *shape), dtype) for name, shape in shapes.items()}

    @functools.partial(jax.jit, out_shardings=out, donate_argnums=0)
    def put(stacks: Row, rows: Sequence[Row], start: int | jax.Array) -> Row:
        stacks = dict(stacks)
        for number, row in enumerate(rows):
            for name, shape in shapes.items():
                leaf = from_stored(name, shape, row[name])
                stacks[name] = jax.lax.dynamic_update_index_in_dim(stacks[name], leaf, start + number, 0)
        return stacks

    return _Programs(whole, {name: top(name) for name in outer}, empty, put)


# Reading from the disk


def read_index(weights: Path) -> dict[str, dict[str, str]]:
    """Leaf ("embed", "layers/007/q") -> the "group" that holds it and the "sha256" of its values."""
    if not (weights / "index.json").is_file():
        raise UserError(
            f"The checkpoint {weights.parent} cannot be read: it has no weights/index.json. It is damaged, or an older "
            f"version of jaxsteer wrote it. Convert the model again."
        )
    return read_json(weights / "index.json")


def read_leaves(weights: Path, index: dict[str, dict[str, str]], wanted: dict[Leaf, Any]) -> dict[Leaf, Any]:
    """Leaf -> its stored values, for every leaf of ``wanted``, as what stands there: a struct or ``np.ndarray``."""
    groups: dict[str, dict[str, Any]] = {}
    for leaf, form in wanted.items():
        try:
            node = groups.setdefault(index["/".join(leaf)]["group"], {})
        except (KeyError, TypeError):
            raise UserError(f"The checkpoint {weights} lacks the leaf {'/'.join(leaf)}. Convert again.") from None
        for key in leaf[:-1]:
            node = node.setdefault(key, {})
        node[leaf[-1]] = form
    found: dict[Leaf, Any] = {}
    for group, tree in groups.items():
        _flatten((), _load(weights / group, tree), found)
    return {leaf: found[leaf] for leaf in wanted}


def _flatten(path: Leaf, node: Any, out: dict[Leaf, Any]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _flatten((*path, key), value, out)
    else:
        out[path] = node


def orbax() -> Any:
    """The module ``orbax.checkpoint.v1``, which logs no more what it also raises, or that OCDBT is not used."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(_worth_saying)
    return v1


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in ("Skipping merge of OCDBT", "raised an exception"))


def _load(path: Path, wanted: dict[str, Any]) -> Any:
    ocp = orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # The chunks of this many bytes of leaves are in memory at a time; a single leaf must fit.
    sizes = [4 * leaf.size for leaf in jax.tree.leaves(wanted) if isinstance(leaf, jax.ShapeDtypeStruct)]
    context.memory.read_concurrent_bytes = max([_READ_BYTES, *(size + 1 for size in sizes)])
    try:
        with context:
            return ocp.load(path.absolute(), wanted)
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged checkpoint
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UserError(f"The checkpoint {path} cannot be read ({reason}). Convert the model again.") from error
