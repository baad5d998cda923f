"""Keys and streams at the last token of subjects, averaged over the beginnings of text in front of them.

Letters: B rows, T time, I MLP width, D width, l layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, scan_blocks
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import Intervention, make_where, tap_of
from jaxsteer.models.transformer import embed, make_context
from jaxsteer.processes import to_host
from jaxsteer.rewrite.facts import Fact
from jaxsteer.rewrite.lowrank import KEY
from jaxsteer.rewrite.rows import fact_row, pad

BATCH = 32
"""Rows of text at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SubjectStates:
    """Means over prefixes, float64."""

    keys: Float[np.ndarray, "n I"]
    """What W_down of a layer reads at the subject's last token."""
    stream: Float[np.ndarray, "n D"]
    """The residual stream after another layer there."""


def subject_states(
    model: Model,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layer: int,
    *,
    stream_layer: int | None = None,
    edits: Intervention | None = None,
) -> SubjectStates:
    """Keys of ``layer`` and the stream after ``stream_layer`` (default: the same) of every fact, under ``edits``."""
    rows = [fact_row(model, fact, prefix=prefix) for fact in facts for prefix in prefixes]
    deepest = max(layer, layer if stream_layer is None else stream_layer)
    keys = np.zeros((len(rows), model.config.d_mlp))
    stream = np.zeros((len(rows), model.config.d_model))
    order = sorted(range(len(rows)), key=lambda i: rows[i].subject)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        # what stands behind the subject cannot be seen from its last token
        width = min(bucket(max(rows[i].subject for i in chosen) + 1), model.config.max_positions)
        tokens = pad([rows[i].ids[: rows[i].subject + 1] for i in chosen], BATCH, width)
        at = np.asarray([rows[i].subject for i in chosen] + [0] * (BATCH - len(chosen)), np.int32)
        found = _read(
            model.params, model.config, shard_rows(model.mesh, tokens), shard_rows(model.mesh, at), edits,
            layers=(layer, deepest),
        )  # fmt: skip
        found = to_host(found)
        keys[chosen], stream[chosen] = (part[: len(chosen)] for part in found)
    each = (len(facts), len(prefixes), -1)
    return SubjectStates(keys=keys.reshape(each).mean(1), stream=stream.reshape(each).mean(1))


@partial(jax.jit, static_argnames=("config", "layers"))
def _read(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    at: Int[Array, " B"],
    edits: Intervention | None,
    *,
    layers: tuple[int, int],
) -> tuple[Float[Array, "B I"], Float[Array, "B D"]]:
    """The key of the first layer and the stream after the second at one token of each row."""

    def pick(value: Float[Array, "B T ..."], _: None) -> Float[Array, "B ..."]:
        return jnp.take_along_axis(value, at[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    positions = jnp.arange(tokens.shape[1])[None]
    tap = tap_of(edits, make_where(tokens, positions, None))
    keep = [Keep((KEY,), pick, layers[:1]), Keep(("hook_resid_post",), pick, layers[1:])]
    x = embed(params, config, tokens, positions, tap)
    _, (key, stream) = scan_blocks(
        params, config, x, make_context(config, positions), 0, max(layers) + 1, tap=tap, keep=keep
    )
    return key[0], stream[0]
