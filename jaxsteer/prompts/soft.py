"""Soft prompts: embeddings that stand in a text where tokens would.

A soft prompt enters a model as new tokens: the tokenizer learns one name per embedding and the table gains their rows.
Its text is these names, and whatever takes a text takes a soft prompt: generation, chats, evaluations. The new tokens
can be read but not written: the unembedding keeps its size (where their ids fall on padding of the table, they are as
improbable as padding).

Letters: S prompt length, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float
from tokenizers import AddedToken

from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, read_tensors, tensor_bytes, write_bytes
from jaxsteer.models.model import Model
from jaxsteer.models.params import TOP_SPECS, Params
from jaxsteer.prompts.conversation import SLOT

log = logging.getLogger(__name__)

FORMAT = "jaxsteer.soft/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """Embeddings to put into a slot."""

    embeddings: Float[np.ndarray, "S D"]
    """float32 rows as those of the embedding table (before Gemma's multiplier)."""
    model: str
    fingerprint: str
    """The model that they were made on, and sha256 of its weights."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How it was made."""


def save_soft(soft: SoftPrompt, path: str | os.PathLike[str]) -> Path:
    """Write a soft prompt as safetensors: ``embeddings`` and, as metadata, everything else. Returns the path."""
    path = Path(path)
    own = {"format": FORMAT, "model": soft.model, "fingerprint": soft.fingerprint}
    make_directory(path.parent)
    write_bytes(path, tensor_bytes({"embeddings": np.asarray(soft.embeddings, np.float32)}, {**soft.metadata, **own}))
    return path


def load_soft(path: str | os.PathLike[str]) -> SoftPrompt:
    """Read what ``save_soft`` wrote. Raises ``UserError`` for a missing or damaged file and for another format."""
    tensors, metadata = read_tensors(path, "soft prompt")
    embeddings = tensors.get("embeddings")
    if metadata.pop("format", None) != FORMAT or embeddings is None or embeddings.ndim != 2:
        raise UserError(f"{path} is no soft prompt of jaxsteer: expected format {FORMAT!r} and a matrix 'embeddings'")
    return SoftPrompt(
        embeddings=embeddings,
        model=metadata.pop("model", ""),
        fingerprint=metadata.pop("fingerprint", ""),
        metadata=metadata,
    )


def with_soft(model: Model, soft: SoftPrompt, *, any_weights: bool = False) -> tuple[Model, str]:
    """The model that knows a soft prompt, and the text that stands for it.

    The text goes where a prompt goes: it takes the space before it into its first token, as a word would. Raises
    ``UserError`` for embeddings of another width, a model without tokenizer, and weights other than those that the
    prompt was made on, unless ``any_weights``.
    """
    length, width = soft.embeddings.shape
    if width != model.config.d_model:
        raise UserError(
            f"the soft prompt has width {width}, but {model.name} has {model.config.d_model}: it belongs to another "
            f"model ({soft.model or 'unknown'})"
        )
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without tokenizer.json, which a soft prompt needs")
    if soft.fingerprint != model.fingerprint:
        where = f"{soft.model or 'an unknown model'} (weights {soft.fingerprint[:12] or 'unknown'})"
        if not any_weights:
            raise UserError(
                f"the soft prompt was made on {where}, not on the weights of {model.name} ({model.fingerprint[:12]}). "
                "If it is meant for it all the same, say any_weights=True (--any-weights)"
            )
        log.warning("the soft prompt was made on %s, not on %s: it may mean nothing here", where, model.name)
    tokenizer = copy.deepcopy(model.tokenizer)
    names = [f"<|soft {i}|>" for i in range(length)]
    while set(names) & set(tokenizer.get_added_vocab()):  # another soft prompt is there already
        names = [f"<{name}>" for name in names]
    # The space before a prompt belongs to its first token, so that token has a name with it and one without.
    spelt = [f" {names[0]}", *names]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in spelt], special_tokens=True)
    ids = np.asarray(tokenizer.convert_tokens_to_ids(spelt))
    params = _with_rows(model, ids, soft.embeddings)
    return dataclasses.replace(model, params=params, tokenizer=tokenizer), "".join(names)


def _with_rows(model: Model, ids: np.ndarray, embeddings: np.ndarray) -> Params:
    params, mesh = model.params, model.mesh
    shards = 1 if mesh is None else mesh.shape["model"]
    missing = -(-max(0, int(ids.max()) + 1 - len(params.embed)) // shards) * shards
    rows = jnp.asarray(embeddings[[0, *range(len(embeddings))]], params.embed.dtype)
    table = jnp.pad(params.embed, ((0, missing), (0, 0))).at[ids].set(rows)
    # A tied table would let the new tokens be written, and take probability from the others.
    unembed = params.embed.T if params.unembed is None else params.unembed
    if mesh is not None:
        table = jax.device_put(table, NamedSharding(mesh, TOP_SPECS["embed"]))
        unembed = jax.device_put(unembed, NamedSharding(mesh, TOP_SPECS["unembed"]))
    return dataclasses.replace(params, embed=table, unembed=unembed)


def placed(prompt: Any, text: str) -> Any:
    """A text, or a list of messages, with ``text`` at its ``{prompt}``, or behind it (the last message) without one."""
    if isinstance(prompt, str):
        return prompt.replace(SLOT, text) if SLOT in prompt else f"{prompt} {text}".lstrip()
    marked = [i for i, message in enumerate(prompt) if SLOT in str(message.get("content"))] or [len(prompt) - 1]
    return [
        {**message, "content": placed(message["content"], text)} if i in marked else message
        for i, message in enumerate(prompt)
    ]
