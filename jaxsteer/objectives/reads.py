"""What an objective reads of rows, found by tracing it once, and the run through the layers that collects it.

Letters: B rows (one candidate in one context each), T tokens of a row, U keys that attention sees (the text before the
row's own tokens, then these), D width, N query heads, K key/value heads, H head width, I MLP width, V vocabulary,
n tokens of a target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_and_read
from jaxsteer.models.log_probs import label_log_probs
from jaxsteer.models.params import Params
from jaxsteer.models.sites import FINAL, KINDS, Site, parse_site
from jaxsteer.models.taps import NO_TAP, Tap, Visit
from jaxsteer.models.transformer import Context, final_norm, unembed, unembed_normed
from jaxsteer.processes import PREEMPTED

SPANS = ("prompt", "tail")
"""Stretches of a row's own tokens: the searched ones, and those after them up to the end of the input."""
KEYS = ("first", "before", *SPANS)
"""Stretches of what attention looks at: the text's first token (BOS where the model has one), all that stands before
the prompt, and the spans."""


@struct.dataclass
class Target:
    """Answers whose probability is asked for, one for every token of ``Layout.read``. All of their tokens but the last
    stand in the row."""

    ids: Int[Array, "R n"]
    mask: Bool[Array, "R n"]
    """False on the padding of shorter answers, which stands at their end."""
    start: Int[Array, "B ..."]
    """The token that predicts the answer's first one."""


@struct.dataclass
class Layout:
    """Where things stand in rows; whoever composes rows knows."""

    read: Int[Array, "B ..."]
    """The token that is read; or q of them, where a row holds q candidates: an objective then sees them as q rows."""
    context: Int[Array, " R"]
    """Number of the context that each of these belongs to."""
    spans: Mapping[str, Bool[Array, "B T"]]
    """By name of ``SPANS``, the row's tokens that belong to it."""
    keys: Mapping[str, Bool[Array, "B U"]]
    """By name of ``KEYS`` without "first", the keys that belong to it: in the order in which attention sees them."""
    target: Target | None = None


class Reads:
    """What an objective sees of a batch of rows (one row: one candidate in one context), all in float32.

    ``reads[site]`` is the value at the read position: (rows, D) for the residual stream (``hook_embed``,
    ``hook_resid_pre/mid/post``) and for ``hook_attn_out``, ``hook_mlp_out`` and ``mlp.hook_in``; (rows, I) for neurons
    (``mlp.hook_pre/pre_linear/post``); (rows, N, H) for ``attn.hook_q/z``, (rows, K, H) for ``attn.hook_k/v``; and
    (rows, N, keys) for ``attn.hook_pattern``, where ``reads.keys(name)`` tells which key is which.
    """

    def __init__(
        self,
        values: Mapping[str, Array],
        *,
        spans: Mapping[str, Array] | None = None,
        logits: Float[Array, "rows V"] | None = None,
        target_log_probs: Float[Array, "rows n"] | None = None,
        layout: Layout | None = None,
    ):
        self._values, self._spans, self._layout = values, spans or {}, layout
        self._logits, self._target_log_probs = logits, target_log_probs

    def __getitem__(self, site: str) -> Float[Array, "rows ..."]:
        return self._values[site]

    @property
    def logits(self) -> Float[Array, "rows V"]:
        """Logits of the token after the read position."""
        return _present(self._logits)

    @property
    def context(self) -> Int[Array, " rows"]:
        """Number of every row's context, from 0: an index into arrays that hold one entry per context."""
        return _present(self._layout).context

    def span(self, site: str, span: str = "prompt") -> Float[Array, "rows T ..."]:
        """The values at all tokens of the rows; ``span_mask`` says which of them belong to the span."""
        _one_of(span, SPANS)
        return self._spans[site]

    def span_mask(self, span: str = "prompt") -> Bool[Array, "rows T"]:
        """The tokens of a span: "prompt" (the searched tokens) or "tail" (those after it, up to the input's end)."""
        return _present(self._layout).spans[_one_of(span, SPANS)]

    def span_mean(self, site: str, span: str = "prompt") -> Float[Array, "rows ..."]:
        """The mean of a site over the tokens of a span (0 where the span has none)."""
        values, mask = self.span(site, span), self.span_mask(span)
        inside = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
        return jnp.sum(values * inside, axis=1) / jnp.maximum(inside.sum(axis=1), 1)

    def keys(self, name: str) -> Bool[Array, "rows keys"]:
        """The keys of ``attn.hook_pattern`` in "first" (the text's first token), "before" (all text before the
        prompt), "prompt" or "tail".
        """
        masks = _present(self._layout).keys
        if _one_of(name, KEYS) != "first":
            return masks[name]
        text = jnp.any(jnp.stack(list(masks.values())), axis=0)
        return text & (jnp.cumsum(text, axis=-1) == 1)

    @property
    def target(self) -> Int[Array, "rows n"]:
        """Ids of the target answer that the task was made with, padded at the end."""
        return _present(_present(self._layout).target).ids

    @property
    def target_mask(self) -> Bool[Array, "rows n"]:
        """False on the padding of targets."""
        return _present(_present(self._layout).target).mask

    @property
    def target_log_probs(self) -> Float[Array, "rows n"]:
        """Log-probability of every target token given the input and the target's tokens before it; 0 on padding."""
        return _present(self._target_log_probs)


