"""Freezing: steer, but let some parts compute what they compute without steering, on the same tokens.

Rows come in pairs, side by side: the base run and the steered one. At every frozen site the steered run is given the
value of its partner, so that in cached generation it is computed anew for every token, with the base run's own cache.
Only the steered run chooses tokens; the base run is led through them.

Letters: B rows, T tokens, n pairs, R pairs of a table (n, or 1 where it serves all), L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.circuits.rows import Rows
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.run import logits as run_logits
from jaxsteer.models.sampling import DEFAULTS, Decoding
from jaxsteer.models.sites import KINDS
from jaxsteer.models.taps import NO_TAP, Intervention, Tap, Where, checked
from jaxsteer.prompts.generate import Generation, Prompt, encode_prompts, generate

FREEZES: dict[str, tuple[str, ...]] = {
    "patterns": ("attn.hook_pattern",),
    "queries and keys": ("attn.hook_rot_q", "attn.hook_rot_k"),
    "values": ("attn.hook_v",),
    "attention": ("hook_attn_out",),
    "mlps": ("hook_mlp_out",),
}
"""Names for kinds of site that are frozen together."""
SPOKEN = "ln_final.hook_normalized"
"""Where the base run is given the steered run's last word."""


@struct.dataclass
class Frozen(Intervention):
    """Edits on every second row, whose frozen sites hold what they hold in the row before it. Made by ``freeze``."""

    edits: Intervention | None
    on: dict[str, Bool[Array | np.ndarray, "R L"]]
    """By kind of site, whether it is frozen in each layer."""
    pairs: int = struct.field(pytree_node=False)
    spoken: bool = struct.field(pytree_node=False, default=False)
    """Whether both rows of a pair say what the steered one says: for generation."""

    @property
    def kinds(self) -> frozenset[str]:
        """The frozen kinds of site, and those of the edits."""
        own = frozenset() if self.edits is None else self.edits.kinds
        return own | frozenset(self.on) | (frozenset({SPOKEN}) if self.spoken else frozenset())

    @property
    def rows(self) -> int:
        """Twice the pairs."""
        return 2 * self.pairs

    @property
    def together(self) -> int:
        """2 where both rows of a pair say the same."""
        return 2 if self.spoken else 1

    @property
    def label(self) -> str:
        """The edits, and what is frozen."""
        return f"{'nothing' if self.edits is None else self.edits.label}, frozen: {', '.join(sorted(self.on))}"

    @property
    def conditional(self) -> bool:
        """Whether prompts decide what the edits do."""
        return self.edits is not None and self.edits.conditional

    def decided(self, params: Params, config: ModelConfig, where: Where) -> Frozen:
        """With edits that the steered rows' prompts have decided."""
        edits = None if self.edits is None else self.edits.decided(params, config, _steered(where))
        return dataclasses.replace(self, edits=edits)

    def of_rows(self, index: Int[Array, " B"]) -> Frozen:
        """The same for rows that continue these prompts, pair by pair."""
        edits = None if self.edits is None else self.edits.of_rows(index[1::2] // 2)
        return dataclasses.replace(self, edits=edits)

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Refuse what does not fit the model or the number of rows, with a ``UserError``."""
        if rows is not None and rows != self.rows:
            raise UserError(f"freezing takes {self.rows} rows, a base and a steered one of each text, got {rows}")
        if self.edits is not None and self.edits.on_cache:
            raise UserError("a cache that was edited cannot be frozen: steer by edits of the stream")
        checked(self.edits, config, self.pairs)
        for kind, on in self.on.items():
            if np.shape(on)[-1] != config.n_layers or np.shape(on)[0] not in (1, self.pairs):
                raise UserError(
                    f"what is frozen at {kind} must be [1 or {self.pairs}, {config.n_layers}], got {list(np.shape(on))}"
                )

    def tap(self, where: Where) -> Tap:
        """The tap of the pairs. Raises ``UserError`` for another number of rows."""
        if where.tokens.shape[0] != self.rows:
            raise UserError(f"freezing takes {self.rows} rows, got {where.tokens.shape[0]}")
        inner = NO_TAP if self.edits is None else self.edits.tap(_steered(where))

        def change(kind: str, layer: Any, value: Array) -> Array:
            base, steered = value[0::2], value[1::2]
            steered = inner(kind, layer, steered)
            if kind in self.on:
                on = jnp.asarray(self.on[kind])[:, layer]
                steered = jnp.where(on.reshape(-1, *[1] * (value.ndim - 1)), base, steered)
            if self.spoken and kind == SPOKEN:
                base = steered
            return jnp.stack([base, steered], axis=1).reshape(value.shape)

        return Tap(self.kinds, change)


def _steered(where: Where) -> Where:
    return jax.tree.map(lambda a: a[1::2], where)


def kinds_of(what: str | Sequence[str], config: ModelConfig) -> tuple[str, ...]:
    """The kinds of site that are meant by names of ``FREEZES`` or of the table. Raises ``UserError`` for others."""
    names = [what] if isinstance(what, str) else list(what)
    refuse_unknown(names, (*FREEZES, *(name for name, kind in KINDS.items() if kind.in_block)), "thing to freeze")
    found = tuple(dict.fromkeys(kind for name in names for kind in FREEZES.get(name, (name,))))
    for kind in found:
        KINDS[kind].shape(config)  # which refuses those that the model does not have
    return found


def freeze(
    model: Model,
    edits: Intervention | None,
    what: str | Sequence[str],
    pairs: int,
    *,
    layers: Sequence[int] | None = None,
    spoken: bool = False,
) -> Frozen:
    """Edits of which ``what`` knows nothing: names of ``FREEZES``, or kinds of site, in all layers or in ``layers``.

    For runs of 2 x ``pairs`` rows, a base and a steered one of each text, in turn. Raises ``UserError`` for things that
    there are not, and for layers beyond the model.
    """
    depth = model.config.n_layers
    chosen = np.arange(depth) if layers is None else np.asarray(layers)
    if chosen.size and (chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= depth):
        raise UserError(f"layers must be numbers from 0 to {depth - 1}, got {layers!r:.80}")
    on = np.isin(np.arange(depth), chosen)[None]
    frozen = Frozen(edits=edits, on={kind: on for kind in kinds_of(what, model.config)}, pairs=pairs, spoken=spoken)
    frozen.check(model.config)
    return frozen


def frozen_logits(
    model: Model,
    rows: Rows,
    edits: Intervention | None,
    what: str | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
    """Float32 logits of the base run, and of the steered one with ``what`` frozen. Errors as ``freeze``."""
    frozen = freeze(model, edits, what, len(rows.tokens), layers=layers)
    both = rows.take(np.arange(len(rows.tokens)).repeat(2))
    found = run_logits(model, both.tokens, both.mask, edits=frozen, prompt_length=both.prompt_length, roles=both.roles)
    return found[0::2], found[1::2]


def generate_frozen(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    edits: Intervention | None,
    what: str | Sequence[str],
    decoding: Decoding = DEFAULTS,
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Generation:
    """Continuations under edits, with ``what`` frozen to the base run on the same tokens.

    Greedy at ``temperature`` 0, by sampling otherwise: text i draws the random numbers that it draws in ``generate``
    with the same seed, so that what differs is what was frozen. Other arguments as there; all prompts are decoded at
    once. For several samples give a prompt several times. Raises ``UserError`` as ``freeze``.
    """
    decoding = dataclasses.replace(decoding, **options)
    rows = encode_prompts(model, prompts, roles=True)
    frozen = freeze(model, edits, what, len(rows), layers=layers, spoken=True)
    found = generate(model, [row for row in rows for _ in range(2)], decoding, edits=frozen)
    return dataclasses.replace(
        found,
        tokens=found.tokens[1::2],
        texts=found.texts[1::2],
        finish=found.finish[1::2],
        prompt_length=found.prompt_length[1::2],
    )
