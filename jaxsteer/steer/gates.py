"""Conditional steering: edits behind a gate that a row's prompt opens or leaves closed (2409.05907).

The gate is decided once per row, by the model as it is on the row's prompt, and holds for all of the row: also while
tokens are decoded with a cache. What a closed gate guards keeps its bits. Values of thresholds are data.

Letters: B rows, T time, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.models.attention import Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_and_read
from jaxsteer.models.params import Params
from jaxsteer.models.sites import KINDS, Site, find_sites, parse_site
from jaxsteer.models.taps import Intervention, Layer, Tap, Where
from jaxsteer.models.transformer import embed, make_context
from jaxsteer.ranges import check_types, must_be
from jaxsteer.steer.edits import common_rows, known
from jaxsteer.steer.selectors import Positions, Selector, select

Reads = dict[str, Float[Array, "B D"]]
"""By site, the mean of a row's values over the tokens of its prompt that the gate reads, heads joined; float32."""
Condition = Callable[[Reads], Bool[Array, " B"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Open for prompts along a vector: ``sign * (cos(h, vector) - threshold) > 0``, h the mean over ``positions``.

    Made by ``tune_gate``; ``Vectors`` hold one, files store it. Raises ``UserError`` for what can be no gate.
    """

    site: str
    vector: np.ndarray
    """float32 (D,); its length does not matter."""
    threshold: float
    """Of the cosine, from -1 to 1."""
    sign: int = 1
    """1: open above the threshold; -1: open below it."""
    positions: str = "prompt"
    """Tokens of the prompt whose mean is compared: a name of ``steer.select`` ("prompt", "last", "user" ...)."""
    accuracy: float | None = None
    """Balanced accuracy on rows that chose nothing, where it was tuned."""
    interval: tuple[float, float] | None = None
    """Of ``accuracy``, 95 %."""
    n: int | None = None
    """Rows that ``accuracy`` is over."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        check_types(self)
        parse_site(self.site)
        select(self.positions)  # raises for a name that it does not know
        must_be(self.vector, np.ndarray, "the vector of a gate")
        array = self.vector
        if array.dtype != np.float32 or array.ndim != 1 or not np.isfinite(array).all() or not array.any():
            raise UserError(
                f"the vector of a gate must be float32 (D,), finite and not zero, got {array.dtype} {array.shape}"
            )
        if not -1 <= self.threshold <= 1 or self.sign not in (1, -1):
            raise UserError(
                f"a gate has a threshold from -1 to 1 and the sign 1 or -1, got {self.threshold:g} and {self.sign}"
            )

    def to_json(self) -> str:
        """All but the vector."""
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k != "vector"})

    @classmethod
    def from_json(cls, text: str, vectors: dict[str, np.ndarray]) -> Gate:
        """What ``to_json`` wrote, with its vector among those by site. Raises ``UserError`` where it does not fit."""
        facts = parse_json(text, "gate")
        names = {field.name for field in dataclasses.fields(cls)} - {"vector"}
        if not isinstance(facts, dict) or not {"site", "threshold"} <= facts.keys() <= names:
            raise UserError("gate must be an object with a site and a threshold")
        if not isinstance(facts["site"], str) or facts["site"] not in vectors:
            raise UserError("there is no tensor of the gate's vector")
        threshold, interval = facts["threshold"], facts.get("interval")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise UserError("the threshold of the gate must be a number")
        made = facts | {"threshold": float(threshold), "interval": tuple(interval) if interval else None}
        try:
            return cls(vector=vectors[facts["site"]], **made)
        except TypeError as error:
            raise UserError(f"gate does not fit: {error}") from error


@struct.dataclass
class Cosine:
    """The condition of a ``Gate``."""

    vector: Float[Array | np.ndarray, " D"]
    threshold: Float[Array | np.ndarray, ""]
    sign: Float[Array | np.ndarray, ""]

    def __call__(self, reads: Reads) -> Bool[Array, " B"]:
        """Whether the one value that was read lies on the gate's side."""
        (h,) = reads.values()
        return jnp.asarray(self.sign) * (cosine(h, self.vector) - self.threshold) > 0


def cosine(h: Float[Array, "B D"], vector: Float[Array | np.ndarray, " D"]) -> Float[Array, " B"]:
    """Cosine of every row with a vector, 0 for a row of zeros."""
    along = jnp.matmul(h, jnp.asarray(vector), precision=lax.Precision.HIGHEST)
    return along / jnp.maximum(jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(vector), 1e-30)


