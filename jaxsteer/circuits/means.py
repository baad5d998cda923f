"""Mean ablation: what stands at a site in the mean over a dataset.

Letters: B rows, T tokens, L layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxsteer.circuits.rows import Rows, on_devices, opened_rows
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, scan_blocks
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sites import KINDS
from jaxsteer.models.taps import Intervention
from jaxsteer.models.transformer import embed
from jaxsteer.processes import to_host


@struct.dataclass
class Mean:
    """A value for all rows in place of those of another run: the mean over a dataset (``mean_values``)."""

    values: Float[np.ndarray | Array, "L ..."]
    """By layer: of one token, or with a leading axis of positions."""
    per_position: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def over(
        cls,
        model: Model,
        rows: Rows,
        kind: str,
        *,
        per_position: bool = False,
        edits: Intervention | None = None,
        batch: int = 16,
    ) -> Mean:
        """The mean at a kind of site in every layer, over all tokens of a dataset or over its rows token by token.

        A position that no row has is 0. Raises ``UserError`` for patterns and scores, which have no such mean.
        """
        if not KINDS[kind].in_block or KINDS[kind].over_keys:
            raise UserError(
                f"there is no mean of {kind} over a dataset: choose a site in blocks with a value per token"
            )
        total: Any = 0.0
        for begin in range(0, len(rows.tokens), batch):
            index = np.arange(begin, begin + batch)
            part = rows.take(index % len(rows.tokens))
            part = part.replace(mask=part.mask & (index < len(rows.tokens))[:, None])  # type: ignore[attr-defined]
            part = on_devices(model, part)
            total = total + to_host(
                _sums(model.params, model.config, part, edits, kind=kind, per_position=per_position)
            )
        count = rows.mask.sum(0) if per_position else rows.mask.sum()
        shape = np.shape(count) + (1,) * (total.ndim - 1 - np.ndim(count))
        return cls(total / np.maximum(count, 1).reshape(shape), per_position)

    def of_layer(self, layer: int, length: int) -> Array:
        """The value of one layer, for rows of ``length`` tokens; nothing stands in the padding behind its positions."""
        value = jnp.asarray(self.values[layer])
        if not self.per_position:
            return value
        return jnp.pad(value[:length], [(0, max(0, length - len(value))), *[(0, 0)] * (value.ndim - 1)])


@partial(jax.jit, static_argnames=("config", "kind", "per_position"))
def _sums(
    params: Params, config: ModelConfig, rows: Rows, edits: Intervention | None, *, kind: str, per_position: bool
) -> Float[Array, "L ..."]:
    """Sums over the rows (and over their tokens) of every layer's values."""
    context, tap = opened_rows(params, config, rows, edits)

    def pick(value: Array, _: None) -> Array:
        inside = jnp.where(rows.mask.reshape(*rows.mask.shape, *[1] * (value.ndim - 2)), value.astype(jnp.float32), 0)
        return inside.sum(0 if per_position else (0, 1))

    x = embed(params, config, rows.tokens, context.positions, tap)
    _, [sums] = scan_blocks(params, config, x, context, 0, config.n_layers, tap=tap, keep=[Keep((kind,), pick)])
    return sums
