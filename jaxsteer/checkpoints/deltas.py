"""``Delta``: a change of a model's weights as low-rank factors in a file, and the model that it makes.

A safetensors file: for every block that it changes ``blocks.I.down.left`` [I, r] and ``blocks.I.down.right`` [r, D],
float32, whose product is added to W_down as it is applied (``key @ W_down``). Metadata: format, the model's name and
fingerprint without the change, and how it was made. The model with a delta has a fingerprint of its own, so that what
was made on the other (vectors, SAEs, axes) says so.

Letters: I MLP width, D width, r rank, L layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.files import read_tensors, tensor_bytes, write_bytes
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import stack_shardings

FORMAT = "jaxsteer.delta/1"
_NAME = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.down\.(left|right)")
_OWN = ("format", "model", "fingerprint")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """A change of W_down in some blocks."""

    factors: Mapping[int, tuple[Float[np.ndarray, "I r"], Float[np.ndarray, "r D"]]]
    """By block, what is multiplied and added, float32."""
    model: str
    """Name of the model that it changes."""
    fingerprint: str
    """Of that model's weights, without it."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How it was made."""

    @property
    def digest(self) -> str:
        """sha256 of what it changes, and in which model."""
        return hashlib.sha256(tensor_bytes(self._tensors(), {"fingerprint": self.fingerprint})).hexdigest()

    @property
    def new_fingerprint(self) -> str:
        """Of the model with it."""
        return hashlib.sha256(f"{self.fingerprint}\ndelta {self.digest}".encode()).hexdigest()

    def norms(self) -> dict[int, float]:
        """Frobenius norm of the change by block."""
        found = {}
        for layer, (left, right) in self.factors.items():
            wide = np.asarray(left, np.float64), np.asarray(right, np.float64)
            found[layer] = float(np.sqrt(np.sum((wide[0].T @ wide[0]) * (wide[1] @ wide[1].T))))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Raises ``FileError``."""
        facts = {**self.metadata, "format": FORMAT, "model": self.model, "fingerprint": self.fingerprint}
        write_bytes(path, tensor_bytes(self._tensors(), facts))

    def _tensors(self) -> dict[str, np.ndarray]:
        names = {f"blocks.{layer}.down.": pair for layer, pair in sorted(self.factors.items())}
        return {
            prefix + side: np.ascontiguousarray(part, np.float32)
            for prefix, pair in names.items()
            for side, part in zip(("left", "right"), pair, strict=True)
        }

    def check(self, name: str, config: ModelConfig, fingerprint: str) -> None:
        """Raise ``UserError`` unless it is one of these weights."""
        if self.fingerprint != fingerprint:
            raise UserError(
                f"the delta is of {self.model or 'an unknown model'} (weights {self.fingerprint[:12]}), not of {name} "
                f"({fingerprint[:12]}): load it with the model that it was made on"
            )
        for layer, (left, right) in self.factors.items():
            shapes = [list(left.shape), list(right.shape)]
            if left.shape != (config.d_mlp, len(right)) or right.shape[1:] != (config.d_model,):
                raise UserError(
                    f"the delta of block {layer} has the shapes {shapes}, expected [{config.d_mlp}, r] and [r, "
                    f"{config.d_model}]"
                )


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """The delta in a file. Raises ``UserError`` for any other file, and for numbers that are not finite."""
    tensors, facts = read_tensors(path, "delta")
    if facts.get("format") != FORMAT or not {"model", "fingerprint"} <= facts.keys():
        raise UserError(f"{path} is no delta of jaxsteer ({FORMAT}): `jaxsteer rewrite run` writes one")
    pairs: dict[int, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or array.ndim != 2 or array.dtype != np.float32 or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name!r} ({array.dtype} {list(array.shape)}) is no factor of a delta: expected finite "
                "float32 matrices blocks.I.down.left and blocks.I.down.right"
            )
        pairs.setdefault(int(match[1]), {})[match[2]] = array
    for layer, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"{path}: block {layer} has one factor of two")
    return Delta(
        factors={layer: (pair["left"], pair["right"]) for layer, pair in sorted(pairs.items())},
        model=facts["model"],
        fingerprint=facts["fingerprint"],
        metadata={name: value for name, value in facts.items() if name not in _OWN},
    )


def applied(model: Model, delta: Delta) -> Model:
    """``model`` with the delta added to its weights, and a fingerprint of its own.

    Changes of blocks that a model loaded in part does not have are left out. Products are float32 and rounded once to
    the dtype of the weights. Raises ``UserError`` for a delta of other weights.
    """
    delta.check(model.name, model.config, model.fingerprint)
    down = model.params.layers.down
    for layer, (left, right) in delta.factors.items():
        if layer < model.config.n_layers:
            down = _changed(down, left, right, layer, sharding=stack_shardings(model.config, model.mesh)["down"])
    params = dataclasses.replace(model.params, layers=dataclasses.replace(model.params.layers, down=down))
    return dataclasses.replace(model, params=params, fingerprint=delta.new_fingerprint)


@partial(jax.jit, static_argnames="sharding")
def _changed(
    down: Float[Array, "L I D"],
    left: Float[Array | np.ndarray, "I r"],
    right: Float[Array | np.ndarray, "r D"],
    layer: Int[Array, ""] | int,
    *,
    sharding: jax.sharding.Sharding,
) -> Float[Array, "L I D"]:
    change = jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
    new = lax.dynamic_index_in_dim(down, layer, 0, keepdims=False).astype(jnp.float32) + change
    down = lax.dynamic_update_index_in_dim(down, new.astype(down.dtype), layer, 0)
    return lax.with_sharding_constraint(down, sharding)
