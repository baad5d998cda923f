"""GGUF models: config, tokenizer and tensors of llama.cpp's files, as conversion takes them from a directory.

The config becomes the config.json that the original model had, as far as it decides numbers, and is checked like any
other. Tensors are dequantised block by block (by the ``gguf`` package) and get back what llama.cpp's own conversion
changed: rows of q and k in files of the architecture "llama" are put in their order again, and 1 is taken from the
norm weights of Gemma.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.gguf_tokenizer import stop_ids, tokenizer_files
from jaxsteer.errors import UserError
from jaxsteer.files.gguf import GGUFEntry, read_gguf_header

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
"""ggml types that are stored as they are; all others are dequantised to float32."""
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"
"""How each rotary frequency is divided: how files of Llama 3.1 and later say their rope scaling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor of a GGUF file under its Hugging Face name; the methods of ``checkpoints_convert.files.Tensor``."""

    name: str
    file: Path
    entry: GGUFEntry
    heads: int | None = None
    """Of q and k of the architecture "llama": heads whose rows are to be put in the order of Hugging Face."""
    subtract: float = 0.0
    """Taken from every value: 1 from the norm weights of Gemma."""
    raw = False
    """The values are made of the bytes of the file, and are not these."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As in a Hugging Face file: [out, in]."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """Of the values, dequantised."""
        return _PLAIN.get(self.entry.kind, "F32")

    @property
    def stored_as(self) -> str:
        """The type in the file, as people name it: "Q4_1"."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.entry.kind).name

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.entry.nbytes

    @property
    def row_bytes(self) -> int:
        """Size on disk of one row (of the first axis)."""
        return self.entry.nbytes // max(1, self.shape[0])

    def blocks(
        self, rows: int, memory: np.ndarray | None = None, update: Callable[[memoryview], object] = lambda data: None
    ) -> Iterator[np.ndarray]:
        """The values, so many rows (of the first axis) at a time; ``update`` gets the bytes as they are read."""
        del memory  # values are made, not read
        order = self._order()
        try:
            stored = np.memmap(self.file, np.uint8, "r", self.entry.offset, (self.shape[0], self.row_bytes))
            for start in range(0, self.shape[0], rows):
                block = stored[start : start + rows] if order is None else stored[order[start : start + rows]]
                block = np.ascontiguousarray(block)
                update(block.reshape(-1).data)
                yield self._values(block)
        except OSError as error:
            raise UserError(f"{self.file} could not be read at {self.name!r} ({error.strerror or error}).") from error

    def _order(self) -> np.ndarray | None:
        """Row of the file for every row of ours: llama.cpp pairs entries j and j + H/2 of a head side by side."""
        if self.heads is None:
            return None
        rows = np.arange(self.shape[0]).reshape(self.heads, -1, 2)
        return rows.swapaxes(1, 2).reshape(-1)

    def _values(self, block: np.ndarray) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        if self.entry.kind in _PLAIN:
            values = block.view(_DTYPES[self.dtype])
        else:
            values = dequantize(block, GGMLQuantizationType(self.entry.kind))
        values = values.reshape(len(block), *self.shape[1:])
        return (values - np.asarray(self.subtract, values.dtype)) if self.subtract else values


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFModel:
    """A model in GGUF files: what a Hugging Face directory of the same model would hold."""

    files: tuple[Path, ...]
    keys: dict[str, Any]
    config: dict[str, Any]
    """The fields of its config.json."""
    tensors: dict[str, GGUFTensor]
    ignored: tuple[str, ...]
    """Tensors that are left out knowingly."""

    def side(self) -> dict[str, str]:
        """Name -> text: config.json, generation_config.json and the files of the tokenizer.

        Raises ``UserError`` for a tokenizer that is not supported, by name.
        """
        side = {"config.json": json.dumps(self.config, indent=1), **tokenizer_files(self.keys, str(self.files[0]))}
        if stops := stop_ids(self.keys):
            side["generation_config.json"] = json.dumps({"eos_token_id": stops})
        return side


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is meant to be a GGUF file."""
    return path.suffix == SUFFIX and not path.is_dir()


def read_gguf_model(path: Path) -> GGUFModel:
    """The model in a GGUF file, or in all parts of a split one of which ``path`` is the first.

    Raises ``UserError`` for what is damaged, incomplete, no model, or not supported: an architecture, a quantisation,
    a rope scaling, a tensor, each by name.
    """
    files = parts(path)
    keys, entries = read_gguf_header(files[0])
    where = {name: (files[0], entry) for name, entry in entries.items()}
    for file in files[1:]:
        for name, entry in read_gguf_header(file)[1].items():
            if name in where:
                raise UserError(f"Tensor {name!r} is in {where[name][0].name} and in {file.name}.")
            where[name] = file, entry
    if len(files) == 1 and int(keys.get("split.count", 1)) > 1:
        raise UserError(
            f"{path} is one of {keys['split.count']} parts, by its key split.count, and its name is not of the form "
            f"NAME-00001-of-0000N.gguf. Give all parts the names that they were made with."
        )
    config = _config(keys, where, files[0])
    tensors, ignored = _named(where, config, files[0])
    return GGUFModel(files=files, keys=keys, config=config, tensors=tensors, ignored=tuple(ignored))


