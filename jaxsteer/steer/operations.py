"""The constructors of edits: ``add``, ``ablate``, ``floor``, ``ceiling``, ``clamp``, ``scale`` and ``replace``.

All of them compute in float32 and cast back to the dtype of the stream; what they do not touch keeps its bits.

*Sites.* A name as in ``jaxsteer.models.sites`` ("blocks.14.hook_resid_post"), "blocks.*.hook_attn_out" for every
block, or a list of names of one kind of site, with the vector (and the number) of each: one edit in several layers.

*Vectors.* [D] in the residual stream, at hook_attn_out, hook_mlp_out and mlp.hook_in; [I] inside the MLP; at
attn.hook_q, k, v and z [heads, H], or [H] with ``head``. A list of M sites may have one vector for all or M of them, on
a leading axis; likewise the numbers.

*Positions.* See ``select``: "all" by default, which leaves position 0 (BOS) alone.

Constructors may be called inside jit and grad. They check values only outside.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.errors import UserError
from jaxsteer.models.sites import KINDS, Site, every_layer, parse_site
from jaxsteer.steer.edits import EVERY, Edit, Edits
from jaxsteer.steer.selectors import Positions, select

log = logging.getLogger(__name__)

Numbers = ArrayLike | Sequence[Any]
"""One number, an array, or lists of numbers."""
LONGEST = 1e18
"""Length of what is added: squares of greater ones overflow float32 in the next norm."""
Sites = str | Site | Sequence[str | Site]


def add(
    site: Sites,
    vector: Numbers,
    coefficient: Numbers = 1.0,
    *,
    positions: Positions = "all",
    mean_norm: Numbers | None = None,
    keep_norm: bool = False,
    head: int | None = None,
) -> Edit:
    """Add along a vector: h + coefficient * vector.

    The vector is added as it is given, unless ``mean_norm`` is: then the coefficient is in units of the mean norm of
    the stream at the site (``mean_norms`` measures it, direction files store it), h + coefficient * mean_norm *
    vector / |vector|. With ``keep_norm`` the result is scaled back to the norm of h. Coefficient 0 changes no bit of
    the logits. Source: 2312.06681 (CAA).

    Raises ``UserError`` for an unknown site, a vector that is zero, not finite or of a shape that is not the site's,
    and a coefficient that is not finite.
    """
    kind, layers, many = _sites(site)
    vectors = _vectors(kind, vector, layers, many, head)
    if mean_norm is not None:
        norms = _numbers(mean_norm, len(layers), "mean_norm")
        if isinstance(norms, np.ndarray) and not (norms > 0).all():
            raise UserError(f"mean_norm must be greater than 0, got {mean_norm}.")
        vectors = _unit(vectors) * norms[..., None, None]
    operation = "add_keep_norm" if keep_norm else "add"
    amount = _numbers(coefficient, len(layers), "coefficient")
    if isinstance(amount, np.ndarray) and isinstance(vectors, np.ndarray):
        longest = float((np.abs(amount) * np.linalg.norm(vectors.astype(np.float64), axis=(-2, -1))).max())
        if longest > LONGEST:
            log.warning(
                "coefficient times vector has a length of %.2g: its square overflows float32 in the model's norms, and "
                "logits may be NaN. Choose a smaller coefficient.", longest,
            )  # fmt: skip
    return _edit(operation, kind, layers, vectors, amount, head, positions)


def ablate(
    site: Sites,
    vector: Numbers,
    coefficient: Numbers = 1.0,
    *,
    positions: Positions = "all",
    head: int | None = None,
) -> Edit:
    """Project out what lies along a vector: h - coefficient * (h . u) u, with u = vector / |vector|.

    A subspace of k vectors, [k, D] (or [M, k, D] for a list of M sites), is orthonormalised first and projected out
    as a whole. A coefficient between 0 and 1 takes out that share. Source: 2406.11717.

    Raises ``UserError`` as ``add``, and for linearly dependent vectors.
    """
    kind, layers, many = _sites(site)
    vectors = _vectors(kind, vector, layers, many, head, subspace=True)
    amount = _numbers(coefficient, len(layers), "coefficient")
    return _edit("ablate", kind, layers, _unit(vectors), amount, head, positions)


def ablate_everywhere(vector: ArrayLike, *, positions: Positions = slice(0, None)) -> Edits:
    """The vector (or the subspace [k, D]) taken out of every block's input, attention output and MLP output.

    At all positions, the first included, by default. The program does not grow with the depth of the model. In models
    without norms behind attention and MLP (all but Gemma) it equals orthogonalising every matrix that writes into the
    stream. Source: 2406.11717.
    """
    kinds = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
    return Edits(tuple(ablate(f"blocks.*.{kind}", vector, positions=positions) for kind in kinds))


def floor(
    site: Sites, vector: Numbers, value: Numbers, *, positions: Positions = "all", head: int | None = None
) -> Edit:
    """Cap from below: h - min(h . u - value, 0) u, u = vector / |vector|, so that h . u never falls below ``value``.

    Capping along the assistant axis (2601.10387), whose vector points towards the Assistant, is a floor. Released
    capping vectors point away from it, and need ``ceiling``: floor(v, t) = ceiling(-v, -t). ``value`` is in units of
    the stream. The default leaves position 0 alone; that paper caps all: ``positions=slice(0, None)``.
    """
    return _along("floor", site, vector, value, positions, head)


def ceiling(
    site: Sites, vector: Numbers, value: Numbers, *, positions: Positions = "all", head: int | None = None
) -> Edit:
    """Cap from above: h - max(h . u - value, 0) u: the projection never rises above ``value``. See ``floor``."""
    return _along("ceiling", site, vector, value, positions, head)


def clamp(
    site: Sites, vector: Numbers, value: Numbers, *, positions: Positions = "all", head: int | None = None
) -> Edit:
    """Set the projection: h + (value - h . u) u, u = vector / |vector|, so that h . u equals ``value``.

    With the mean projection over ordinary text this is mean ablation along the vector.
    """
    return _along("clamp", site, vector, value, positions, head)


def scale(site: Sites, factor: Numbers, *, positions: Positions = "all", head: int | None = None) -> Edit:
    """Scale the whole value: factor * h (2410.04962, whose alpha is factor - 1). 1 changes nothing, 0 is zero ablation.

    In ``attn.hook_pattern`` the positions select queries; the weights are not normalised again.
    """
    kind, layers, _ = _sites(site)
    return _edit("scale", kind, layers, None, _numbers(factor, len(layers), "factor"), head, positions)


def scale_prompt(site: Sites, alphas: Numbers, coefficient: Numbers = 1.0) -> Edit:
    """Scale the prompt's last P tokens, each by its own number: h + coefficient * alpha_j * h (2410.04962).

    ``alphas`` are [P] or, for a list of M sites, [M, P]; alpha_0 is that of the prompt's last token, alpha_1 that of
    the one before it. Tokens further back and those of the response are left alone. Coefficient 0 changes no bit.
    """
    kind, layers, many = _sites(site)
    array = _array(alphas, "alphas")
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] not in (1, len(layers)) or not array.shape[1] or (len(array) > 1 and not many):
        raise UserError(
            f"alphas are [P] or, for {len(layers)} sites, [{len(layers)}, P]; got {list(np.shape(alphas))}."
        )
    vectors = (jnp if isinstance(array, jax.Array) else np).broadcast_to(array, (len(layers), array.shape[1]))
    amount = _numbers(coefficient, len(layers), "coefficient")
    return _edit("scale_prompt", kind, layers, vectors[None, :, :, None], amount, None, slice(0, None))


def replace(
    site: str | Site,
    value: Numbers,
    *,
    mask: Numbers | None = None,
    positions: Positions = slice(0, None),
    head: int | None = None,
) -> Edit:
    """Values of another run in place of h: activation patching.

    ``value`` is [T, D] for all rows or [B, T, D] for each (heads: [T, heads, H], or [T, H] with ``head``), as
    ``capture`` returns it. Values go by position: that at index t replaces h at position t, padding not counted; where
    there is no value h stays. If the other run was padded give its ``mask`` ([T] or [B, T], False on padding).
    Patterns, [N, T, T] or [B, N, T, T], go by position of the query, and need as many keys as there are here. By
    default all positions are replaced, the first included.
    """
    kind, layers, many = _sites(site)
    if many or layers[0] == EVERY:
        raise UserError("replace takes the site of one layer. Put one replace per layer into Edits.")
    array = _array(value, "value")
    if KINDS[kind].over_keys and head is None:
        array = jnp.moveaxis(array, -3, -2) if isinstance(array, jax.Array) else np.moveaxis(array, -3, -2)
    size = _dims(kind, head)
    if array.ndim not in (size + 1, size + 2):
        raise UserError(
            f"replace at {kind} takes values of {size + 1} or {size + 2} axes (rows, positions, {size} of the value), "
            f"got shape {list(np.shape(value))}."
        )
    array = array.reshape(*(1, *array.shape)[-size - 2 :][:2], -1)
    lengths: Any = np.full(array.shape[:1], array.shape[1])
    if mask is not None:
        keep = np.asarray(mask, bool)
        keep = keep[None] if keep.ndim == 1 else keep
        if keep.shape != array.shape[:2]:
            raise UserError(
                f"mask has shape {list(keep.shape)}, but the values are for {list(array.shape[:2])} tokens."
            )
        index = np.minimum(keep.argmax(-1)[:, None] + np.arange(keep.shape[1]), keep.shape[1] - 1)
        array, lengths = array[np.arange(len(keep))[:, None], index], keep.sum(-1)
    return _edit("replace", kind, layers, array[:, None], lengths[:, None].astype(np.float32), head, positions)


def _along(
    operation: str, site: Sites, vector: Numbers, value: Numbers, positions: Positions, head: int | None
) -> Edit:
    kind, layers, many = _sites(site)
    vectors = _unit(_vectors(kind, vector, layers, many, head))
    return _edit(operation, kind, layers, vectors, _numbers(value, len(layers), "value"), head, positions)


def _edit(
    operation: str, kind: str, layers: list[int], vector: Any, amount: Any, head: int | None, positions: Positions
) -> Edit:
    if head is not None and not KINDS[kind].heads:
        some = ", ".join(name for name, kind in KINDS.items() if kind.heads)
        raise UserError(f"head={head}: there are no heads at {kind}, only at {some}.")
    if head is not None and head < 0:
        raise UserError(f"head must count from 0, got {head}.")
    return Edit(
        operation=operation,
        kind=kind,
        layers=np.asarray([layers], np.int32),
        amount=amount,
        vector=vector,
        head=np.full((1, len(layers)), -1 if head is None else head, np.int32),
        selector=select(positions),
    )


def _sites(given: Sites) -> tuple[str, list[int], bool]:
    """(kind, layers, whether a list was given)."""
    if isinstance(given, str) and (kind := every_layer(given)) is not None:
        return kind, [EVERY], False
    if isinstance(given, str):
        given = parse_site(given)  # checked against the model's depth when the edit is used
    if isinstance(given, Site):
        return given.kind, [given.layer], False
    if not isinstance(given, Sequence) or not given:
        raise UserError(f"a site is a name such as 'blocks.2.hook_resid_post', or a list of names; got {given!r:.80}.")
    parsed = [_sites(each) for each in given]
    kinds, layers = sorted({kind for kind, _, _ in parsed}), [layer for _, (layer, *_), _ in parsed]
    if len(kinds) != 1 or len(set(layers)) < len(layers) or (EVERY in layers and len(layers) > 1):
        raise UserError(
            f"An edit acts at one kind of site, once per layer; got {list(given)}. Make one edit for each kind, and "
            f"put them into Edits in the order in which they apply."
        )
    return kinds[0], layers, True


def _dims(kind: str, head: int | None) -> int:
    """Axes of one token's value."""
    return 2 if KINDS[kind].heads and head is None else 1