@struct.dataclass
class Gated(Intervention):
    """Edits that act only in rows whose prompt opens the gate. Made by ``gated``."""

    edits: Intervention
    condition: Any
    """A pytree that is called: ``Reads -> bool [B]``."""
    selector: Selector
    """The tokens that are read, of the prompt."""
    sites: tuple[Site, ...] = struct.field(pytree_node=False)
    open: Bool[Array, " B"] | None = None
    """Decided by the rows' prompts; None before."""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of site of the edits."""
        return self.edits.kinds

    @property
    def rows(self) -> int | None:
        """Rows of the batch that it is made for; None if it serves any number."""
        return common_rows([self.edits.rows or 1, 1 if self.open is None else len(self.open)])

    @property
    def neutral(self) -> bool:
        """Whether the edits change nothing, or no gate is open."""
        open = None if self.open is None else known(self.open)
        return self.edits.neutral or (open is not None and not open.any())

    @property
    def label(self) -> str:
        """That of the edits, behind a gate."""
        return f"{self.edits.label}, behind a gate"

    @property
    def conditional(self) -> bool:
        """Whether it has not been decided."""
        return self.open is None or self.edits.conditional

    @property
    def on_cache(self) -> bool:
        """As the edits."""
        return self.edits.on_cache

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Refuse edits, sites and a vector that do not fit, with a ``UserError``."""
        self.edits.check(config, rows)
        for site in find_sites([site.name for site in self.sites], config).values():
            width = KINDS[site.kind].width(config)
            if isinstance(self.condition, Cosine) and len(self.condition.vector) != width:
                raise UserError(
                    f"The gate's vector has {len(self.condition.vector)} components, but values at {site.name} have "
                    f"{width}: it belongs to another model or another site."
                )

    def decided(self, params: Params, config: ModelConfig, where: Where) -> Gated:
        """With the gate of every row opened or closed by what its prompt makes of the model as it is."""
        if not self.conditional:
            return self
        prompt = where.valid & (where.positions < where.prompt_length[:, None])
        read = jax.tree.map(jnp.asarray, self.selector).touched(where) & prompt
        share = read / jnp.maximum(read.sum(-1, keepdims=True), 1)

        def pick(_: str, value: Float[Array, "B T *size"]) -> Float[Array, "B D"]:
            flat = value.astype(jnp.float32).reshape(*value.shape[:2], -1)
            return jnp.einsum("bt,btd->bd", share, flat, precision=lax.Precision.HIGHEST)

        context = make_context(config, where.positions, where.valid)
        depth = max((site.depth(config.n_layers) for site in self.sites), default=0)
        x = embed(params, config, where.tokens, context.positions)
        _, [found] = run_and_read(params, config, x, context, depth, [(self.sites, pick)])
        open = jnp.asarray(self.condition({site.name: found[site] for site in self.sites}))
        if open.shape != read.shape[:1] or open.dtype != bool:
            raise UserError(
                f"The condition of a gate returns True or False for each of {len(read)} rows, got {open.dtype} of "
                f"shape {list(open.shape)}."
            )
        return dataclasses.replace(self, edits=self.edits.decided(params, config, where), open=open & read.any(-1))

    def of_rows(self, index: Int[Array, " B"]) -> Gated:
        """The decisions of the rows' prompts."""
        return dataclasses.replace(self, edits=self.edits.of_rows(index), open=self._decisions()[index])

    def cached(self, prefix: Prefix, config: ModelConfig) -> Prefix:
        """Keys and values, changed where the gate is open."""
        new, open = self.edits.cached(prefix, config), self._decisions()[None, :, None, None, None]
        return dataclasses.replace(prefix, k=jnp.where(open, new.k, prefix.k), v=jnp.where(open, new.v, prefix.v))

    def tap(self, where: Where) -> Tap:
        """The edits' tap where the gate is open, the value's own bits elsewhere."""
        open, inner = self._decisions(), self.edits.tap(where)

        def change(kind: str, layer: Layer, value: Array) -> Array:
            return jnp.where(open.reshape(-1, *[1] * (value.ndim - 1)), inner(kind, layer, value), value)

        return Tap(inner.kinds, change)

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True at positions that the edits reach in rows whose gate is open."""
        return self.edits.touched(where) & self._decisions()[:, None]

    def _decisions(self) -> Bool[Array, " B"]:
        if self.open is None:
            raise UserError(
                "A gate is decided by the rows' prompts, and here nobody has: run the edit with jaxsteer.run, generate "
                "or an evaluation, or give it Gated.decided(params, config, where) first."
            )
        return jnp.asarray(self.open)


def gated(
    edits: Intervention,
    gate: Gate | Condition,
    *,
    sites: str | Sequence[str] = (),
    positions: Positions = "prompt",
) -> Gated:
    """``edits`` in rows whose prompt opens the gate; every other row is left as it is.

    ``gate`` is a ``Gate``, or a pure function of what is read at ``sites``, in the mean over ``positions`` of the
    prompt, to one boolean per row: ``lambda reads: reads[site] @ vector > 3``. A pytree that can be called (a
    ``jax.tree_util.Partial``) may change its arrays without a new program. A prompt without a token at ``positions``
    leaves the gate closed. Raises ``UserError`` for a function without sites, and for sites beside a ``Gate``.
    """
    if not isinstance(edits, Intervention):
        raise UserError(f"a gate stands before edits (Vectors.edits(), steer.add ...), got {type(edits).__name__}")
    if not isinstance(gate, Gate) and not callable(gate):
        raise UserError(f"a gate is a Gate (tune_gate) or a function of what is read, got {type(gate).__name__}")
    if isinstance(gate, Gate):
        if sites:
            raise UserError("a Gate names its site and positions itself: sites belong to a function")
        condition: Any = Cosine(gate.vector, *(np.asarray(x, np.float32) for x in (gate.threshold, gate.sign)))
        return Gated(edits, condition, select(gate.positions), (parse_site(gate.site),))
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names:
        raise UserError("the function of a gate reads sites: name them (sites=[...])")
    condition = Partial(gate) if jax.tree_util.all_leaves([gate]) else gate
    return Gated(edits, condition, select(positions), tuple(parse_site(name) for name in names))
