"""Tensor names of Hugging Face checkpoints, one table per family, and what becomes of each tensor.

Every matrix is stored [out, in]. Ours is [in..., out...]: transpose, then split heads. GPT-2's are stored [in, out],
and queries, keys and values in one: ``Part`` shows them as the others are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

import numpy as np

from checkpoints_convert.files import DTYPES, Part, Tensor
from checkpoints_convert.sources import StoredTensor
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
    turned: bool = False
    """Whether the matrix is stored [in, out]."""
    third: int | None = None
    """Which third of the stored outputs it is, where queries, keys and values are stored in one."""


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
_QK_NORM = {"q_norm": Source("self_attn.q_norm.weight"), "k_norm": Source("self_attn.k_norm.weight")}
_QWEN2_LAYER = _LLAMA_LAYER | {
    "q_bias": Source("self_attn.q_proj.bias"),
    "k_bias": Source("self_attn.k_proj.bias"),
    "v_bias": Source("self_attn.v_proj.bias"),
}
# "post_attention" is Llama's name of the norm before the MLP. In Gemma it is what it says.
_GEMMA2_LAYER = _LLAMA_LAYER | {
    "post_attn_norm": Source("post_attention_layernorm.weight"),
    "mlp_norm": Source("pre_feedforward_layernorm.weight"),
    "post_mlp_norm": Source("post_feedforward_layernorm.weight"),
}
LAYER_NAMES: dict[str, dict[str, Source]] = {
    "llama": _LLAMA_LAYER,
    "qwen2": _QWEN2_LAYER,
    "qwen3": _LLAMA_LAYER | _QK_NORM,
    "gemma2": _GEMMA2_LAYER,
    "gemma3_text": _GEMMA2_LAYER | _QK_NORM,
    "gemma3": _GEMMA2_LAYER | _QK_NORM,
    "gpt2": {
        "attn_norm": Source("ln_1.weight"),
        "attn_norm_bias": Source("ln_1.bias"),
        **{name: Source("attn.c_attn.weight", 1, turned=True, third=i) for i, name in enumerate("qkv")},
        **{f"{name}_bias": Source("attn.c_attn.bias", third=i) for i, name in enumerate("qkv")},
        "o": Source("attn.c_proj.weight", 2, turned=True),
        "o_bias": Source("attn.c_proj.bias"),
        "mlp_norm": Source("ln_2.weight"),
        "mlp_norm_bias": Source("ln_2.bias"),
        "up": Source("mlp.c_fc.weight", 1, turned=True),
        "up_bias": Source("mlp.c_fc.bias"),
        "down": Source("mlp.c_proj.weight", 1, turned=True),
        "down_bias": Source("mlp.c_proj.bias"),
    },
}
"""Family -> leaf of a layer -> its source, named relative to ``PREFIX.layers.i.`` (GPT-2: ``PREFIX.h.i.``)."""

HEAD = "lm_head.weight"
_TOP = {
    "embed": Source("embed_tokens.weight", None),
    "final_norm": Source("norm.weight"),
    "unembed": Source(HEAD, 1),
}
TOP_NAMES = dict.fromkeys(LAYER_NAMES, _TOP) | {
    "gpt2": {
        "embed": Source("wte.weight", None),
        "positions": Source("wpe.weight", None),
        "final_norm": Source("ln_f.weight"),
        "final_norm_bias": Source("ln_f.bias"),
        "unembed": Source(HEAD, 1),
    }
}
"""Family -> leaf outside the layers -> its source: ``lm_head`` as it is or after "language_model.", the others after
PREFIX."""

TEXT_PREFIX = "model."
"""What the names of a text model begin with in the files of transformers, as a rule."""
PREFIXES = {
    "gpt2": ("transformer.", ""),
    "gemma3": ("language_model.model.", "model.language_model.", TEXT_PREFIX),
    "gemma3_text": (TEXT_PREFIX, "language_model.model.", "model.language_model."),
}
"""Family -> other prefixes that its files have had, the usual one first: versions of transformers differ, and so do
text models cut out of multimodal ones."""

FREQUENCIES = r"(language_model\.)?model\.(language_model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
IGNORED = {
    "gemma3": rf"{FREQUENCIES}|(model\.)?(vision_tower|multi_modal_projector)\..+",
    "gpt2": r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
}
"""Family -> pattern of tensors that are left out knowingly: in every family the rotary frequencies of old files, which
follow from the config; the parts of a multimodal model that see; and the causal masks in files of GPT-2."""

Leaf = tuple[str, ...]
"""Path of a leaf in the checkpoint: ("embed",) or ("layers", "007", "q")."""


def layer_key(layer: int) -> str:
    """The key of one layer in the checkpoint; zero-padded so that listings are in order."""
    return f"{layer:03d}"


def hf_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """The shape in the Hugging Face file of a leaf of ours: [out, in] for matrices, or [in, out] if ``turned``."""
    if source.in_axes is None:
        return shape
    parts = 1 if source.third is None else 3
    if source.in_axes == 0:
        return (parts * math.prod(shape),)
    sizes = parts * math.prod(shape[source.in_axes :]), math.prod(shape[: source.in_axes])
    return sizes[::-1] if source.turned else sizes


def to_hf(values: np.ndarray, source: Source) -> np.ndarray:
    """A leaf of ours as a tensor of the file, or as its third of one (of the last axis)."""
    if not source.in_axes:
        return values if source.in_axes is None else values.reshape(-1)
    flat = values.reshape(math.prod(values.shape[: source.in_axes]), -1)
    return flat if source.turned else _transposed(flat)


def _transposed(values: np.ndarray) -> np.ndarray:
    """A transposed copy; as integers, because NumPy copies bfloat16 element by element."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    return np.ascontiguousarray(bits.T).view(values.dtype)


