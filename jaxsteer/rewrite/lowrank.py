"""A change of W_down of some layers as an intervention: what a rewritten model computes, without copying its weights.

Letters: B rows, T time, I MLP width, D width, E layers that are changed, r rank.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.models.taps import Intervention, Layer, Tap, Where

KEY, VALUE = "mlp.hook_post", "mlp.hook_out"
"""The sites of what W_down reads and of what it gives."""


@struct.dataclass
class LowRank(Intervention):
    """Adds ``key @ left @ right`` to the output of W_down in every layer of ``layers``."""

    layers: Int[Array, " E"]
    left: Float[Array, "E b I r"]
    """b is 1 where all rows have the same change, else the number of rows."""
    right: Float[Array, "E b r D"]

    @property
    def kinds(self) -> frozenset[str]:
        """See ``Intervention``."""
        return frozenset({KEY, VALUE})

    @property
    def rows(self) -> int | None:
        """See ``Intervention``."""
        return None if self.left.shape[1] == 1 else self.left.shape[1]

    def of_rows(self, index: Int[Array, " B"]) -> LowRank:
        """See ``Intervention``."""
        if self.left.shape[1] == 1:
            return self
        return LowRank(layers=self.layers, left=self.left[:, index], right=self.right[:, index])

    def tap(self, where: Where) -> Tap:
        """See ``Intervention``. The tap keeps the key of the block that is being traced for its value."""
        keys: dict[str, Any] = {}

        def change(kind: str, layer: Layer, value: Array) -> Array:
            if kind == KEY:
                keys[KEY] = value
                return value
            wide = keys.pop(KEY).astype(jnp.float32)
            for number in range(len(self.layers)):
                gain = _product(_product(wide, self.left[number]), self.right[number])
                value = value + jnp.where(self.layers[number] == layer, gain, 0.0).astype(value.dtype)
            return value

        return Tap(self.kinds, change)


def _product(x: Float[Array, "B T i"], matrix: Float[Array, "b i o"]) -> Float[Array, "B T o"]:
    if matrix.shape[0] == 1:
        return jnp.matmul(x, matrix[0], precision=lax.Precision.HIGHEST)
    return jnp.einsum("bti,bio->bto", x, matrix, precision=lax.Precision.HIGHEST)


def at_layer(layer: int, left: Any, right: Any) -> LowRank:
    """The change of one layer, the same for all rows."""
    return LowRank(
        layers=jnp.asarray([layer]),
        left=jnp.asarray(left, jnp.float32)[None, None],
        right=jnp.asarray(right, jnp.float32)[None, None],
    )


def of_each_row(layer: int, left: Any, right: Any) -> LowRank:
    """Changes of one layer of rank 1, one for each row: ``left`` [B, I], ``right`` [B, D]."""
    return LowRank(
        layers=jnp.asarray([layer]),
        left=jnp.asarray(left, jnp.float32)[None, :, :, None],
        right=jnp.asarray(right, jnp.float32)[None, :, None, :],
    )


@struct.dataclass
class Push(Intervention):
    """Adds a vector to the output of W_down of one layer at every token: the steering beside an edit."""

    layer: Int[Array, ""]
    vectors: Float[Array, "b D"]
    """b is 1 where all rows have the same, else the number of rows."""

    @property
    def kinds(self) -> frozenset[str]:
        """See ``Intervention``."""
        return frozenset({VALUE})

    @property
    def rows(self) -> int | None:
        """See ``Intervention``."""
        return None if len(self.vectors) == 1 else len(self.vectors)

    def tap(self, where: Where) -> Tap:
        """See ``Intervention``."""

        def change(_: str, layer: Layer, value: Array) -> Array:
            return value + jnp.where(layer == self.layer, self.vectors[:, None], 0.0).astype(value.dtype)

        return Tap(self.kinds, change)
