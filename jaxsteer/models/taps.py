"""Taps and interventions: how a computation is read and changed at its sites.

A tap says statically at which kinds of site it looks, and is a pure function of the values there. An intervention is a
pytree of arrays that makes a tap once it knows which tokens the rows hold; ``jaxsteer.steer`` builds the usual ones.

Letters: B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxsteer.errors import UserError
from jaxsteer.models.attention import Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params
from jaxsteer.models.roles import ASSISTANT, Roles
from jaxsteer.models.sites import KINDS

Layer = Int[Array, ""] | int


@dataclasses.dataclass(frozen=True)
class Tap:
    """A pure function of the values at sites of some kinds. What it does not look at is computed as without it."""

    kinds: frozenset[str]
    """Keys of ``sites.KINDS``."""
    change: Callable[[str, Layer, Array], Array]
    """``(kind, layer, value) -> value``, called at these kinds only; the layer is 0 outside of the blocks."""

    def __call__(self, kind: str, layer: Layer, value: Array) -> Array:
        """The value that the computation goes on with."""
        return self.change(kind, layer, value) if kind in self.kinds else value


NO_TAP = Tap(frozenset(), lambda kind, layer, value: value)


def joined(*taps: Tap) -> Tap:
    """One tap that does what all of them do, one after the other."""

    def change(kind: str, layer: Layer, value: Array) -> Array:
        for tap in taps:
            value = tap(kind, layer, value)
        return value

    return Tap(frozenset().union(*(tap.kinds for tap in taps)), change)


def adding(values: Mapping[str, Array]) -> Tap:
    """A tap that adds a value at each of some kinds of site, in whatever layer it is used."""
    return Tap(frozenset(values), lambda kind, layer, value: value + values[kind])


def of_one_token(tap: Tap) -> Tap:
    """The tap of rows of one token for values that have no axis of tokens."""
    return Tap(tap.kinds, lambda kind, layer, value: tap(kind, layer, value[:, None])[:, 0])


class Visit:
    """A part of the network while it is traced: what happens to the values at its sites."""

    def __init__(self, tap: Tap = NO_TAP, wanted: Collection[str] = (), layer: Layer = 0):
        self.tap, self.layer, self._wanted = tap, layer, wanted
        self.seen: dict[str, Array] = {}
        """Values at the wanted kinds of site, changed by the tap."""

    def __call__(self, kind: str, value: Array, fixed: Bool[Array, ...] | None = None) -> Array:
        """The value that the computation goes on with; ``fixed`` entries are changed by no tap."""
        new = self.tap(kind, self.layer, value)
        value = new if fixed is None else jnp.where(fixed, value, new)
        if kind in self._wanted:
            self.seen[kind] = value
        return value

    def changes(self, *kinds: str) -> bool:
        """Whether the tap looks at any of these kinds of site: then values are computed as they come by there."""
        return not self.tap.kinds.isdisjoint(kinds)

    def looks(self, *kinds: str) -> bool:
        """Whether values at any of these are changed or wanted: what nobody looks at need not be computed."""
        return self.changes(*kinds) or not set(kinds).isdisjoint(self._wanted)


@struct.dataclass
class Where:
    """Which tokens a call computes: the whole text, a prompt, or the one token that is being decoded."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    """Position in the text, padding not counted."""
    valid: Bool[Array, "B T"]
    """False on padding."""
    prompt_length: Int[Array, " B"]
    """Tokens of the prompt, padding not counted. Where roles are not known, the response begins at this position."""
    roles: Roles | None = None
    """Whose the tokens are, where the rows are conversations."""

    def at(self, index: Int[Array, "B K"]) -> Where:
        """The same of the rows' tokens ``index`` only."""
        return jax.tree.map(lambda a: jnp.take_along_axis(a, index, axis=1) if a.ndim == 2 else a, self)