def expected_leaves(
    config: ModelConfig, prefix: str | None = None, head: str = HEAD
) -> dict[Leaf, tuple[str, Source, tuple[int, ...]]]:
    """Leaf -> (full Hugging Face name, source, our shape), for every leaf that the config asks for, in stream order.

    ``prefix`` and ``head`` are how this checkpoint calls its text model and its unembedding (default: the usual names).
    """
    prefix = _prefixes(config)[0] if prefix is None else prefix
    table, stack = LAYER_NAMES[config.family], "h" if config.family == "gpt2" else "layers"
    leaves: dict[Leaf, tuple[str, Source, tuple[int, ...]]] = {}
    for name, shape in top_shapes(config).items():
        source = TOP_NAMES[config.family][name]
        leaves[(name,)] = (head if name == "unembed" else prefix + source.name, source, shape)
    for layer in range(config.n_layers):
        for name, shape in layer_shapes(config).items():
            source = table[name]
            leaves[("layers", layer_key(layer), name)] = (f"{prefix}{stack}.{layer}.{source.name}", source, shape)
    return leaves


def _prefixes(config: ModelConfig) -> tuple[str, ...]:
    return PREFIXES.get(config.family, (TEXT_PREFIX,))


def _naming(names: Collection[str], config: ModelConfig) -> tuple[str, str]:
    """(prefix of the text model, name of the unembedding) in a checkpoint that holds tensors called ``names``."""
    prefixes, head, embed = _prefixes(config), HEAD, TOP_NAMES[config.family]["embed"].name
    found = [prefix for prefix in prefixes if prefix + embed in names]
    if len(found) > 1:
        raise UserError(
            f"The checkpoint holds several text models, at {' and '.join(found)}: which one is meant cannot be told."
        )
    # Where both heads are stored, one is left over and refused.
    before = ("", "language_model.") if config.family.startswith("gemma3") else ("",)
    return (found or prefixes)[0], next((text + head for text in before if text + head in names), head)


def assign(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> tuple[dict[Leaf, StoredTensor], list[str]]:
    """Which tensor fills which leaf, and the names that are ignored. Nothing may be missing or left over.

    Raises ``UserError`` naming the first tensors that are missing, unknown, of a wrong shape or of a dtype that cannot
    be converted. A stored ``lm_head`` of a tied model must equal the embedding (compared here, in blocks of rows).
    """
    prefix, head = _naming(tensors, config)
    leaves = expected_leaves(config, prefix, head)
    missing = [name for name, _, _ in leaves.values() if name not in tensors]
    if missing:
        raise UserError(
            f"The checkpoint lacks {len(missing)} of the {len(leaves)} tensors that its config.json asks for, among "
            f"them {_some(missing)}. Is the download complete, and is config.json from the same model?"
        )
    wanted = {name for name, _, _ in leaves.values()}
    pattern = IGNORED.get(config.family, FREQUENCIES)
    ignored = sorted(name for name in tensors if name not in wanted and re.fullmatch(pattern, name))
    extra = sorted(set(tensors) - wanted - set(ignored))
    if config.tied_embeddings and head in extra:
        _check_tied(tensors[head], tensors[prefix + TOP_NAMES[config.family]["embed"].name])
        extra.remove(head)
        ignored.append(head)
    if extra:
        raise UserError(
            f"The checkpoint holds {len(extra)} tensors that a {config.family} model with this config.json does not "
            f"have, among them {_some(extra)}. Their values would be lost, so the checkpoint is refused."
        )
    for name, source, shape in leaves.values():
        _check_tensor(tensors[name], hf_shape(shape, source))
    return {leaf: _as_others(tensors[name], source) for leaf, (name, source, _) in leaves.items()}, ignored


def _as_others(tensor: StoredTensor, source: Source) -> StoredTensor:
    """The tensor as [out, in], cut out of the one that holds several."""
    if not source.turned and source.third is None:
        return tensor
    assert isinstance(tensor, Tensor)
    return Part(whole=tensor, turned=source.turned, third=source.third)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
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


def _check_tied(head: StoredTensor, embed: StoredTensor) -> None:
    _check_tensor(head, embed.shape)
    _check_tensor(embed, embed.shape)
    rows = max(1, (64 << 20) // max(1, embed.shape[1] * 8))
    for ours, theirs in zip(head.blocks(rows), embed.blocks(rows), strict=True):
        if not np.array_equal(ours.astype(np.float64), theirs.astype(np.float64)):
            raise UserError(
                f"{head.file} stores {head.name!r} with values other than {embed.name!r}, but config.json says that "
                f"they are tied (tie_word_embeddings: true). Set it to false if the two are meant to differ."
            )
