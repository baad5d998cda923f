"""``Edit`` and ``Edits``: pytrees of arrays that change values on their way through the model.

What an operation is, at which kind of site it acts and how many layers and vectors it holds are structure; everything
else is data, so that another vector, coefficient, layer or position never recompiles, and rows of one batch may differ
in all of them. Constructors are in ``jaxsteer.steer.operations``.

Letters: B rows of the batch, R rows of an array (B, or 1 where it serves all rows), M layers of one edit, k vectors
of a subspace, T time, F entries of a token's value (D; heads x H; I), N heads, H head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.attention import Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params
from jaxsteer.models.sites import KINDS
from jaxsteer.models.taps import Intervention, Tap, Where, checked, joined
from jaxsteer.steer.selectors import Selector

EVERY, OFF = -1, -2
"""In place of a layer: at every layer, and at none."""


@struct.dataclass
class Edit(Intervention):
    """One operation at one kind of site, in up to M layers. Made by ``add``, ``ablate`` and the other constructors.

    Every array has a leading row axis R: 1 where it serves all rows, else the rows of the batch (``stack_rows``).
    """

    operation: str = struct.field(pytree_node=False)
    """A key of ``OPERATIONS``, where the formulas are."""
    kind: str = struct.field(pytree_node=False)
    """A key of ``sites.KINDS``."""
    layers: Int[Array | np.ndarray, "R M"]
    """The layers that the M settings are for; ``EVERY``, or ``OFF`` (this setting does nothing)."""
    amount: Float[Array | np.ndarray, "R M"]
    """Coefficient (add, ablate, scale_prompt), projection (floor, ceiling, clamp), factor (scale), number of positions
    (replace)."""
    vector: Float[Array | np.ndarray, "R M k F"] | None
    """As it is used: of norm 1 except in add; orthonormal rows where k > 1; [R, M, T, F] in replace; [R, M, P, 1] in
    scale_prompt, from the prompt's last token backwards."""
    head: Int[Array | np.ndarray, "R M"]
    """The one head that is edited, where there are heads; -1 for all of them."""
    selector: Selector

    @property
    def kinds(self) -> frozenset[str]:
        """The one kind of site."""
        return frozenset({self.kind})

    @property
    def rows(self) -> int | None:
        """Rows of the batch that the arrays are made for; None if they serve any number."""
        return common_rows(leaf.shape[0] for leaf in jax.tree.leaves(self))

    @property
    def neutral(self) -> bool:
        """Whether this is known to change nothing: coefficient 0, factor 1, or no layer. Not known inside jit."""
        layers, amount = known(self.layers), known(self.amount)
        if layers is None or amount is None:
            return False
        idle = {"add": 0.0, "add_keep_norm": 0.0, "ablate": 0.0, "scale": 1.0, "scale_prompt": 0.0}.get(self.operation)
        return bool(np.all((layers == OFF) | (amount == idle)))

    @property
    def label(self) -> str:
        """Operation, strengths, kind of site and layers."""
        strengths, layers = (_few(known(array)) for array in (self.amount, self.layers))
        return f"{self.operation} of {strengths} at {self.kind}, layers {layers}"

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True at positions that the edit reaches (in some layer), whatever its amount."""
        on = (self.layers != OFF).any(-1)
        touched = self.selector.touched(where) & on[:, None]
        if self.operation == "replace":
            touched = touched & (where.positions < self.amount.max(-1)[:, None])
        if self.operation == "scale_prompt" and self.vector is not None:
            touched = touched & (_from_end(where) >= 0) & (_from_end(where) < self.vector.shape[2])
        return touched

    def tap(self, where: Where) -> Tap:
        """The tap for these tokens. Raises ``UserError`` if the arrays are made for another number of rows."""
        b = where.tokens.shape[0]
        if self.rows not in (None, b):
            raise UserError(f"This edit is made for {self.rows} rows, but the batch has {b}.")
        edit: Edit = jax.tree.map(jnp.asarray, self)
        selected = edit.selector.touched(where)

        return Tap(self.kinds, lambda kind, layer, value: _apply(edit, where, selected, layer, value))

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Refuse what does not fit a model of this ``config``, or a batch of ``rows`` rows, with a ``UserError``."""
        size = KINDS[self.kind].token_shape(config)
        if rows is not None and self.rows not in (None, rows):
            raise UserError(f"The edit at {self.kind} is made for {self.rows} rows, but the batch has {rows}.")
        flat = self.vector is not None and self.operation != "scale_prompt"
        if (
            flat
            and self.vector is not None
            and size[-1] >= 0
            and self.vector.shape[-1] not in (math.prod(size), size[-1])
        ):
            raise UserError(
                f"The vector for {self.kind} has {self.vector.shape[-1]} components, but values there have the shape "
                f"{list(size)} in this model: it belongs to another model or another site."
            )
        layers, heads = known(self.layers), known(self.head)
        highest, head = (-1 if known is None else int(known.max()) for known in (layers, heads))
        if highest >= config.n_layers:
            raise UserError(
                f"The edit at {self.kind} names layer {highest}, but this model has layers 0 to {config.n_layers - 1}."
            )
        if head >= 0 and (len(size) == 1 or head >= size[0]):
            raise UserError(
                f"The edit at {self.kind} names head {head}, but there "
                + (f"are heads 0 to {size[0] - 1}." if len(size) > 1 else "are no heads at that site.")
            )