class Intervention:
    """A pytree of arrays that changes values on their way through the model: base of ``flax.struct`` dataclasses.

    A subclass says where it looks (``kinds``) and what it does there (``tap``); the rest has defaults.
    """

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of site whose values it changes. Static: the same for all values of its arrays."""
        raise NotImplementedError

    @property
    def rows(self) -> int | None:
        """Rows of the batch that its arrays are made for; None if they serve any number."""
        return None

    @property
    def together(self) -> int:
        """Rows in a row that draw the same random numbers in generation: 2 for pairs that say the same. Static."""
        return 1

    @property
    def neutral(self) -> bool:
        """Whether it is known to change nothing (coefficient 0): it is then not run at all.

        Within another program XLA fuses, and so rounds, other operations together; only the same program gives the
        same bits.
        """
        return False

    @property
    def label(self) -> str:
        """What it does, in a few words, for messages."""
        return type(self).__name__

    @property
    def conditional(self) -> bool:
        """Whether prompts decide what it does: it makes no tap before it is ``decided``. Static."""
        return False

    @property
    def on_cache(self) -> bool:
        """Whether it changes keys and values of prompts that have been run (``cached``). Static."""
        return False

    def decided(self, params: Params, config: ModelConfig, where: Where) -> Intervention:
        """The same for the rows of ``where`` alone, whose prompts have decided. Traced under jit."""
        return self

    def of_rows(self, index: Int[Array, " B"]) -> Intervention:
        """What was decided for some prompts, for rows of which row b continues prompt ``index[b]``."""
        return self

    def cached(self, prefix: Prefix, config: ModelConfig) -> Prefix:
        """Keys and values of the prompts without their last tokens, changed as what follows shall see them."""
        return prefix

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Raise ``UserError`` if it does not fit a model of this ``config``, or a batch of ``rows`` rows."""

    def tap(self, where: Where) -> Tap:
        """The tap for these tokens. Traced under jit: pure, and the same program for all values of its arrays."""
        raise NotImplementedError

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True at positions that it reaches (in some layer)."""
        raise UserError(f"{type(self).__name__} cannot say which positions it touches: it is not an Edit.")


def make_where(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "b T"],
    mask: Bool[Array, "B T"] | None,
    prompt_length: Int[Array, " B"] | None = None,
    roles: Roles | None = None,
) -> Where:
    """What an intervention is told of these rows.

    Without ``prompt_length`` the prompt ends where the assistant's content in the last turn begins; all of a row is
    prompt where that has none, or where roles are not known.
    """
    valid = jnp.ones(tokens.shape, bool) if mask is None else mask
    positions = jnp.broadcast_to(positions, tokens.shape)
    if prompt_length is None:
        prompt_length = valid.sum(-1)
        if roles is not None:
            response = valid & (roles.role == ASSISTANT) & (roles.turn == roles.turns[:, None] - 1)
            prompt_length = jnp.where(response, positions, prompt_length[:, None]).min(-1)
    return Where(tokens=tokens, positions=positions, valid=valid, prompt_length=prompt_length, roles=roles)


@runtime_checkable
class Steers(Protocol):
    """What knows how it steers: ``steer.Vectors`` with a strength."""

    def edits(self) -> Intervention:
        """The change that it makes."""


def edits_of(steer: Any) -> Intervention:
    """The edits of vectors with a strength; edits are their own. Raises ``UserError`` for anything else."""
    if isinstance(steer, Intervention):
        return steer
    if isinstance(steer, Steers):
        return steer.edits()
    at = ", and a direction needs a place and a strength: direction.at(15, -0.3)" if hasattr(steer, "at") else ""
    raise UserError(f"one steers by vectors (steer.Vectors) or edits (steer.add), got {type(steer).__name__}{at}")


def checked(edits: Any, config: ModelConfig, rows: int | None) -> Intervention | None:
    """The edits to run, None if they are known to change nothing.

    Raises ``UserError``, before anything compiles, if they do not fit the model or a batch of ``rows`` rows.
    """
    if edits is None:
        return None
    if not isinstance(edits, Intervention):
        raise UserError(
            f"edits must be an Intervention (see jaxsteer.steer), got {type(edits).__name__}. Several edits go into "
            f"jaxsteer.steer.Edits((first, second))."
        )
    edits.check(config, rows)
    for kind in edits.kinds:
        if kind not in KINDS:
            raise UserError(f"{type(edits).__name__} looks at {kind!r}, which is none of {', '.join(KINDS)}.")
        KINDS[kind].shape(config)  # which refuses those that the model does not have
    return None if edits.neutral else edits


def tap_of(edits: Intervention | None, where: Where) -> Tap:
    """The tap of an intervention, or one that looks nowhere."""
    return NO_TAP if edits is None else edits.tap(where)
