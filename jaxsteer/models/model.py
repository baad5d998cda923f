"""``Model``: parameters, config and tokenizer, as ``jaxsteer.load`` gives them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model. Not a pytree: pass ``model.params`` and ``model.config`` to jitted functions."""

    params: Params
    config: ModelConfig
    tokenizer: Any
    """A ``transformers.PreTrainedTokenizerFast``, or None if the checkpoint came without tokenizer.json."""
    name: str
    """What was asked for: "organism:llama", a hub id or the name of the directory."""
    fingerprint: str
    """sha256 over config and weights, recorded when the checkpoint was converted."""
    mesh: Mesh | None = None
    stop_tokens: tuple[int, ...] = ()
    """Ids that end an answer, from the checkpoint's generation_config.json (the tokenizer's EOS is known to itself)."""

    def __repr__(self) -> str:
        leaves, embed = jax.tree.leaves(self.params), self.params.embed
        count = sum(leaf.size for leaf in leaves)
        devices = sorted(embed.devices(), key=lambda device: device.id) if isinstance(embed, jax.Array) else []
        where = f"{len(devices)} x {devices[0].device_kind}" if devices else "no device"
        return (
            f"Model({self.name}, {_size(count)} parameters, {self.config.n_layers} layers of width "
            f"{self.config.d_model}, {embed.dtype}, {where})"
        )


def _size(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
