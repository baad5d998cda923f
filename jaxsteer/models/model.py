"""``Model``: parameters, config and tokenizer, as ``jaxsteer.load`` gives them."""

from __future__ import annotations

import dataclasses
from typing import Any

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
