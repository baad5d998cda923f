"""The two runs that attribution compares, from the stream before the graph's first block on, and gradients of either.

Letters: B rows, T tokens, D width, N heads, l blocks of the graph, S writers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxsteer.circuits.rows import Rows, layout_of, opened_rows, scores
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, run_and_read, scan_blocks
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sites import KINDS, Site
from jaxsteer.models.taps import NO_TAP, Intervention, Tap, adding, joined
from jaxsteer.models.transformer import embed, norm_weight
from jaxsteer.objectives.reads import Needs, composed, pickers
from jaxsteer.processes import to_host

FOLLOWS = 1e-3
"""Of the effect: how far the source may be from what follows from its stream before the graph."""


@struct.dataclass
class Written:
    """What the writers of a run add to the stream, float32; 0 on padding."""

    input: Float[Array, "B T D"]
    heads: Float[Array, "l B T N D"]
    """Behind the norm after attention, where there is one, by the statistics of the whole output. They add up to it,
    but for the bias of attention's output (GPT-2), which no head writes."""
    mlps: Float[Array, "l B T D"]

    def stacked(self) -> Float[Array, "S B T D"]:
        """All writers in the graph's order."""
        per_layer = jnp.concatenate([jnp.moveaxis(self.heads, 3, 1), self.mlps[:, None]], axis=1)
        return jnp.concatenate([self.input[None], per_layer.reshape(-1, *self.input.shape)])


@partial(jax.jit, static_argnames=("config", "start"))
def stream_before(
    params: Params, config: ModelConfig, rows: Rows, edits: Intervention | None, *, start: int
) -> Float[Array, "B T D"]:
    """The stream before block ``start``, as this block gets to see it under the edits."""
    context, tap = opened_rows(params, config, rows, edits)
    keep = [Keep(("hook_resid_pre",), lambda value, _: value, (start,))]
    x = embed(params, config, rows.tokens, context.positions, tap)
    _, [found] = scan_blocks(params, config, x, context, 0, start + 1, tap=tap, keep=keep)
    return found[0]


@partial(jax.jit, static_argnames=("config", "start"))
def written(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    edits: Intervention | None,
    *,
    start: int,
) -> Written:
    """What is written into the stream behind ``x``, the stream before block ``start``."""
    context, tap = opened_rows(params, config, rows, edits)
    inside = rows.mask[:, :, None].astype(jnp.float32)

    def heads(result: Array, scale: Array | None = None) -> Array:
        return result.astype(jnp.float32) * inside[..., None] / (1.0 if scale is None else scale[..., None])

    kinds = ("attn.hook_result", "ln1_post.hook_scale") if config.post_norms else ("attn.hook_result",)
    keep = [
        Keep(kinds, lambda *seen: heads(*seen[:-1])),
        Keep(("hook_mlp_out",), lambda value, _: value.astype(jnp.float32) * inside),
    ]
    _, (result, mlps) = scan_blocks(params, config, x, context, start, config.n_layers, tap=tap, keep=keep)
    if params.layers.post_attn_norm is not None:
        weight = norm_weight(params.layers.post_attn_norm[start:], config)
        result = result * weight[:, None, None, None]
    return Written(x.astype(jnp.float32) * inside, result, mlps)


def score_from(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    edits: Intervention | None,
    metric: Any,
    *,
    needs: Needs,
    start: int,
    tap: Tap = NO_TAP,
    added: Mapping[Site, Array] | None = None,
) -> Float[Array, " B"]:
    """Scores of the rows that go on from ``x``, the stream before block ``start``. Many parameters: all that a run may
    depend on.

    What the metric reads below that block is not seen. ``added`` as in ``run_and_read``.
    """
    context, own = opened_rows(params, config, rows, edits)
    layout, tap = layout_of(rows), joined(own, tap)
    picks, named = pickers(layout), needs.named(config.n_layers)
    spanned = sorted({name for name, _ in needs.spans})
    wanted = [
        ([named[name] for name in names], pick) for names, pick in zip((needs.sites, spanned), picks, strict=True)
    ]
    final = {site.kind: value for site, value in (added or {}).items() if not KINDS[site.kind].in_block}
    x, (values, spans) = run_and_read(
        params, config, x, context, config.n_layers, wanted, tap=tap, added=added, begin=start
    )
    found = {name: values[named[name]] for name in needs.sites}, {name: spans[named[name]] for name in spanned}
    end = joined(tap, adding(final)) if final else tap
    return scores(metric, composed(params, config, needs, x, found, layout, end), rows)


@partial(jax.jit, static_argnames=("config", "needs"))
def score_rows(
    params: Params, config: ModelConfig, rows: Rows, edits: Intervention | None, metric: Any, *, needs: Needs
) -> Float[Array, " B"]:
    """Scores of whole runs."""
    context, tap = opened_rows(params, config, rows, edits)
    x = embed(params, config, rows.tokens, context.positions, tap)
    return score_from(params, config, rows, x, edits, metric, needs=needs, start=0)


def alphas(steps: int, rule: str) -> np.ndarray:
    """Where on the way from one run to the other gradients are taken: the middles of ``steps`` equal parts ("half": of
    the first half of the way), or their left ends."""
    places = (np.arange(steps) + (0.0 if rule == "left" else 0.5)).astype(np.float32) / steps
    return places / 2 if rule == "half" else places


def two_runs(
    model: Model,
    rows: Rows,
    other: Rows,
    source: Rows | Intervention,
    edits: Intervention | None,
    metric: Any,
    needs: Needs,
    start: int,
) -> tuple[tuple[Array, Array], Float[np.ndarray, "2 B"]]:
    """The streams of both runs before the graph, and their scores. Refuses a source that does not follow from there."""
    changed = source if isinstance(source, Intervention) else edits
    streams = tuple(
        stream_before(model.params, model.config, each, under, start=start)
        for each, under in ((rows, edits), (other, changed))
    )
    scored = to_host([
        _scored(model.params, model.config, rows, x, edits, metric, needs=needs, start=start) for x in streams
    ])  # fmt: skip
    if isinstance(source, Intervention):
        whole = to_host(score_rows(model.params, model.config, rows, source, metric, needs=needs))
        gap, effect = np.abs(whole - scored[1]).max(), np.abs(whole - scored[0]).max()
        if gap > FOLLOWS * max(effect, 1e-3):
            raise UserError(
                f"the source is not what follows from its stream before block {start}: the metric is off by {gap:.3g}, "
                f"of an effect of {effect:.3g}. Its edits must act on the input of that block, or below: choose start"
            )
    return (streams[0], streams[1]), np.stack(scored)


_scored = partial(jax.jit, static_argnames=("config", "needs", "start"))(score_from)
