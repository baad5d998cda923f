"""Taps and interventions: how a computation is read and changed at its named places.

A tap is a pure function ``tap(place, layer, value) -> value`` that the transformer calls at every place of
``jaxsteer.models.sites``. An intervention is a pytree of arrays that makes a tap once it knows which tokens the rows
hold; ``jaxsteer.steer`` builds the usual ones, and any pytree with a method ``tap`` will do.

Letters: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig

Tap = Callable[[str, Int[Array, ""] | int, Array], Array]
"""``(place, layer, value) -> value``; places as in ``sites.BLOCK_PLACES``, and "hook_embed" (with layer 0)."""


def no_tap(name: str, layer: Int[Array, ""] | int, value: Array) -> Array:
    """The identity tap: compiles to nothing."""
    return value


@struct.dataclass
class Where:
    """Which tokens a call computes: the whole text, a prompt, or the one token that is being decoded."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    """Position in the text, padding not counted."""
    valid: Bool[Array, "B T"]
    """False on padding."""
    prompt_length: Int[Array, " B"]
    """Tokens of the prompt, padding not counted; what stands at this position or later is the response."""


@runtime_checkable
class Intervention(Protocol):
    """A pytree of arrays that changes values on their way through the model."""

    def tap(self, where: Where) -> Tap:
        """The tap for these tokens. Traced under jit: pure, and the same program for all values of its arrays."""
        ...


def make_where(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "b T"],
    mask: Bool[Array, "B T"] | None,
    prompt_length: Int[Array, " B"] | None = None,
) -> Where:
    """What an intervention is told of these rows. Without ``prompt_length`` all of a row is prompt."""
    valid = jnp.ones(tokens.shape, bool) if mask is None else mask
    return Where(
        tokens=tokens,
        positions=jnp.broadcast_to(positions, tokens.shape),
        valid=valid,
        prompt_length=valid.sum(-1) if prompt_length is None else prompt_length,
    )


def checked(edits: Any, config: ModelConfig, rows: int | None) -> Intervention | None:
    """The edits to run, refused before anything compiles if they do not fit the model or a batch of ``rows`` rows.

    An intervention may have a method ``check(config, rows)`` that raises ``UserError``, and an attribute ``neutral``
    that is true where it is known to change nothing (coefficient 0): it is then not run at all. Within another program
    XLA fuses, and so rounds, other operations together; only the same program gives the same bits.
    """
    if edits is None:
        return None
    if isinstance(edits, type) or not isinstance(edits, Intervention):
        raise UserError(
            f"edits must have a method tap(where) (see jaxsteer.steer), got {type(edits).__name__}. Several edits go "
            f"into jaxsteer.steer.Edits((first, second))."
        )
    if hasattr(edits, "check"):
        edits.check(config, rows)
    return None if getattr(edits, "neutral", False) else edits


def tap_of(edits: Intervention | None, where: Where) -> Tap:
    """The tap of an intervention, or the identity."""
    return no_tap if edits is None else edits.tap(where)