@struct.dataclass
class Edits(Intervention):
    """Several interventions, applied in the order of the tuple wherever they meet."""

    edits: tuple[Intervention, ...]

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of site of all edits."""
        return frozenset().union(*(edit.kinds for edit in self.edits))

    @property
    def rows(self) -> int | None:
        """Rows of the batch that the arrays are made for; None if they serve any number."""
        return common_rows(edit.rows or 1 for edit in self.edits)

    @property
    def neutral(self) -> bool:
        """Whether none of the edits changes anything."""
        return all(edit.neutral for edit in self.edits)

    @property
    def label(self) -> str:
        """Those of the edits."""
        return "; ".join(edit.label for edit in self.edits)

    @property
    def conditional(self) -> bool:
        """Whether prompts decide what any of the edits does."""
        return any(edit.conditional for edit in self.edits)

    @property
    def on_cache(self) -> bool:
        """Whether any of the edits changes keys and values of prompts that have been run."""
        return any(edit.on_cache for edit in self.edits)

    def decided(self, params: Params, config: ModelConfig, where: Where) -> Edits:
        """Each edit decided."""
        return Edits(tuple(edit.decided(params, config, where) for edit in self.edits))

    def of_rows(self, index: Int[Array, " B"]) -> Edits:
        """Each edit for the rows that continue prompts ``index``."""
        return Edits(tuple(edit.of_rows(index) for edit in self.edits))

    def cached(self, prefix: Prefix, config: ModelConfig) -> Prefix:
        """What all edits make of the prompts' keys and values, one after the other."""
        for edit in self.edits:
            prefix = edit.cached(prefix, config)
        return prefix

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True at positions that any of the edits reaches."""
        touched = jnp.zeros(where.tokens.shape, bool)
        for edit in self.edits:
            touched = touched | edit.touched(where)
        return touched

    def tap(self, where: Where) -> Tap:
        """The taps of all edits, one after the other."""
        _ = self.rows  # which refuses those that differ
        return joined(*(edit.tap(where) for edit in self.edits))

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Refuse what does not fit a model of this ``config``, or a batch of ``rows`` rows, with a ``UserError``."""
        if not isinstance(self.edits, tuple | list):
            raise UserError(f"Edits takes a tuple of edits, got {type(self.edits).__name__}: write Edits((edit,)).")
        _refuse_crossed(tuple(self.edits))
        for edit in self.edits:
            checked(edit, config, rows)
        if rows is not None and self.rows not in (None, rows):
            raise UserError(f"The edits are made for {self.rows} rows, but the batch has {rows}.")


def known(array: Any) -> np.ndarray | None:
    """The entries, or None where they are not known: inside jit, or on other hosts."""
    if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def _few(numbers: np.ndarray | None) -> str:
    """Some of the numbers that occur, EVERY as "*"."""
    found = [] if numbers is None else np.unique(numbers).tolist()
    shown = ", ".join(
        "*" if n == EVERY and numbers is not None and numbers.dtype.kind == "i" else f"{n:g}" for n in found[:4]
    )
    return (shown or "?") + ", …" * (len(found) > 4)


def _refuse_crossed(edits: tuple[Any, ...]) -> None:
    """A floor above the ceiling on the same vector, in the same layers."""
    caps = [edit for edit in edits if isinstance(edit, Edit) and edit.operation in ("floor", "ceiling")]
    for low, high in itertools.product(caps, caps):
        if (low.operation, high.operation, low.kind) != ("floor", "ceiling", high.kind):
            continue
        found: list[list[Any]] = [[known(a) for a in (edit.layers, edit.vector, edit.amount)] for edit in (low, high)]
        if any(a is None for arrays in found for a in arrays):
            continue
        same = all(a.shape == b.shape and np.allclose(a, b) for a, b in zip(found[0][:2], found[1][:2]))
        if same and (found[0][2] > found[1][2]).any():
            raise UserError(
                f"At {low.kind} the floor {found[0][2].max():g} lies above the ceiling {found[1][2].min():g} on the "
                f"same vector: exchange the two values."
            )


def common_rows(sizes: Iterable[int]) -> int | None:
    """The one number of rows among these sizes, None where all are 1. Raises ``UserError`` for several."""
    found = {size for size in sizes if size != 1}
    if len(found) > 1:
        raise UserError(f"The edits are made for different numbers of rows: {', '.join(map(str, sorted(found)))}.")
    return found.pop() if found else None


