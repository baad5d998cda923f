"""Exact activation patching: a value of one run put into another, everywhere it may stand, and what the metric does.

A sweep over layers, positions and heads is a batch axis. Patches of one layer are groups of rows of one program, which
goes on from the stream before that layer; what lies below has been computed once. First and last layer are data, so
that one program serves the whole sweep. Every group is compared with the unpatched run in its own place of the batch,
computed by the same program: patching a run with its own values changes no bit.

Letters: B rows, T tokens, q readings of a row, G patches of one call, S = G B slots, N heads, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.circuits.means import Mean
from jaxsteer.circuits.memory import abstract_rows, rows_at_once
from jaxsteer.circuits.patch_map import PatchMap
from jaxsteer.circuits.rows import (
    Rows,
    check_answer,
    check_lengths,
    layout_of,
    metric_of,
    on_devices,
    opened_rows,
    scores,
)
from jaxsteer.circuits.sources import Aligned, check_alignment
from jaxsteer.circuits.sweep_axes import Axes, make_axes, patch_bytes
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import walk_blocks
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import FINAL, KINDS
from jaxsteer.models.taps import Intervention, Tap, Visit, checked, joined
from jaxsteer.models.transformer import embed, final_norm
from jaxsteer.objectives.reads import Needs, Objective, composed, pickers
from jaxsteer.processes import to_host
from jaxsteer.steer.completions import room

Progress = Callable[[int, int], None]


Source = Rows | Aligned | Intervention | Mean | str
"""Where values come from: another text, one of another length, the same texts under edits, a mean, zero."""


@struct.dataclass
class Patch:
    """What is put where in the S slots; nothing where ``layer`` is none of the model's."""

    kind: str = struct.field(pytree_node=False)
    layer: Int[Array | np.ndarray, ""]
    positions: Bool[Array | np.ndarray, "S T"]
    head: Int[Array | np.ndarray, " S"]
    """-1 for all heads."""
    value: Float[Array, "S ..."]

    def tap(self) -> Tap:
        """The tap that puts the values in."""
        axes = KINDS[self.kind].axes.split()

        def change(kind: str, layer: Any, value: Array) -> Array:
            def along(axis: str) -> list[int]:
                """The shape of an array of the rows and of this axis, against the value's."""
                return [size if a in ("B", axis) else 1 for a, size in zip(axes, value.shape, strict=True)]

            here = jnp.asarray(self.positions).reshape(along("T")) & (jnp.asarray(layer) == self.layer)
            if head := next((axis for axis in axes if axis in "NK"), None):
                number = jnp.arange(value.shape[axes.index(head)])
                own = (self.head[:, None] < 0) | (self.head[:, None] == number)
                here = here & own.reshape(along(head))
            return jnp.where(here, self.value.astype(value.dtype), value)

        return Tap(frozenset({self.kind}), change)


@struct.dataclass
class _Walk:
    """Slots on their way through the blocks."""

    x: Float[Array, "S T D"]
    read: dict[str, Array]
    """What the metric reads inside of the blocks, at the tokens read, as far as the walk has come by there."""
    spans: dict[str, Array]
    value: Float[Array, "S ..."]
    """At the patched kind of site, in the last block that was run."""


@partial(jax.jit, static_argnames=("config", "needs", "kind"))
def begin_walk(
    params: Params, config: ModelConfig, rows: Rows, edits: Intervention | None, *, needs: Needs, kind: str
) -> _Walk:
    """The stream before block 0, and zeros for what will be read."""
    context, tap = opened_rows(params, config, rows, edits)
    count, length = rows.tokens.shape

    def zeros(name: str, one: bool) -> Array:
        sizes = {"B": count, "T": rows.read.shape[1] if one else length, "U": length}
        axes, shape = KINDS[name].axes.split(), KINDS[name].shape(config)
        sized = [sizes.get(axis, size) for axis, size in zip(axes, shape)]
        if not one:
            return jnp.zeros(sized, jnp.float32)
        tokens = sized.pop(axes.index("T"))
        return jnp.zeros((count * tokens, *sized[1:]), jnp.float32)

    named = needs.named(config.n_layers)
    return _Walk(
        x=embed(params, config, rows.tokens, context.positions, tap),
        read={name: zeros(named[name].kind, True) for name in needs.sites},
        spans={name: zeros(named[name].kind, False) for name in sorted({name for name, _ in needs.spans})},
        value=zeros(kind, False),
    )