def _array(given: Numbers, name: str) -> Any:
    """float32; NumPy and finite, except for tracers and arrays that live on other hosts."""
    if isinstance(given, jax.Array) and (isinstance(given, jax.core.Tracer) or not given.is_fully_addressable):
        return given.astype(jnp.float32)
    try:
        whole = np.asarray(given)
    except ValueError:
        raise UserError(f"{name} must be numbers of one shape, got {given!r:.80}.") from None
    if whole.dtype.kind not in "iufV" and whole.dtype.name != "bfloat16":
        raise UserError(f"{name} must be real numbers, got {given!r:.80}.")
    with np.errstate(over="ignore"):  # what is infinite is refused below
        array = whole.astype(np.float32)
    if (beyond := ~np.isfinite(array)).any():
        why = "too large for float32" if np.isfinite(whole.astype(np.float64)[beyond]).all() else "NaN or infinite"
        raise UserError(f"{name} has {int(beyond.sum())} entries that are {why}.")
    return array


def _numbers(given: Numbers, layers: int, name: str) -> Any:
    """[1, M], from one number or M of them."""
    array = _array(given, name)
    if array.shape not in ((), (layers,)):
        raise UserError(
            f"{name} must be one number, or one for each of {layers} sites, got shape {list(array.shape)}. For a "
            f"number per row of the batch make one edit per row, and stack_rows them."
        )
    return (jnp if isinstance(array, jax.Array) else np).broadcast_to(array, (1, layers))