def _present(value: Any) -> Any:
    assert value is not None, "the objective did not read this when it was traced"
    return value


def _one_of(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise UserError(f"an objective asked for the tokens {name!r}: there are {', '.join(names)}")
    return name


Objective = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective reads: sites at the read position, sites over spans, logits, a target's log-probability."""

    sites: tuple[str, ...] = ()
    spans: tuple[tuple[str, str], ...] = ()
    """(site, span) pairs."""
    logits: bool = False
    target: bool = False

    def named(self, n_layers: int) -> dict[str, Site]:
        """The sites that are read, at the read position or over spans, by the names that the objective gives them."""
        return {name: parse_site(name, n_layers) for name in (*self.sites, *sorted({name for name, _ in self.spans}))}

    def depth(self, n_layers: int) -> int:
        """Blocks to run before everything that was asked for is known."""
        if self.logits or self.target:
            return n_layers
        return max((site.as_stream().depth(n_layers) for site in self.named(n_layers).values()), default=0)


class _Recorder(Reads):
    """Stands in for ``Reads`` while an objective is traced, and notes what it touches."""

    def __init__(self, config: ModelConfig, rows: int):
        self._config, self._rows = config, rows
        self.sites: set[str] = set()
        self.spans: set[tuple[str, str]] = set()
        self.reads_logits = self.reads_target = False
        self._tokens, self._keys, self._answer = 5, 7, 2  # lengths that tracing never gets to see

    def __getitem__(self, site: str) -> Array:
        shape = self._shape(site)
        self.sites.add(site)
        return jnp.zeros((self._rows, *shape))

    def _shape(self, site: str) -> tuple[int, ...]:
        shape = KINDS[parse_site(site, self._config.n_layers).kind].token_shape(self._config)
        return tuple(self._keys if size < 0 else size for size in shape)

    @property
    def logits(self) -> Array:
        self.reads_logits = True
        return jnp.zeros((self._rows, self._config.vocab_size))

    @property
    def context(self) -> Array:
        return jnp.zeros(self._rows, jnp.int32)

    def span(self, site: str, span: str = "prompt") -> Array:
        _one_of(span, SPANS)
        shape = self._shape(site)
        if KINDS[parse_site(site, self._config.n_layers).kind].over_keys:
            raise UserError(f"{site!r} can be read at the read position only, not over a span")
        self.spans.add((site, span))
        return jnp.zeros((self._rows, self._tokens, *shape))

    def span_mask(self, span: str = "prompt") -> Array:
        _one_of(span, SPANS)
        return jnp.ones((self._rows, self._tokens), bool)

    def keys(self, name: str) -> Array:
        _one_of(name, KEYS)
        return jnp.ones((self._rows, self._keys), bool)

    @property
    def target(self) -> Array:
        return jnp.zeros((self._rows, self._answer), jnp.int32)

    @property
    def target_mask(self) -> Array:
        return jnp.ones((self._rows, self._answer), bool)

    @property
    def target_log_probs(self) -> Array:
        self.reads_target = True
        return jnp.zeros((self._rows, self._answer))


def needs(objective: Objective, config: ModelConfig) -> Needs:
    """Trace ``objective`` once and say what it reads.

    Raises ``UserError`` when it reads an unknown site, nothing at all, or does not return one float per row, saying
    what it returned or how it failed.
    """
    rows = 3
    recorder = _Recorder(config, rows)
    try:
        out = jax.eval_shape(lambda: objective(recorder))
    except (UserError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == PREEMPTED:  # a signal, not the objective
            raise
        raise UserError(
            f"the objective failed when it was traced with {rows} rows: {type(error).__name__}: {error}. It must be a "
            "pure function of its reads in jax.numpy, without `if` or `while` on their values"
        ) from error
    if not hasattr(out, "shape") or out.shape != (rows,) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise UserError(
            "an objective must return one float per row: for reads of shape (rows, D) it must return shape (rows,); "
            f"given {rows} rows it returned {out}"
        )
    found = Needs(
        sites=tuple(sorted(recorder.sites)),
        spans=tuple(sorted(recorder.spans)),
        logits=recorder.reads_logits,
        target=recorder.reads_target,
    )
    if found == Needs():
        raise UserError(
            "the objective reads nothing: use reads['blocks.<l>.hook_resid_post'], reads.logits or "
            "reads.target_log_probs"
        )
    return found


def read(
    params: Params,
    config: ModelConfig,
    needs: Needs,
    x: Float[Array, "B T D"],
    context: Context,
    layout: Layout,
) -> tuple[Reads, Float[Array, "B T D"], int]:
    """What ``needs`` names of rows whose stream before block 0 is ``x``, differentiable with respect to ``x``.

    Returns the reads, the stream at the depth where the run ended, and that depth in blocks: the deepest thing read,
    nothing above it is computed. One scan over the layers whatever is read. Raises ``UserError`` when the objective
    wants a target and the rows have none.
    """
    if needs.target and layout.target is None:
        raise UserError(
            "the objective reads the log-probability of a target answer, but the task has none: give one (--target, "
            "or prompts.with_target on the slots before make_task)"
        )
    depth = needs.depth(config.n_layers)
    names = needs.named(config.n_layers)
    sites = {name: site.as_stream() for name, site in names.items()}
    spanned = sorted({name for name, _ in needs.spans})
    picks = pickers(layout)
    wanted = [([sites[n] for n in needs.sites], picks[0]), ([sites[n] for n in spanned], picks[1])]
    x, (values, spans) = run_and_read(params, config, x, context, depth, wanted)
    found = {name: values[sites[name]] for name in needs.sites}, {name: spans[sites[name]] for name in spanned}
    return composed(params, config, needs, x, found, layout), x, depth


def pickers(layout: Layout) -> tuple[Callable[[str, Array], Array], Callable[[str, Array], Array]]:
    """What is picked of the value at a kind of site: at the tokens that are read, and over all of a row."""

    def at_read(kind: str, value: Array) -> Array:
        return _at(value, layout.read, KINDS[kind].axes.split().index("T")).astype(jnp.float32)

    return at_read, lambda kind, value: value.astype(jnp.float32)


def composed(
    params: Params,
    config: ModelConfig,
    needs: Needs,
    x: Float[Array, "B T D"],
    found: tuple[Mapping[str, Array], Mapping[str, Array]],
    layout: Layout,
    tap: Tap = NO_TAP,
) -> Reads:
    """The reads of rows whose stream ended as ``x``; ``found`` was picked at sites on the way, and over spans.

    ``tap`` changes the final norm."""
    normed = bool(tap.kinds & set(FINAL))
    if normed:
        x = final_norm(params, config, x, Visit(tap))
    to_logits = unembed_normed if normed else unembed
    answers = _target_log_probs(params, config, x, _present(layout.target), normed) if needs.target else None
    return Reads(
        found[0],
        spans=found[1],
        logits=to_logits(params, config, _at(x, layout.read, 1)) if needs.logits else None,
        target_log_probs=answers,
        layout=layout,
    )


def _at(values: Array, index: Int[Array, "B ..."], axis: int) -> Float[Array, "R ..."]:
    """The values at each row's tokens ``index``, one after the other."""
    index = jnp.expand_dims(index.reshape(len(values), -1), [i for i in range(1, values.ndim) if i != axis])
    return jnp.moveaxis(jnp.take_along_axis(values, index, axis=axis), axis, 1).reshape(
        -1, *np.delete(values.shape[1:], axis - 1)
    )


def _target_log_probs(
    params: Params, config: ModelConfig, x: Float[Array, "B T D"], target: Target, normed: bool
) -> Float[Array, "R n"]:
    rows, n = target.ids.shape
    # The last tokens of shorter targets are padding; their index only has to lie inside the row.
    at = jnp.minimum(target.start[..., None] + jnp.arange(n), x.shape[1] - 1)
    hidden = _at(x, at.reshape(len(x), -1), 1)
    log_probs = label_log_probs(params, config, hidden, target.ids.reshape(-1), normed=normed)
    return jnp.where(target.mask, log_probs.reshape(rows, n), 0.0)
