"""Configurations of published models by name, so that a model can be planned for before any file of it is here.

The numbers are those of the models' public config.json files; they pass through the same mapping as a file does. Names
are the hub's in lower case, without organisation and without what tells base from chat models, whose shapes are equal.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from checkpoints_convert.hf import config_from_hf
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig

Sizes = tuple[int, ...]
"""Width, layers, query heads, key/value heads, head width, MLP width."""

_LLAMA: dict[str, tuple[Sizes, float, bool]] = {
    "llama-3.1-8b": ((4096, 32, 32, 8, 128, 14336), 8.0, False),
    "llama-3.1-70b": ((8192, 80, 64, 8, 128, 28672), 8.0, False),
    "llama-3.2-1b": ((2048, 16, 32, 8, 64, 8192), 32.0, True),
    "llama-3.2-3b": ((3072, 28, 24, 8, 128, 8192), 32.0, True),
    "llama-3.3-70b": ((8192, 80, 64, 8, 128, 28672), 8.0, False),
}
"""With the factor of the rotary scaling, and whether the embedding is tied."""
_QWEN2: dict[str, tuple[Sizes, int, bool]] = {
    "qwen2.5-0.5b": ((896, 24, 14, 2, 64, 4864), 151936, True),
    "qwen2.5-1.5b": ((1536, 28, 12, 2, 128, 8960), 151936, True),
    "qwen2.5-3b": ((2048, 36, 16, 2, 128, 11008), 151936, True),
    "qwen2.5-7b": ((3584, 28, 28, 4, 128, 18944), 152064, False),
    "qwen2.5-14b": ((5120, 48, 40, 8, 128, 13824), 152064, False),
    "qwen2.5-32b": ((5120, 64, 40, 8, 128, 27648), 152064, False),
    "qwen2.5-72b": ((8192, 80, 64, 8, 128, 29568), 152064, False),
}
"""With the rows of the embedding table, and whether it is tied."""
_QWEN3: dict[str, tuple[Sizes, bool]] = {
    "qwen3-0.6b": ((1024, 28, 16, 8, 128, 3072), True),
    "qwen3-1.7b": ((2048, 28, 16, 8, 128, 6144), True),
    "qwen3-4b": ((2560, 36, 32, 8, 128, 9728), True),
    "qwen3-8b": ((4096, 36, 32, 8, 128, 12288), False),
    "qwen3-14b": ((5120, 40, 40, 8, 128, 17408), False),
    "qwen3-32b": ((5120, 64, 64, 8, 128, 25600), False),
}
_GEMMA2: dict[str, tuple[Sizes, int]] = {
    "gemma-2-2b": ((2304, 26, 8, 4, 256, 9216), 256),
    "gemma-2-9b": ((3584, 42, 16, 8, 256, 14336), 256),
    "gemma-2-27b": ((4608, 46, 32, 16, 128, 36864), 144),
}
"""With ``query_pre_attn_scalar``."""
_GEMMA3: dict[str, tuple[Sizes, int]] = {
    "gemma-3-1b": ((1152, 26, 4, 1, 256, 6912), 256),
    "gemma-3-4b": ((2560, 34, 8, 4, 256, 10240), 256),
    "gemma-3-12b": ((3840, 48, 16, 8, 256, 15360), 256),
    "gemma-3-27b": ((5376, 62, 32, 16, 128, 21504), 168),
}
"""With ``query_pre_attn_scalar``. 4B and up are the text part of a model that also sees."""

NAMES = (*_LLAMA, *_QWEN2, *_QWEN3, *_GEMMA2, *_GEMMA3)


@functools.cache
def published_config(name: str) -> ModelConfig:
    """The config of the published model ``name``, one of ``NAMES``. Raises ``UserError`` for any other."""
    if name.lower() not in NAMES:
        raise UserError(f"{name!r} is no built-in configuration. There are: {', '.join(NAMES)}.")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_fields(name.lower())), encoding="utf-8")
        return config_from_hf(directory)


def _fields(name: str) -> dict[str, Any]:
    """The fields of the model's config.json that change its numbers."""
    if name in _LLAMA:
        sizes, factor, tied = _LLAMA[name]
        scaling = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        return _shared("llama", "LlamaForCausalLM", sizes) | {
            "vocab_size": 128256, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
            "rope_theta": 500000.0, "rope_scaling": scaling, "tie_word_embeddings": tied,
        }  # fmt: skip
    if name in _QWEN2 or name in _QWEN3:
        sizes, rows, tied = _QWEN2[name] if name in _QWEN2 else (_QWEN3[name][0], 151936, _QWEN3[name][1])
        kind = ("qwen2", "Qwen2ForCausalLM") if name in _QWEN2 else ("qwen3", "Qwen3ForCausalLM")
        fields = _shared(*kind, sizes) | {
            "vocab_size": rows, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768 if name in _QWEN2 else 40960, "use_sliding_window": False,
            "tie_word_embeddings": tied,
        }  # fmt: skip
        if name in _QWEN2:  # its files have no such field: the width over the heads
            assert fields.pop("head_dim") * fields["num_attention_heads"] == fields["hidden_size"]
        return fields
    sizes, scalar = _GEMMA2[name] if name in _GEMMA2 else _GEMMA3[name]
    gemma = {
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "query_pre_attn_scalar": scalar,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if name in _GEMMA2:
        return _shared("gemma2", "Gemma2ForCausalLM", sizes) | gemma | {
            "vocab_size": 256000, "max_position_embeddings": 8192, "rope_theta": 10000.0, "sliding_window": 4096,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        }  # fmt: skip
    gemma |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    if name == "gemma-3-1b":
        return _shared("gemma3_text", "Gemma3ForCausalLM", sizes) | gemma | {
            "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512,
        }  # fmt: skip
    text = _shared("gemma3_text", "Gemma3ForCausalLM", sizes) | gemma | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}


def _shared(model_type: str, architecture: str, sizes: Sizes) -> dict[str, Any]:
    width, layers, heads, kv_heads, head, mlp = sizes
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": mlp,
    }