def header_digest(file: Path) -> str:
    """sha256 of everything in front of the tensors."""
    _, entries = read_gguf_header(file)
    left = min((entry.offset for entry in entries.values()), default=file.stat().st_size)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while left > 0 and (data := stream.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def parts(path: Path) -> tuple[Path, ...]:
    """The files of a model: one, or all parts of a split one of which ``path`` must be the first."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if int(match["number"]) != 1:
        first = path.with_name(f"{match['stem']}-00001-of-{count:05d}.gguf")
        raise UserError(f"{path} is a later part of a split model. Give the first: {first}")
    files = tuple(path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} is incomplete: {', '.join(absent[:3])} {'is' if len(absent) == 1 else 'are'} missing.")
    return files


# --- the config ---------------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_PATTERN = 6
"""Every sixth layer of Gemma 3 sees everything; llama.cpp has it in its code, not in the file."""
_BY_HEADS = {("gemma2", 46), ("gemma3", 62)}
"""The 27B models, whose queries are scaled by D / N and not by the head width. Likewise in llama.cpp's code."""


def _config(keys: Mapping[str, Any], where: Mapping[str, tuple[Path, GGUFEntry]], path: Path) -> dict[str, Any]:
    """The fields of config.json. Raises ``UserError`` for an architecture or a setting that is not supported."""
    family = keys.get("general.architecture")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{path} has the architecture {family!r}, which is not supported. Supported: {', '.join(ARCHITECTURES)}."
        )

    def value(name: str, default: Any = None) -> Any:
        found = keys.get(f"{family}.{name}", default)
        if found is None:
            raise UserError(f"{path} lacks the key {family}.{name}.")
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise UserError(f"{path}: {family}.{name} is {str(found)[:80]}; one finite number is supported.")
        return float(str(np.float32(found))) if isinstance(found, float) else found  # 1e-5, stored as 9.99999975e-6

    if int(value("expert_count", 0)):
        raise UserError(f"{path} has {value('expert_count')} experts per layer; mixtures of experts are not supported.")
    if "token_embd.weight" not in where:
        raise UserError(f"{path} has no tensor token_embd.weight: it holds no whole model.")
    width, heads = value("embedding_length"), value("attention.head_count")
    head_width = value("attention.key_length", value("rope.dimension_count", width // max(1, heads)))
    for name in ("rope.dimension_count", "attention.value_length"):
        if value(name, head_width) != head_width:
            raise UserError(f"{path}: {family}.{name} is {value(name)}, and heads are {head_width} wide.")
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": "gemma3_text" if family == "gemma3" else family,
        "vocab_size": where["token_embd.weight"][1].shape[0],
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_width,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in where,
        "dtype": "float32",
    }
    rope = {"rope_type": "default", "rope_theta": value("rope.freq_base", 10_000.0)}
    kind = keys.get(f"{family}.rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    elif kind != "none":
        raise UserError(f"{path} has the rope scaling {kind!r}, which is not supported: expected none or linear.")
    if ROPE_FACTORS in where:
        rope |= _llama3_rope(*where[ROPE_FACTORS], rope["rope_theta"], head_width)
    if not family.startswith("gemma"):
        return config | {"rope_parameters": rope, "hidden_act": "silu"}
    scalar = width / heads if (family, value("block_count")) in _BY_HEADS else head_width
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": value("attention.sliding_window"),
    }
    every = 2 if family == "gemma2" else _GEMMA3_PATTERN
    config["layer_types"] = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(value("block_count"))
    ]
    config |= {
        cap: value(cap) if f"{family}.{cap}" in keys else None
        for cap in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    if family == "gemma2":
        return config | {"rope_parameters": rope}
    local = {"rope_type": "default", "rope_theta": value("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)}
    return config | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _llama3_rope(file: Path, entry: GGUFEntry, theta: float, head_width: int) -> dict[str, Any]:
    """Llama 3's rope scaling from the factors that it gives, if they are those of a published setting."""
    from jaxsteer.models.attention import inverse_frequencies
    from jaxsteer.models.config import Rope

    factors = np.fromfile(file, "<f4", math.prod(entry.shape), offset=entry.offset)
    plain = inverse_frequencies(Rope(theta=theta), head_width)
    rope = Rope(
        theta=theta,
        kind="llama3",
        factor=float(factors.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    expected = plain / inverse_frequencies(rope, head_width)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(f"{file}: {ROPE_FACTORS} are not those of a rope scaling that is supported (Llama 3's).")
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }


# --- the tensors --------------------------------------------------------------------------------------------------


def _named(
    where: Mapping[str, tuple[Path, GGUFEntry]], config: Mapping[str, Any], path: Path
) -> tuple[dict[str, GGUFTensor], list[str]]:
    """The tensors by their Hugging Face names, and the names of those that are left out."""
    gemma = config["model_type"].startswith("gemma")
    layer_names = _GEMMA_LAYER if gemma else _LAYER
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, GGUFTensor] = {}
    for name, (file, entry) in where.items():
        if name == ROPE_FACTORS:
            continue
        stem, _, kind = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = match[2] if match else stem
        theirs = f"model.layers.{match[1]}.{layer_names.get(part)}" if match else _TOP.get(stem)
        if theirs is None or (match and part not in layer_names) or kind not in ("weight", "bias"):
            raise UserError(f"{path} has a tensor {name!r}, which a {config['model_type']} model does not have.")
        if entry.kind not in _PLAIN and not _can_dequantise(entry.kind):
            raise UserError(f"{path}: tensor {name!r} has ggml type {entry.kind}, which cannot be dequantised.")
        tensors[f"{theirs}.{kind}"] = GGUFTensor(
            name=f"{theirs}.{kind}",
            file=file,
            entry=entry,
            heads=heads.get(part) if config["model_type"] == "llama" else None,
            subtract=1.0 if gemma and "norm" in part else 0.0,
        )
    return tensors, [ROPE_FACTORS] if ROPE_FACTORS in where else []


def _can_dequantise(kind: int) -> bool:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        quantisation = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True
