"""How many rows go through a program at a time: planned by a guess, and asked of XLA where memory is scarce."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import place, require_memory

SURE = 4
"""A guess this many times below, or above, the free memory is believed without compiling anything."""


def rows_at_once(
    what: str, model: Model, guess: int, most: int, lower: Callable[[int], Any], *, advice: str = "shorten the texts."
) -> int:
    """The most rows of a pass, at most ``most`` and halved until they fit: ``guess`` are the bytes of one.

    ``lower(size)`` is the lowered program (``jax.jit(...).lower``) for so many rows; XLA's own count of its scratch,
    results and arguments without the model's weights decides. Raises ``UserError``, which begins with ``what`` and ends
    with ``advice``, where not even one row fits.
    """
    size = most
    while not _fits(model, guess * size * SURE):
        needed = guess * size
        if _fits(model, needed // SURE):
            needed = program_bytes(lower(size), model)
            if _fits(model, needed):
                return size
        if size == 1:
            require_memory(f"{what} of one row", needed, model.mesh, advice)
        size = -(-size // 2)
    return size


def program_bytes(lowered: Any, model: Model) -> int:
    """Bytes that a program takes on all devices beside the model's weights: scratch, results and its other arguments.

    More than any machine has where XLA itself finds no room for it.
    """
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return 1 << 60
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params)
    )
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    one = max(0, memory.argument_size_in_bytes - weights) + memory.temp_size_in_bytes + made
    return int(one) * (1 if model.mesh is None else model.mesh.devices.size)


def abstract_rows(model: Model, tree: Any, size: int | None = None) -> Any:
    """The shapes of arrays whose first axis is the rows', for ``size`` of them, spread over the model's mesh."""

    def one(array: Any) -> jax.ShapeDtypeStruct:
        shape = np.shape(array) if size is None else (size, *np.shape(array)[1:])
        sharding = None if model.mesh is None else place(model.mesh, P("prompts"), shape)
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def row_bytes(config: ModelConfig, length: int, readings: int) -> int:
    """About what one row of ``length`` tokens takes on its way through a block and the unembedding, in float32."""
    own = length * (8 * config.d_model + 4 * config.d_mlp + 6 * config.n_heads * config.d_head)
    return 4 * (own + 4 * config.n_heads * length**2 + 3 * readings * config.vocab_size)


def _fits(model: Model, needed: int) -> bool:
    try:
        require_memory("", needed, model.mesh, "")
    except UserError:
        return False
    return True
