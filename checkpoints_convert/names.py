"""Tensor names of Hugging Face checkpoints, one table per family, and what becomes of each tensor.

Every matrix is stored [out, in]. Ours is [in..., out...]: transpose, then split heads.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from checkpoints_convert.files import DTYPES, Tensor
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import layer_shapes, top_shapes


@dataclasses.dataclass(frozen=True)
class Source:
    """The Hugging Face name of a leaf (inside its layer, for leaves of a layer) and how its shape is laid out.

    ``in_axes`` says how many axes of our shape are inputs: 1 for D -> heads, 2 for heads -> D; 0 for vectors, which are
    stored flat; None for a tensor that is stored exactly as ours.
    """

    name: str
    in_axes: int | None = 0


_LLAMA_LAYER = {
    "attn_norm": Source("input_layernorm.weight"),
    "q": Source("self_attn.q_proj.weight", 1),
    "k": Source("self_attn.k_proj.weight", 1),
    "v": Source("self_attn.v_proj.weight", 1),
    "o": Source("self_attn.o_proj.weight", 2),
    "mlp_norm": Source("post_attention_layernorm.weight"),
    "gate": Source("mlp.gate_proj.weight", 1),
    "up": Source("mlp.up_proj.weight", 1),
    "down": Source("mlp.down_proj.weight", 1),
}
LAYER_NAMES: dict[str, dict[str, Source]] = {"llama": _LLAMA_LAYER}
"""Family -> leaf of a layer -> its source, named relative to ``model.layers.i.``."""

TOP_NAMES = {
    "embed": Source("model.embed_tokens.weight", None),
    "final_norm": Source("model.norm.weight"),
    "unembed": Source("lm_head.weight", 1),
}
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old files that hold nothing: the frequencies follow from the config."""

Leaf = tuple[str, ...]
"""Path of a leaf in the checkpoint: ("embed",) or ("layers", "007", "q")."""


def layer_key(layer: int) -> str:
    """The key of one layer in the checkpoint; zero-padded so that listings are in order."""
    return f"{layer:03d}"


def hf_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """The shape in the Hugging Face file of a leaf of ours: [out, in] for matrices."""
    if source.in_axes is None:
        return shape
    if source.in_axes == 0:
        return (math.prod(shape),)
    return math.prod(shape[source.in_axes :]), math.prod(shape[: source.in_axes])


def to_ours(values: np.ndarray, shape: tuple[int, ...], source: Source) -> np.ndarray:
    """A tensor of the file as a leaf of ours."""
    return (_transposed(values) if source.in_axes else values).reshape(shape)


def to_hf(values: np.ndarray, source: Source) -> np.ndarray:
    """A leaf of ours as a tensor of the file: the inverse of ``to_ours``."""
    shape = hf_shape(values.shape, source)
    return _transposed(values.reshape(shape[::-1])) if source.in_axes else values.reshape(shape)


def _transposed(values: np.ndarray) -> np.ndarray:
    """A transposed copy; as integers, because NumPy copies bfloat16 element by element."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    return np.ascontiguousarray(bits.T).view(values.dtype)


def expected_leaves(config: ModelConfig) -> dict[Leaf, tuple[str, Source, tuple[int, ...]]]:
    """Leaf -> (full Hugging Face name, source, our shape), for every leaf that the config asks for, in stream order."""
    table = LAYER_NAMES[config.family]
    leaves: dict[Leaf, tuple[str, Source, tuple[int, ...]]] = {}
    for name, shape in top_shapes(config).items():
        leaves[(name,)] = (TOP_NAMES[name].name, TOP_NAMES[name], shape)
    for layer in range(config.n_layers):
        for name, shape in layer_shapes(config).items():
            source = table[name]
            leaves[("layers", layer_key(layer), name)] = (f"model.layers.{layer}.{source.name}", source, shape)
    return leaves


def assign(tensors: dict[str, Tensor], config: ModelConfig) -> tuple[dict[Leaf, Tensor], list[str]]:
    """Which tensor fills which leaf, and the names that are ignored. Nothing may be missing or left over.

    Raises ``UserError`` naming the first tensors that are missing, unknown, of a wrong shape or of a dtype that cannot
    be converted. A stored ``lm_head`` of a tied model must equal the embedding (compared here, in blocks of rows).
    """
    leaves = expected_leaves(config)
    missing = [name for name, _, _ in leaves.values() if name not in tensors]
    if missing:
        raise UserError(
            f"The checkpoint lacks {len(missing)} of the {len(leaves)} tensors that its config.json asks for, among "
            f"them {_some(missing)}. Is the download complete, and is config.json from the same model?"
        )
    wanted = {name for name, _, _ in leaves.values()}
    ignored = sorted(name for name in tensors if name not in wanted and IGNORED.fullmatch(name))
    extra = sorted(set(tensors) - wanted - set(ignored))
    head = TOP_NAMES["unembed"].name
    if config.tied_embeddings and head in extra:
        _check_tied(tensors[head], tensors[TOP_NAMES["embed"].name])
        extra.remove(head)
        ignored.append(head)
    if extra:
        raise UserError(
            f"The checkpoint holds {len(extra)} tensors that a {config.family} model with this config.json does not "
            f"have, among them {_some(extra)}. Their values would be lost, so the checkpoint is refused."
        )
    for name, source, shape in leaves.values():
        _check_tensor(tensors[name], hf_shape(shape, source))
    return {leaf: tensors[name] for leaf, (name, _, _) in leaves.items()}, ignored


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _check_tensor(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"Tensor {tensor.name!r} in {tensor.file} has shape {list(tensor.shape)}, and config.json asks for "
            f"{list(shape)}."
        )
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"Tensor {tensor.name!r} in {tensor.file} has dtype {tensor.dtype}; only {', '.join(DTYPES)} are "
            f"supported. Quantised checkpoints must be dequantised first."
        )


def _check_tied(head: Tensor, embed: Tensor) -> None:
    _check_tensor(head, embed.shape)
    _check_tensor(embed, embed.shape)
    rows = max(1, (64 << 20) // max(1, embed.shape[1] * 8))
    for start in range(0, embed.shape[0], rows):
        count = min(rows, embed.shape[0] - start)
        if not np.array_equal(_rows(head, start, count), _rows(embed, start, count)):
            raise UserError(
                f"{head.file} stores {head.name!r} with values other than {embed.name!r}, but config.json says that "
                f"they are tied (tie_word_embeddings: true). Set it to false if the two are meant to differ."
            )


def _rows(tensor: Tensor, start: int, count: int) -> np.ndarray:
    dtype, width = DTYPES[tensor.dtype], tensor.shape[1]
    values = np.fromfile(
        tensor.file, dtype=dtype, count=count * width, offset=tensor.offset + start * width * dtype.itemsize
    )
    return values.astype(np.float32 if dtype.itemsize < 4 else dtype)
