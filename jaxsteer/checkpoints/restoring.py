"""Parameters from a converted checkpoint: leaves lie on disk layer by layer and are stacked on the devices.

What conversion writes (checkpoints_convert/streaming.py) is read here: every leaf is a Zarr array of its own,
``weights/embed``, ``weights/layers/007/q`` ..., and TensorStore reads of it what the devices of this process hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from checkpoints_convert.leaves import Leaf, finish_opening, read_index, start_opening, wait_for
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Layers, Params, layer_shapes, top_shapes
from jaxsteer.models.sharding import (
    IN_AXES,
    from_stored,
    layer_shardings,
    stack_shardings,
    stored_shape,
    stored_sharding,
    top_shardings,
)
from jaxsteer.processes import to_host

BATCH_BYTES = 256 << 20
"""Layers are read in batches of at most this size (leaf by leaf, if a layer is larger): so much exists twice."""

Row = dict[str, jax.Array]
"""One layer, or some of its leaves, as it is stored."""


def restore(
    weights: Path, config: ModelConfig, *, dtype: jnp.dtype, mesh: Mesh | None, url: str | None = None
) -> Params:
    """The parameters in the directory ``weights``, cast to ``dtype``, on ``mesh`` or the default device.

    With ``url``, only the index is in ``weights``, and the arrays are below that URL of a store.

    Only the leaves of ``config`` are read, so a config with fewer layers reads only these; of a leaf that ``mesh``
    splits, a process reads only what its devices hold. Beside the result, one batch of layers is in memory. Raises
    ``UserError`` when the checkpoint is damaged.
    """
    programs, shapes, outer = _programs(config, mesh), layer_shapes(config), top_shapes(config)
    index = read_index(weights)
    for leaf in [*outer, *(f"layers/{i:03d}/{name}" for i in range(config.n_layers) for name in shapes)]:
        if leaf not in index:
            raise UserError(f"The checkpoint {weights} lacks the leaf {leaf}. Convert the model again.")

    def read(leaves: Iterable[Leaf]) -> dict[Leaf, jax.Array]:
        return _read(weights, {leaf: (shapes | outer)[leaf[-1]] for leaf in leaves}, dtype, mesh, url)

    def rows(layers: range, names: Iterable[str]) -> list[Row]:
        found = read(("layers", f"{i:03d}", name) for i in layers for name in names)
        return [{name: found["layers", f"{i:03d}", name] for name in names} for i in layers]

    every = range(config.n_layers)
    per_layer = sum(map(math.prod, shapes.values())) * dtype.itemsize
    if per_layer * config.n_layers + sum(map(math.prod, outer.values())) * dtype.itemsize <= BATCH_BYTES:
        found = read((name,) for name in outer)
        top, layers = programs.whole({name: found[(name,)] for name in outer}, rows(every, shapes))
        return Params(layers=Layers(**layers), **top)
    top = {}
    for name in sorted(
        outer, key=lambda name: name not in IN_AXES
    ):  # transposed ones exist twice: while little else does
        (values,) = read([(name,)]).values()
        top[name] = jax.block_until_ready(programs.top(name)(values))
        del values
    stacks, at_once = programs.empty(dtype), BATCH_BYTES // per_layer
    parts = [tuple(shapes)] if at_once else [(name,) for name in shapes]
    for start in every[:: max(1, at_once)]:
        for names in parts:
            batch = rows(every[start : start + max(1, at_once)], names)
            batch = jax.block_until_ready(programs.turn(batch))
            put = programs.put(names)
            stacks |= jax.block_until_ready(put({name: stacks.pop(name) for name in names}, batch, start))
            del batch
    return Params(layers=Layers(**stacks), **top)


def check_finite(params: Params, config: ModelConfig, name: str) -> None:
    """Raise ``UserError`` if a weight of the model ``name`` is NaN or infinite, naming the leaves."""
    found = to_host(_finite({leaf: getattr(params, leaf) for leaf in top_shapes(config)}, params.layers))
    bad = [leaf for leaf, finite in found[0].items() if not finite]
    for leaf in layer_shapes(config):
        bad += [f"layers/{layer:03d}/{leaf}" for layer in np.flatnonzero(~getattr(found[1], leaf))]
    if bad:
        raise UserError(
            f"{len(bad)} leaves of the model {name} hold NaN or infinity as {params.embed.dtype}, among them "
            f"{', '.join(bad[:3])}, so that nothing it computes could be right. Load it in another dtype, or convert "
            f"it again from its source."
        )


@jax.jit
def _finite(top: dict[str, jax.Array], layers: Layers) -> tuple[dict[str, jax.Array], Layers]:
    """Whether leaves are finite, those of layers layer by layer."""
    each = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(axis=range(1, leaf.ndim)), layers)
    return {name: jnp.isfinite(leaf).all() for name, leaf in top.items()}, each


class _Programs(NamedTuple):
    whole: Callable[[dict[str, jax.Array], Sequence[Row]], tuple[dict[str, jax.Array], Row]]
    """All leaves, those outside the layers first, from their stored forms."""
    top: Callable[[str], Callable[[jax.Array], jax.Array]]
    """One leaf outside the layers."""
    empty: Callable[[jnp.dtype], Row]
    turn: Callable[[Sequence[Row]], Sequence[Row]]
    """Leaves of layers, from their stored forms. Apart from ``put``, because XLA fuses a transpose with the update of a
    stack into a loop that is three times slower on CPU."""
    put: Callable[[tuple[str, ...]], Callable[[Row, Sequence[Row], int], Row]]
    """Writes leaves of these names into donated stacks, at and after an index."""


@functools.lru_cache(maxsize=16)
def _programs(config: ModelConfig, mesh: Mesh | None) -> _Programs:
    """The compiled steps of ``restore``; kept, so that loading a model again compiles nothing."""
    shapes, outer = layer_shapes(config), top_shapes(config)
    one, out, top_out = layer_shardings(config, mesh), stack_shardings(config, mesh), top_shardings(config, mesh)

    @functools.cache
    def top(name: str) -> Callable[[jax.Array], jax.Array]:
        if name not in IN_AXES:
            return lambda values: values  # is stored as it is used
        return jax.jit(lambda values: from_stored(name, outer[name], values), out_shardings=top_out[name])

    @functools.partial(jax.jit, out_shardings=(top_out, out))
    def whole(values: dict[str, jax.Array], rows: Sequence[Row]) -> tuple[dict[str, jax.Array], Row]:
        stacks = {
            name: jnp.stack([from_stored(name, shape, row[name]) for row in rows]) for name, shape in shapes.items()
        }
        return {name: from_stored(name, outer[name], values[name]) for name in outer}, stacks

    @functools.partial(jax.jit, out_shardings=out, static_argnums=0)
    def empty(dtype: jnp.dtype) -> Row:
        return {name: jnp.zeros((config.n_layers, *shape), dtype) for name, shape in shapes.items()}

    @jax.jit
    def turn(rows: Sequence[Row]) -> Sequence[Row]:
        def leaf(name: str, values: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(from_stored(name, shapes[name], values), one[name])

        return [{name: leaf(name, values) for name, values in row.items()} for row in rows]

    @functools.cache
    def put(names: tuple[str, ...]) -> Callable[[Row, Sequence[Row], int], Row]:
        @functools.partial(jax.jit, out_shardings={name: out[name] for name in names}, donate_argnums=0)
        def run(stacks: Row, rows: Sequence[Row], start: int | jax.Array) -> Row:
            stacks = dict(stacks)
            for number, row in enumerate(rows):
                for name, leaf in row.items():
                    stacks[name] = jax.lax.dynamic_update_index_in_dim(stacks[name], leaf, start + number, 0)
            return stacks

        return run

    return _Programs(whole, top, empty, turn, put)


# Reading from the disk


def _read(
    weights: Path, leaves: dict[Leaf, tuple[int, ...]], dtype: jnp.dtype, mesh: Mesh | None, url: str | None
) -> dict[Leaf, jax.Array]:
    """Leaf -> its stored form in ``dtype``, on the devices, for leaves that are given with their own shapes."""
    import tensorstore as ts

    forms = {leaf: stored_shape(leaf[-1], shape) for leaf, shape in leaves.items()}
    opened = {leaf: start_opening(weights, leaf, url) for leaf in leaves}
    arrays = {leaf: ts.cast(finish_opening(weights, leaf, forms[leaf], opened[leaf]), dtype) for leaf in leaves}
    places = {leaf: stored_sharding(leaf[-1], shape, mesh) for leaf, shape in leaves.items()}
    # All are being read before the first is waited for. A batch reads a chunk once, however many parts are in it.
    with ts.Batch() as batch:
        reading = {
            leaf: {at: array[_slices(at)].read(batch=batch) for at in _parts(places[leaf], array.shape)}
            for leaf, array in arrays.items()
        }
    found: dict[Leaf, jax.Array] = {}
    for leaf, array in arrays.items():
        parts = {at: wait_for(weights, leaf, future) for at, future in reading.pop(leaf).items()}

        def part(index: tuple[slice, ...] | None, parts: dict[_Part, np.ndarray] = parts) -> np.ndarray:
            return parts[_part(index)]

        found[leaf] = jax.make_array_from_callback(array.shape, places[leaf], part)
    return found


_Part = tuple[tuple[int | None, int | None], ...]
"""Start and stop along every axis; slices cannot be keys before Python 3.12."""


def _part(index: tuple[slice, ...] | None) -> _Part:
    return tuple((part.start, part.stop) for part in index or ())


def _slices(part: _Part) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in part)


def _parts(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> set[_Part]:
    """The parts of an array that the devices of this process hold."""
    return {_part(index) for index in sharding.addressable_devices_indices_map(shape).values()}