@partial(jax.jit, static_argnames=("config", "needs"))
def walk_on(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    walk: _Walk,
    patch: Patch,
    edits: Intervention | None,
    metric: Any,
    span: tuple[Int[Array, ""], Int[Array, ""]],
    *,
    needs: Needs,
) -> tuple[_Walk, Float[Array, " S"]]:
    """The slots after the blocks of ``span``, and their scores if these were the last blocks. Many parameters: it is
    the one program of a sweep."""
    context, tap = opened_rows(params, config, rows, edits)
    tap, layout = joined(tap, patch.tap()), layout_of(rows)
    picks, named, sites = pickers(layout), needs.named(config.n_layers), [*walk.read, *walk.spans]

    def picked(name: str) -> Callable[[Array], Array]:
        return partial(picks[name in walk.spans and name not in walk.read], named[name].kind)

    keep: list[Any] = [
        (named[name].kind, named[name].layer, picked(name)) for name in sites if KINDS[named[name].kind].in_block
    ]
    old = [(walk.read | walk.spans)[name] for name in sites if KINDS[named[name].kind].in_block]
    if inside := KINDS[patch.kind].in_block:
        keep.append((patch.kind, None, lambda value: value.astype(jnp.float32)))
        old.append(walk.value)
    x, found = walk_blocks(params, config, walk.x, context, span, tap=tap, keep=keep, kept=old)
    new = dict(zip([name for name in sites if KINDS[named[name].kind].in_block], found))
    end = Visit(tap, FINAL)
    if patch.kind in FINAL or any(named[name].kind in FINAL for name in sites):
        final_norm(params, config, x, end)
        new |= {name: picked(name)(end.seen[named[name].kind]) for name in sites if named[name].kind in FINAL}
    state = _Walk(
        x=x,
        read={name: new.get(name, value) for name, value in walk.read.items()},
        spans={name: new.get(name, value) for name, value in walk.spans.items()},
        value=found[-1] if inside else end.seen[patch.kind].astype(jnp.float32),
    )
    reads = composed(params, config, needs, x, (state.read, state.spans), layout, tap)
    return state, scores(metric, reads, rows)


def _lowered(
    model: Model, rows: Rows, edits: Intervention | None, metric: Any, *, needs: Needs, kind: str
) -> jax.stages.Lowered:
    """The program of a sweep for rows of these shapes."""
    begin = lambda params, rows: begin_walk(params, model.config, rows, edits, needs=needs, kind=kind)  # noqa: E731
    walk = abstract_rows(model, jax.eval_shape(begin, model.params, rows))
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    slots = abstract_rows(model, rows.prompt_length)
    put = Patch(kind=kind, layer=number, positions=rows.mask, head=slots, value=walk.value)
    return walk_on.lower(model.params, model.config, rows, walk, put, edits, metric, (number, number), needs=needs)


