"""GGUF files as llama.cpp's converter writes them, made from a Hugging Face directory with the ``gguf`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import load_file

from checkpoints_convert import gguf as ours

SPECIAL = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k of Llama: the halves of every head, interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def sentencepiece_keys(writer: GGUFWriter, vocab_size: int, *, prefix: bool) -> None:
    """A SentencePiece vocabulary: special tokens, 256 bytes, letters, and some merges by falling score."""
    mark = "\u2581"
    pieces = [*"abcdefghijklmnopqrstuvwxyz", mark, ".", f"{mark}t", "he", f"{mark}the", "in", "er", "th"]
    tokens = [*SPECIAL.values(), *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    tokens = (tokens + [f"<unused{i}>" for i in range(vocab_size)])[:vocab_size]
    kinds = [3, 3, 2, *[6] * 256, *[1] * len(pieces)]
    kinds = (kinds + [5] * vocab_size)[:vocab_size]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores([-float(i) for i in range(vocab_size)])
    writer.add_add_space_prefix(prefix)
    for add, name in ((writer.add_bos_token_id, "bos"), (writer.add_eos_token_id, "eos")):
        add(list(SPECIAL).index(name))
    writer.add_unk_token_id(2)


def write_gguf_model(
    source: Path, path: Path, *, kind: str = "F32", parts: int = 1, keys: dict[str, Any] | None = None
) -> Path:
    """The model in ``source`` as a GGUF file whose matrices are of the ggml type ``kind``; ``keys`` are set last."""
    config = json.loads((source / "config.json").read_text())
    family = config["model_type"].removesuffix("_text")
    gemma = family.startswith("gemma")
    names = ours._GEMMA_LAYER if gemma else ours._LAYER
    back = {theirs: mine for mine, theirs in names.items()}
    top = {theirs: mine for mine, theirs in ours._TOP.items()}
    tensors: dict[str, np.ndarray] = {}
    for name, values in load_file(source / "model.safetensors").items():
        stem, _, ending = name.rpartition(".")
        layer = stem.removeprefix("model.layers.").partition(".") if stem.startswith("model.layers.") else None
        part = back[layer[2]] if layer else top[stem]
        if family == "llama" and part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads"] if part == "attn_q" else config["num_key_value_heads"]
            values = permuted(values, heads)
        if gemma and "norm" in part:
            values = values + np.float32(1)
        tensors[f"blk.{layer[0]}.{part}.{ending}" if layer else f"{part}.{ending}"] = values
    writer = GGUFWriter(path, family, split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_string(f"{family}.rope.scaling.type", "linear")
        writer.add_float32(f"{family}.rope.scaling.factor", rope["factor"])
    if gemma:
        writer.add_sliding_window(config["sliding_window"])
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(cap):
                writer.add_float32(f"{family}.{cap}", config[cap])
    sentencepiece_keys(writer, config["vocab_size"], prefix=not gemma)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, _type_of(value))
    wanted = GGMLQuantizationType[kind]
    for name, values in tensors.items():
        if values.ndim == 2 and kind != "F32":
            stored = quantize(values.astype(np.float32), wanted)
            writer.add_tensor(name, stored, raw_dtype=wanted)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def _type_of(value: Any) -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.get_type(value)
