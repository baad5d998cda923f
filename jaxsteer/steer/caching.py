"""KV-cache steering (2507.08799): keys and values of a prompt changed once, after it has been run.

The prompt without its last token is run as ever. Then vectors are added to the keys and values of the newest of these
tokens, in every layer. What comes behind (the prompt's last token, and all that is decoded) looks back on the changed
cache; the streams of the tokens before stay what they were. Nothing is done to any later token.

Keys are cached after the rotary embedding. So their vectors are kept as they are before it, at position 0, and turned
to the position at which they are added: differences of keys at different positions would mix rotations.

Letters: B rows, C prompts, K key/value heads, H head width, L layers, M layers of an edit, U cached tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.attention import Prefix, rotary_tables, rotate
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sites import parse_site
from jaxsteer.models.taps import NO_TAP, Intervention, Tap, Where
from jaxsteer.steer.edits import known

KEYS, VALUES = "attn.hook_rot_k", "attn.hook_v"
"""The kinds of site of cached keys and values."""


@struct.dataclass
class CacheEdit(Intervention):
    """Vectors added to the newest cached key and value of a prompt. Made by ``Vectors`` of operation "cache"."""

    keys: Float[Array | np.ndarray, "M K H"]
    """As they are at position 0."""
    key_layers: Int[Array | np.ndarray, " M"]
    values: Float[Array | np.ndarray, "N K H"]
    value_layers: Int[Array | np.ndarray, " N"]
    coefficient: Float[Array | np.ndarray, ""]

    @property
    def kinds(self) -> frozenset[str]:
        """None: nothing is changed while a token is run."""
        return frozenset()

    @property
    def label(self) -> str:
        """Its strength and layers."""
        coefficient = known(self.coefficient)
        return f"cache of {'?' if coefficient is None else f'{coefficient:g}'} in {len(self.values)} layers"

    @property
    def on_cache(self) -> bool:
        """Always."""
        return True

    @property
    def neutral(self) -> bool:
        """Whether the coefficient is known to be 0."""
        coefficient = known(self.coefficient)
        return coefficient is not None and not coefficient

    def check(self, config: ModelConfig, rows: int | None = None) -> None:
        """Refuse vectors of other heads, and layers that the model does not have, with a ``UserError``."""
        for name, vectors, given in (
            ("keys", self.keys, self.key_layers),
            ("values", self.values, self.value_layers),
        ):
            layers = known(given)
            if vectors.shape[1:] != (config.n_kv_heads, config.d_head) and len(vectors):
                raise UserError(
                    f"The vectors for cached {name} have the shape {list(vectors.shape[1:])}, but this model's have "
                    f"{[config.n_kv_heads, config.d_head]}: they belong to another model."
                )
            if layers is not None and layers.max(initial=-1) >= config.n_layers:
                raise UserError(
                    f"The vectors for cached {name} name layer {layers.max()}, but this model has layers 0 to "
                    f"{config.n_layers - 1}."
                )

    def tap(self, where: Where) -> Tap:
        """A tap that looks nowhere."""
        return NO_TAP

    def touched(self, where: Where) -> Bool[Array, "B T"]:
        """True at the token whose key and value are changed: the last but one of the prompt."""
        return where.valid & (where.positions == where.prompt_length[:, None] - 2)

    def cached(self, prefix: Prefix, config: ModelConfig) -> Prefix:
        """Keys and values with the vectors added at the newest token of every prompt that has one."""
        newest = prefix.length - 1
        here = (prefix.mask & (prefix.positions == newest[:, None]))[None, :, None, None, :]
        keys = jnp.broadcast_to(jnp.asarray(self.keys)[:, None], (len(self.keys), len(newest), *self.keys.shape[1:]))
        at = turned(keys, config, jnp.asarray(self.key_layers), newest)

        def add(old: Float[Array, "L C K H U"], layers: Array, vectors: Float[Array, "M c K H"]) -> Array:
            moved = jnp.zeros(old.shape[:-1], jnp.float32).at[layers].add(self.coefficient * vectors)
            return jnp.where(here, (old.astype(jnp.float32) + moved[..., None]).astype(old.dtype), old)

        return dataclasses.replace(
            prefix,
            k=add(prefix.k, jnp.asarray(self.key_layers), at),
            v=add(prefix.v, jnp.asarray(self.value_layers), jnp.asarray(self.values)[:, None]),
        )


def cache_edit(arrays: Mapping[str, np.ndarray], coefficient: float) -> CacheEdit:
    """The edit of vectors by site: ``attn.hook_rot_k`` for keys, ``attn.hook_v`` for values."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {KEYS: [], VALUES: []}
    for name, array in arrays.items():
        site = parse_site(name)
        if site.kind not in parts or array.ndim != 2:
            raise UserError(
                f"a cache holds keys and values: its vectors are (heads, H) at {KEYS} and {VALUES}, got {array.shape} "
                f"at {name}"
            )
        parts[site.kind].append((site.layer, array))
    shape = next(iter(arrays.values())).shape
    stacked = [
        (np.stack([a for _, a in part]) if part else np.zeros((0, *shape), np.float32), [layer for layer, _ in part])
        for part in parts.values()
    ]
    (keys, key_layers), (values, value_layers) = stacked
    layers = [np.asarray(numbers, np.int32) for numbers in (key_layers, value_layers)]
    return CacheEdit(keys, layers[0], values, layers[1], np.asarray(coefficient, np.float32))


def turned(
    keys: Float[Array, "M C K H"], config: ModelConfig, layers: Int[Array, " M"], by: Int[Array, " C"]
) -> Float[Array, "M C K H"]:
    """Keys of ``layers`` turned by so many positions, in float32; as they are where the model rotates none."""
    if not config.ropes:
        return keys.astype(jnp.float32)
    sin, cos = rotary_tables(config.ropes, config.d_head, by[:, None])
    table = jnp.asarray(config.rope_index, jnp.int32)[layers]
    return jax.vmap(lambda key, t: rotate(key[:, None], sin[t], cos[t])[:, 0])(keys.astype(jnp.float32), table)
