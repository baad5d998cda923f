"""Meshes and shardings. Two axes: "prompts" (data-parallel rows) and "model" (tensor-parallel weights)."""

from __future__ import annotations

import math
import os

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import LAYER_SPECS, TOP_SPECS, Layers, Params, layer_shapes, top_shapes

AXES = ("prompts", "model")
GIB = 2**30
_SPECS = TOP_SPECS | LAYER_SPECS
IN_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "unembed": 1}
"""Matrices -> how many of their axes are inputs. Files hold them as [out, in], everything else flat or as it is."""
_WIDTH_AXIS = {"q": 0, "k": 0, "v": 0, "o": 2, "gate": 0, "up": 0, "down": 1, "embed": 1, "unembed": 0}
"""Matrices -> their axis of size D."""
_MAX_PIECES = 16
_PIECE = 1 << 19
_BLOCK_BYTES = 32 << 20


def make_mesh(*, model: int = 1, prompts: int | None = None) -> Mesh:
    """A ("prompts", "model") mesh over ``prompts * model`` devices; by default all devices that there are.

    The axes are ``AxisType.Auto``: the compiler propagates shardings, because a search gathers, sorts and scatters
    along sharded axes, which explicit axes refuse. Raises ``UserError`` when the devices do not suffice.
    """
    n = jax.device_count()
    prompts = n // model if prompts is None else prompts
    if prompts < 1 or model < 1 or prompts * model > n:
        raise UserError(
            f"A mesh of prompts={prompts} x model={model} needs {prompts * model} devices, and there are {n}. "
            f"Choose sizes whose product is at least 1 and at most {n}."
        )
    devices = np.asarray(jax.devices()[: prompts * model]).reshape(prompts, model)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def place(mesh: Mesh | AbstractMesh | None, spec: P, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of one array: ``spec`` on ``mesh``, replicated along every dimension that does not divide evenly.

    Without a mesh: the default device.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    fitting = []
    for size, axis in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        known = all(name in mesh.shape for name in names)
        fits = known and size % math.prod(mesh.shape[name] for name in names) == 0
        fitting.append(axis if fits else None)
    return NamedSharding(mesh, P(*fitting))


def leaf_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None) -> P:
    """How "model" splits a leaf of one layer, or outside of the layers: by heads, MLP units or vocabulary.

    Where these do not divide evenly (8 key/value heads over 16 devices), a matrix is split along the width of the
    stream instead, so that its memory is divided all the same; its product is then summed over the devices.
    """
    spec, width = _SPECS[name], _WIDTH_AXIS.get(name)
    size = 1 if mesh is None else mesh.shape.get("model", 1)
    if width is None or shape[tuple(spec).index("model")] % size == 0 or shape[width] % size:
        return spec
    return P(*("model" if axis == width else None for axis in range(len(shape))))


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a converted checkpoint stores the leaf ``name`` of shape ``shape``.

    That is how it lies in Hugging Face files, matrices as [out, in], so that conversion copies and only loading
    transposes, on the devices.
    """
    if name in IN_AXES:
        return math.prod(shape[IN_AXES[name] :]), math.prod(shape[: IN_AXES[name]])
    return shape if name in ("embed", "positions") else (math.prod(shape),)


def stored_chunks(name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape of the chunks of a stored leaf, whose values have ``width`` bytes; each chunk is a file.

    The axis that "model" splits is cut into a power of two of chunks, at most 16, of at least 2**19 values, so that a
    process reads those of its devices and nothing else. Then the first axis is cut until so many whole rows as are in
    a chunk have at most 32 MiB: conversion streams these.
    """
    form, split = stored_shape(name, shape), _model_axis(name)
    chunk, size = list(form), math.prod(form)
    if split is not None:
        axis, pieces = _stored_axis(name, split), 1
        while pieces < _MAX_PIECES and shape[split] % (2 * pieces) == 0 and size // (2 * pieces) >= _PIECE:
            pieces *= 2
        chunk[axis] //= pieces
    while chunk[0] > 1 and chunk[0] * math.prod(form[1:]) * width > _BLOCK_BYTES:
        chunk[0] = -(-chunk[0] // 2)
    return tuple(chunk)


def stored_sharding(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> jax.sharding.Sharding:
    """Where the stored form of a leaf of shape ``shape`` goes on ``mesh``: split exactly if the leaf itself is."""
    kept = place(mesh, leaf_spec(name, shape, mesh), shape)
    if not isinstance(kept, NamedSharding) or "model" not in tuple(kept.spec):
        return place(mesh, P(), stored_shape(name, shape))
    axis = _stored_axis(name, tuple(kept.spec).index("model"))
    return place(mesh, P(*[None] * axis, "model"), stored_shape(name, shape))


def from_stored(name: str, shape: tuple[int, ...], values: jax.Array) -> jax.Array:
    """The leaf ``name`` of shape ``shape`` from its stored form."""
    return values.T.reshape(shape) if name in IN_AXES else values.reshape(shape)


def _model_axis(name: str) -> int | None:
    """The axis of a leaf that "model" splits."""
    spec = tuple(_SPECS[name])
    return spec.index("model") if "model" in spec else None


def _stored_axis(name: str, axis: int) -> int:
    """The same axis in the file: the first of the inputs or of the outputs, whose axes the file has flat."""
    return int(axis < IN_AXES[name]) if name in IN_AXES else axis


def layer_shardings(config: ModelConfig, mesh: Mesh | None) -> dict[str, jax.sharding.Sharding]:
    """Sharding of every leaf of one layer, without the layer axis."""
    return {name: place(mesh, leaf_spec(name, shape, mesh), shape) for name, shape in layer_shapes(config).items()}


def stack_shardings(config: ModelConfig, mesh: Mesh | None) -> dict[str, jax.sharding.Sharding]:
    """Sharding of every leaf of ``Layers``, stacked on axis 0. The layer axis is never split."""
    return {
        name: place(mesh, P(None, *leaf_spec(name, shape, mesh)), (config.n_layers, *shape))
        for name, shape in layer_shapes(config).items()
    }


def top_shardings(config: ModelConfig, mesh: Mesh | None) -> dict[str, jax.sharding.Sharding]:
    """Sharding of every leaf of ``Params`` outside the layers."""
    return {name: place(mesh, leaf_spec(name, shape, mesh), shape) for name, shape in top_shapes(config).items()}


def shard_params(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """Parameters that are in memory already, laid out on ``mesh`` (``load`` restores them there directly)."""
    layers = {
        name: put(getattr(params.layers, name), sharding) for name, sharding in stack_shardings(config, mesh).items()
    }
    top = {name: put(getattr(params, name), sharding) for name, sharding in top_shardings(config, mesh).items()}
    return Params(layers=Layers(**layers), **top)


def shard_rows(mesh: Mesh | None, array: jax.typing.ArrayLike) -> jax.Array:
    """``array`` with its first axis over "prompts" (replicated if it does not divide)."""
    if mesh is None:
        return jax.numpy.asarray(array)
    return put(array, place(mesh, P("prompts"), np.shape(array)))


def put(array: jax.typing.ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """``array`` laid out as ``sharding`` says. Where that is on several processes, all of them have the same values,
    and each copies what its devices hold."""
    if isinstance(array, jax.core.Tracer):  # inside jit
        return jax.lax.with_sharding_constraint(array, sharding)
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def require_memory(what: str, needed: int, mesh: Mesh | None, advice: str) -> None:
    """Raise ``UserError`` unless so many bytes, shared by the devices, can be allocated."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    needed = needed // (1 if mesh is None else mesh.devices.size) * len(devices)  # on this machine
    stats = [device.memory_stats() or {} for device in devices]
    known = [each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats if "bytes_limit" in each]
    _require(what, needed, sum(known) if known else free_memory(), advice)


def require_host_memory(what: str, needed: int, advice: str) -> None:
    """Raise ``UserError`` unless so many bytes can be allocated on this machine."""
    _require(what, needed, free_memory(), advice)


def _require(what: str, needed: int, free: int, advice: str) -> None:
    if needed > free:
        raise UserError(f"{what} needs {size_text(needed)} of memory, and {size_text(free)} are free: {advice}")


def free_memory() -> int:
    """Bytes that this machine could give to a new program, and a container's limit where it is known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