# Formulas. h is [B, T, F] in float32, v [R, k, F], a (the amount) [R, 1, 1].


def _project(h: Array, v: Array) -> Array:
    if v.shape[1] == 1:
        return (h * v).sum(-1, keepdims=True)
    # Highest: on TPU and recent GPUs a float32 product would else be taken in bfloat16 or TF32.
    return jnp.matmul(h, jnp.swapaxes(v, -1, -2), precision=lax.Precision.HIGHEST)


def _back(coordinates: Array, v: Array) -> Array:
    return coordinates * v if v.shape[1] == 1 else jnp.matmul(coordinates, v, precision=lax.Precision.HIGHEST)


def _norm(h: Array) -> Array:
    return jnp.sqrt(jnp.maximum((h * h).sum(-1, keepdims=True), 1e-30))  # never 0, whose gradient is infinite


def _add_keep_norm(h: Array, v: Array, a: Array) -> Array:
    moved = h + a * v
    moved = moved * (_norm(h) / _norm(moved))
    # The quotient of two equal norms need not be 1 to the last bit. Where nothing is added: the value of h, and the
    # gradient of the formula.
    return jnp.where(a == 0, lax.stop_gradient(h) + (moved - lax.stop_gradient(moved)), moved)


OPERATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "add": lambda h, v, a: h + a * v,
    "add_keep_norm": _add_keep_norm,
    "ablate": lambda h, v, a: h - _back(a * _project(h, v), v),
    "floor": lambda h, v, a: h - _back(jnp.minimum(_project(h, v) - a, 0), v),
    "ceiling": lambda h, v, a: h - _back(jnp.maximum(_project(h, v) - a, 0), v),
    "clamp": lambda h, v, a: h + _back(a - _project(h, v), v),
    "scale": lambda h, v, a: h * a,
    "scale_prompt": lambda h, v, a: h * (1 + a * v),
    "replace": lambda h, v, a: v,
}
"""What becomes of h, by the name of the operation."""


def _from_end(where: Where) -> Int[Array, "B T"]:
    """How many tokens of the prompt stand behind each token; negative in the response."""
    return where.prompt_length[:, None] - 1 - where.positions


def _at(values: Float[Array, "R P F"], index: Int[Array, "B T"]) -> Float[Array, "B T F"]:
    return values[jnp.arange(values.shape[0])[:, None] if values.shape[0] > 1 else 0, index]


def _apply(edit: Edit, where: Where, selected: Bool[Array, "B T"], layer: Any, value: Array) -> Array:
    hit = (edit.layers == layer) | (edit.layers == EVERY)
    on, index = hit.any(-1), hit.argmax(-1)

    def pick(a: Any) -> Any:
        """The setting of this layer: [R, M, ...] -> [R, ...]."""
        if a.shape[1] == 1:
            return a[:, 0]
        return a[jnp.arange(a.shape[0]) if a.shape[0] > 1 else 0, index]

    kind = KINDS[edit.kind]
    h = jnp.moveaxis(value, 1, 2) if kind.over_keys else value  # queries where tokens are elsewhere
    shape = h.shape
    h = h.reshape(*shape[:2], -1)
    mask = (selected & on[:, None])[:, :, None]
    amount, head = pick(edit.amount)[:, None, None], pick(edit.head)
    vector: Any = None if edit.vector is None else pick(edit.vector)
    if kind.heads:
        own = (head[:, None] < 0) | (head[:, None] == jnp.arange(shape[2]))
        mask = mask & jnp.repeat(own, h.shape[-1] // shape[2], axis=-1)[:, None]
        if vector is not None and vector.shape[-1] == shape[-1] != h.shape[-1]:  # the vector of one head
            spread = jnp.where(own[:, None, :, None], vector[:, :, None], 0)
            vector = spread.reshape(*spread.shape[:2], -1)
    if edit.operation == "scale_prompt":
        back = _from_end(where)
        mask = mask & ((back >= 0) & (back < vector.shape[1]))[:, :, None]
        vector = _at(vector, jnp.clip(back, 0, vector.shape[1] - 1))
    elif vector is not None and vector.shape[-1] != h.shape[-1]:
        raise UserError(
            f"The edit at {edit.kind} has width {vector.shape[-1]}, but values there are {list(shape[2:])}."
        )
    if edit.operation == "replace":
        mask = mask & (where.positions[:, :, None] < amount)
        vector = _at(vector, jnp.minimum(where.positions, vector.shape[1] - 1))
    new = OPERATIONS[edit.operation](h.astype(jnp.float32), vector, amount)
    h = jnp.where(mask, new.astype(value.dtype), h).reshape(shape)
    return jnp.moveaxis(h, 2, 1) if kind.over_keys else h
