"""config.json mapped strictly: what is honoured, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxsteer import UserError
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope
from jaxsteer.models.hf import config_from_hf, config_to_hf
from tests.helpers.checkpoints import tiny_config

# As on the hub: old keys for RoPE, and fields about training and generation.
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


def mapped(path: Path, **changes: Any) -> ModelConfig:
    fields = {key: value for key, value in (LLAMA_31 | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(fields))
    return config_from_hf(path)


def test_llama_31(tmp_path: Path) -> None:
    assert mapped(tmp_path) == ModelConfig(
        family="llama",
        vocab_size=128256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_head=128,
        d_mlp=14336,
        max_positions=131072,
        norm_eps=1e-5,
        query_scale=1 / math.sqrt(128),
        windows=(GLOBAL_WINDOW,) * 32,
        ropes=(
            Rope(
                theta=5e5,
                kind="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            ),
        ),
        rope_index=(0,) * 32,
    )


def test_variants(tmp_path: Path) -> None:
    assert mapped(tmp_path, rope_scaling=None).ropes == (Rope(theta=5e5),)
    assert mapped(tmp_path, rope_scaling={"type": "linear", "factor": 4}).ropes[0].factor == 4
    assert mapped(tmp_path, tie_word_embeddings=True).tied_embeddings
    assert mapped(tmp_path, head_dim=64).d_head == 64
    assert mapped(tmp_path, num_key_value_heads=...).n_kv_heads == 32
    assert mapped(tmp_path, architectures=...).n_layers == 32
    assert mapped(tmp_path, rms_norm_eps=...).norm_eps == 1e-6  # the class's default, not ours


def test_a_config_that_is_written_is_read_back(tmp_path: Path) -> None:
    for config in (tiny_config(), tiny_config(tied_embeddings=True, rope=Rope(theta=7.0, kind="linear", factor=2.0))):
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
        assert config_from_hf(tmp_path) == config
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'.*LlamaForCausalLM.*not supported.*Supported: llama"),
        ({"model_type": ...}, "no model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'.*default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 2}}, "'beta' = 2"),
        ({"rope_scaling": [1]}, "object or null"),
        ({"attention_bias": True}, "'attention_bias' = True.*must be False"),
        ({"pretraining_tp": 2}, "'pretraining_tp' = 2.*must be 0 or 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*absent or null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({"logit_scale": 0.5}, "'logit_scale' = 0.5.*does not know"),
        ({"norm_type": "layernorm"}, "norm_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 7}, "32 query heads.*7 key/value heads"),
        ({"hidden_size": "big"}, "config.json"),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="(?s)" + says):
        mapped(tmp_path, **changes)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        config_from_hf(tmp_path)
    for text, says in (("{", "cannot be read as JSON"), ("[]", "list where an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            config_from_hf(tmp_path)