def _vectors(
    kind: str, given: Numbers, layers: list[int], many: bool, head: int | None, *, subspace: bool = False
) -> Any:
    """[1, M, k, F] from one vector, one for each of M sites, or a subspace of k."""
    if KINDS[kind].over_keys:
        raise UserError(f"{kind} holds numbers for keys, not vectors: only scale and replace are possible there.")
    array, size = _array(given, "vector"), _dims(kind, head)
    extra = array.ndim - size
    if many and extra > 0 and array.shape[0] != len(layers):
        raise UserError(
            f"{len(layers)} sites are given, but vectors of shape {list(array.shape)}: the first axis differs."
        )
    if extra == 0:
        array = array[None, None]
    elif extra == 1:
        array = array[:, None] if many else array[None]
    if extra not in (0, 1, 2) or (not subspace and array.shape[1] != 1) or (extra == 2 and not (many and subspace)):
        expected = "[heads, H]" if size == 2 else "[H]" if head is not None else "[width]"
        raise UserError(
            f"At {kind} a vector has the shape {expected}"
            + (f", or with a leading axis of {len(layers)} sites" if many else "")
            + (", or of k vectors before it" if subspace else "")
            + f"; got {list(np.shape(given))}."
        )
    array = array.reshape(*array.shape[:2], -1)
    if isinstance(array, np.ndarray) and not array.any(-1).all():
        raise UserError(f"The vector for {kind} is zero: it has no direction, and the edit would do nothing.")
    return (jnp if isinstance(array, jax.Array) else np).broadcast_to(array, (1, len(layers), *array.shape[1:]))


def _unit(vectors: Any) -> Any:
    """Orthonormal rows spanning the same space."""
    if vectors.shape[-2] == 1:
        if isinstance(vectors, jax.Array):
            return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        wide = vectors.astype(np.float64)
        return (wide / np.linalg.norm(wide, axis=-1, keepdims=True)).astype(np.float32)
    if isinstance(vectors, jax.Array):
        return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(vectors, -1, -2))[0], -1, -2)
    wide = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    q, r = np.linalg.qr(np.swapaxes(wide, -1, -2))
    if vectors.shape[-2] > vectors.shape[-1] or (np.abs(np.diagonal(r, axis1=-2, axis2=-1)) < 1e-6).any():
        raise UserError(
            f"The {vectors.shape[-2]} vectors of the subspace are linearly dependent: leave out those that are."
        )
    return np.swapaxes(q, -1, -2).astype(np.float32)