def patch(
    model: Model,
    rows: Rows,
    metric: Objective,
    kind: str,
    source: Source,
    *,
    layers: Sequence[int] | None = None,
    positions: str | Sequence[int] = "each",
    heads: str | Sequence[int] = "together",
    edits: Intervention | None = None,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> PatchMap:
    """What the metric does when values at one kind of site are replaced by those of ``source``, patch by patch.

    An effect is the metric with the patch minus the metric without it. The run that is patched is that of ``rows``
    under ``edits``. Many parameters: three axes of the sweep, each of them optional.

    Args:
        metric: an objective; larger is better. It may read logits, answers and sites.
        kind: a kind of site ("hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "ln_final.hook_scale" ...).
        source: another text (``Rows`` of the same lengths, or ``align``ed), edits on the same texts, a ``Mean``, or
            "zero".
        layers: all by default.
        positions: every token by itself, all of them together, or those listed. In patterns and scores: queries.
        heads: all together, every one by itself, or those listed.
        at_once: rows of one pass, by default as many as suit the devices and fit their memory.
        progress: ``progress(done, total)`` counts rows that are done.

    Raises:
        UserError: for a kind that is none or that this model lacks, axes beyond the model or the text, a source of
            other lengths, edits with an array per row, and a metric that is not one finite number per reading.
    """
    pytree, found = metric_of(metric, model.config)
    check_answer(found, rows)
    sweep = make_axes(model.config, kind, rows, layers, positions, heads)
    if isinstance(source, str):
        refuse_unknown([source], ["zero"], "source", "patching: ")
    for each in (edits, source):
        if isinstance(each, Intervention):
            checked(each, model.config, None)
            if each.rows is not None:
                raise UserError("a sweep puts rows side by side: give edits that serve all rows, not one for each")
    if isinstance(source, Rows):
        check_lengths(rows, source)
    if isinstance(source, Aligned):
        check_alignment(rows, source, kind)
    texts = source.rows if isinstance(source, Aligned) else source if isinstance(source, Rows) else rows
    inner = "hook_resid_pre" if kind == "hook_embed" else kind
    count, wide = len(rows.tokens), max(rows, texts, key=_width)
    size = at_once or rows_at_once(
        "Patching",
        model,
        patch_bytes(model.config, kind, wide),
        max(1, min(room() // _width(wide), count * sweep.count)),
        lambda slots: _lowered(model, abstract_rows(model, wide, slots), edits, pytree, needs=found, kind=inner),
    )
    own = math.ceil(count / math.ceil(count / size))  # rows of one part; all parts have as many
    shards = 1 if model.mesh is None else model.mesh.shape.get("prompts", 1)
    least = shards // math.gcd(shards, own)
    calls = math.ceil(sweep.count / max(1, size // own))
    groups = math.ceil(math.ceil(sweep.count / calls) / least) * least
    spread = lambda rows: on_devices(model, jax.tree.map(partial(_repeated, groups), rows))  # noqa: E731
    parts = []
    for begin in range(0, count, own):
        index = np.arange(begin, begin + own) % count
        part = _Sweep(
            model=model, kind=inner, axes=sweep, metric=pytree, needs=found, rows=spread(rows.take(index)),
            theirs=spread(texts.take(index)) if isinstance(source, Rows | Aligned | Intervention) else None,
            at=shard_rows(model.mesh, _repeated(groups, source.at[index])) if isinstance(source, Aligned) else None,
            source=source, edits=edits, groups=groups,
        )  # fmt: skip
        parts.append(part.effects())
        if progress is not None:
            progress(min(begin + own, count), count)
    effects, base, other = (np.concatenate(each)[:count] for each in zip(*parts, strict=True))
    if not np.isfinite(base).all():
        raise UserError(f"the metric is NaN or infinite without any patch. {LOGITS_NOT_FINITE}")
    effects = effects.reshape(count, *sweep.shape)
    if sweep.positions is not None:
        outside = np.asarray(sweep.positions) >= rows.lengths[:, None]
        if isinstance(source, Aligned):
            outside |= np.asarray(source.at)[:, list(sweep.positions)] < 0
        effects = np.where(outside[:, None, :, None] if sweep.heads is not None else outside[:, None], np.nan, effects)
    return PatchMap(
        model=model.name, kind=kind, source=_label(source), axes=("row", *sweep.names), layers=sweep.layers,
        positions=sweep.positions, heads=sweep.heads, shape=effects.shape, values=tuple(effects.ravel().tolist()),
        base=tuple(base.tolist()), other=tuple(other.tolist()),
    )  # fmt: skip


def _repeated(groups: int, array: Any) -> np.ndarray:
    return np.tile(array, (groups, *[1] * (np.ndim(array) - 1)))


def _width(rows: Rows) -> int:
    return int(rows.tokens.shape[1])


def _label(source: Source) -> str:
    if isinstance(source, Mean):
        return "mean, per position" if source.per_position else "mean"
    if isinstance(source, Aligned):
        return "another text, aligned"
    return "zero" if isinstance(source, str) else "another text" if isinstance(source, Rows) else source.label


@dataclasses.dataclass(kw_only=True)
class _Sweep:
    """The patches of some rows: the runs that they need side by side, layer by layer."""

    model: Model
    kind: str
    axes: Axes
    metric: Any
    needs: Needs
    rows: Rows
    """S = groups x B slots."""
    theirs: Rows | None
    """The source's slots where it is a run."""
    at: Int[Array, "S T"] | None
    """The token of the source for each token, where the two have other lengths."""
    source: Source
    edits: Intervention | None
    groups: int

    def effects(self) -> tuple[Float[np.ndarray, "B l n"], Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Effects of the n patches of every layer, and the scores of the run and of its source (NaN where that is no
        run)."""
        depth, (positions, heads) = self.model.config.n_layers, self.axes.patches(self.rows.tokens.shape[1])
        changed = self.source if isinstance(self.source, Intervention) else self.edits
        walk, theirs = self._start(self.rows, self.edits), self._start(self.theirs, changed)
        off = self._put(walk.value, -2, positions[:0], heads[:0])
        theirs_off = off
        if self.theirs is not None:
            theirs_off = self._put(theirs.value, -2, np.zeros((0, _width(self.theirs)), bool), heads[:0])
        at = behind = 0
        found: list[list[Array]] = [[] for _ in self.axes.layers]
        for index, layer in sorted(enumerate(self.axes.layers), key=lambda pair: pair[1]):
            first, last = (layer, layer + 1) if KINDS[self.kind].in_block else (depth, depth)
            walk, _ = self._go(self.rows, walk, off, self.edits, at, first)
            value = walk.value
            if self.theirs is not None:
                theirs, _ = self._go(self.theirs, theirs, theirs_off, changed, behind, last)
                value = theirs.value
            at, behind = first, last
            for begin in range(0, self.axes.count, self.groups):
                here = slice(begin, begin + self.groups)
                put = self._put(self._fixed(value, layer), layer, positions[here], heads[here])
                found[index].append(self._go(self.rows, walk, put, self.edits, first, depth)[1])
        base = to_host(self._go(self.rows, walk, off, self.edits, at, depth)[1])
        other = np.full_like(base, np.nan)
        if self.theirs is not None:
            other = to_host(self._go(self.theirs, theirs, theirs_off, changed, behind, depth)[1])
        count = len(base) // self.groups
        moved = np.stack([np.stack([a - base for a in to_host(each)]) for each in found])  # [l, calls, S]
        moved = moved.reshape(len(found), -1, count)[:, : self.axes.count]
        return np.moveaxis(moved, -1, 0), base[:count], other[:count]

    def _start(self, rows: Rows | None, edits: Intervention | None) -> Any:
        if rows is None:
            return None
        return begin_walk(self.model.params, self.model.config, rows, edits, needs=self.needs, kind=self.kind)

    def _go(
        self, rows: Rows, walk: _Walk, put: Patch, edits: Intervention | None, start: int, stop: int
    ) -> tuple[_Walk, Float[Array, " S"]]:
        span, config = (jnp.int32(start), jnp.int32(stop)), self.model.config
        return walk_on(self.model.params, config, rows, walk, put, edits, self.metric, span, needs=self.needs)

    def _fixed(self, value: Array, layer: int) -> Array:
        """The value to put in, in every slot."""
        if isinstance(self.source, Mean):
            return jnp.broadcast_to(self.source.of_layer(layer, value.shape[1]), value.shape)
        if self.at is not None:
            index = jnp.maximum(self.at, 0).reshape(*self.at.shape, *[1] * (value.ndim - 2))
            return jnp.take_along_axis(value, index, axis=1)
        return jnp.zeros_like(value) if isinstance(self.source, str) else value

    def _put(self, value: Array, layer: int, positions: Bool[np.ndarray, "g T"], heads: Int[np.ndarray, " g"]) -> Patch:
        """A patch for every group, of which the last may have none."""
        spare, rows = self.groups - len(heads), self.rows.tokens.shape[0] // self.groups
        spread = lambda a, fill: shard_rows(self.model.mesh, np.concatenate([a, fill]).repeat(rows, axis=0))  # noqa: E731
        there = spread(positions, np.zeros((spare, positions.shape[1]), bool))
        if self.at is not None and len(heads):
            there = there & (self.at >= 0)
        return Patch(
            kind=self.kind,
            layer=jnp.int32(layer),
            positions=there,
            head=spread(heads, np.full(spare, -1, np.int32)),
            value=value,
        )
