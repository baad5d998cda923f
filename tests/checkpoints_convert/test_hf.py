"""config.json mapped strictly: what is honoured, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedConfig

from checkpoints_convert.hf import (
    HARMLESS,
    NEUTRAL,
    auto_config,
    config_from_hf,
    config_to_hf,
    ignored_fields,
    stop_tokens,
)
from jaxsteer import UserError
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope
from jaxsteer.models.params import layer_shapes, top_shapes
from tests.helpers.checkpoints import FAMILIES, family_config

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
LLAMA_32_1B = LLAMA_31 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_31["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
QWEN_25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_2_27B = GEMMA_2_2B | {
    "_attn_implementation": "eager",
    "head_dim": 128,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "sliding_window_size": 4096,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
# Sparse: heads, vocabulary, epsilon, both thetas and the query scalar of 4B come from the class's defaults.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GEMMA_3_27B = GEMMA_3_4B | {
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
}
PUBLISHED = {
    "Llama-3.1-8B": (LLAMA_31, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA_32_1B, 1_235_814_400),
    "Qwen2.5-7B": (QWEN_25_7B, 7_615_616_512),
    "Qwen3-8B": (QWEN_3_8B, 8_190_735_360),
    "gemma-2-2b": (GEMMA_2_2B, 2_614_341_888),
    "gemma-2-27b": (GEMMA_2_27B, 27_227_128_320),
    "gemma-3-1b": (GEMMA_3_1B, 999_885_952),
    "gemma-3-4b": (GEMMA_3_4B, 3_880_263_168),
    "gemma-3-27b": (GEMMA_3_27B, 27_009_346_304),
}
"""config.json as published, and the parameters that the model then has (of Gemma 3 4B and 27B: in its text model)."""


def mapped(path: Path, base: dict[str, Any] = LLAMA_31, **changes: Any) -> ModelConfig:
    """The config of ``base`` with ``changes`` (``...`` removes a field; a dict changes the object inside)."""
    merged = {k: base[k] | v if k == "text_config" and isinstance(v, dict) else v for k, v in changes.items()}
    fields = {key: value for key, value in (base | merged).items() if value is not ...}
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_they_are_known_for(tmp_path: Path, name: str) -> None:
    fields, parameters = PUBLISHED[name]
    config = mapped(tmp_path, fields)
    per_layer = sum(math.prod(shape) for shape in layer_shapes(config).values())
    assert sum(math.prod(s) for s in top_shapes(config).values()) + config.n_layers * per_layer == parameters
    assert config.family == fields["model_type"]
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_llama_32(tmp_path: Path) -> None:
    config = mapped(tmp_path, LLAMA_32_1B)
    assert (config.d_head, config.n_kv_heads, config.tied_embeddings) == (64, 8, True)
    assert config.ropes[0].factor == 32.0


def test_qwen_25(tmp_path: Path) -> None:
    config = mapped(tmp_path, QWEN_25_7B)
    assert (config.n_heads, config.n_kv_heads, config.d_head, config.qkv_bias, config.qk_norm) == (
        28,
        4,
        128,
        True,
        False,
    )
    assert config.ropes == (Rope(theta=1e6),)
    assert config.windows == (GLOBAL_WINDOW,) * 28  # the file names a window, and says that it is not used
    sliding = mapped(tmp_path, QWEN_25_7B, use_sliding_window=True, max_window_layers=26)
    assert sliding.windows == (GLOBAL_WINDOW,) * 26 + (131072,) * 2


def test_qwen_3(tmp_path: Path) -> None:
    config = mapped(tmp_path, QWEN_3_8B)
    assert (config.d_head, config.qk_norm, config.qkv_bias, config.query_scale) == (
        128,
        True,
        False,
        1 / math.sqrt(128),
    )
    assert not config.windowed
    types = ["full_attention", "sliding_attention"] * 18
    sliding = mapped(tmp_path, QWEN_3_8B, use_sliding_window=True, sliding_window=64, layer_types=types)
    assert sliding.windows == (GLOBAL_WINDOW, 64) * 18  # layer_types counts, and max_window_layers does not


def test_gemma_2(tmp_path: Path) -> None:
    config = mapped(tmp_path, GEMMA_2_2B)
    assert config == ModelConfig(
        family="gemma2",
        vocab_size=256000,
        d_model=2304,
        n_layers=26,
        n_heads=8,
        n_kv_heads=4,
        d_head=256,
        d_mlp=9216,
        max_positions=8192,
        activation="gelu_tanh",
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norms=True,
        query_scale=256**-0.5,
        attn_softcap=50.0,
        final_softcap=30.0,
        embed_scale=True,
        tied_embeddings=True,  # the class's default: the file does not say
        windows=(4096, GLOBAL_WINDOW) * 13,
        ropes=(Rope(theta=1e4),),
        rope_index=(0,) * 26,
    )
    assert mapped(tmp_path, GEMMA_2_27B).query_scale == 144**-0.5
    assert mapped(tmp_path, GEMMA_2_2B, final_logit_softcapping=None).final_softcap is None


def test_gemma_3_text(tmp_path: Path) -> None:
    config = mapped(tmp_path, GEMMA_3_1B)
    pattern = ((512,) * 5 + (GLOBAL_WINDOW,)) * 4 + (512,) * 2
    assert config.windows == pattern
    assert [i for i, window in enumerate(pattern) if window == GLOBAL_WINDOW] == [5, 11, 17, 23]
    assert config.ropes == (Rope(theta=1e4), Rope(theta=1e6))
    assert config.rope_index == tuple(int(window == GLOBAL_WINDOW) for window in pattern)
    assert (config.qk_norm, config.post_norms, config.norm_plus_one, config.embed_scale) == (True,) * 4
    assert (config.attn_softcap, config.final_softcap, config.tied_embeddings) == (None, None, True)
    every_third = mapped(tmp_path, GEMMA_3_1B, sliding_window_pattern=3, num_hidden_layers=7)
    assert [window == GLOBAL_WINDOW for window in every_third.windows] == [False, False, True] * 2 + [False]


def test_gemma_3_with_a_vision_tower(tmp_path: Path) -> None:
    config = mapped(tmp_path, GEMMA_3_4B)
    assert (config.family, config.vocab_size, config.n_heads, config.n_kv_heads) == ("gemma3", 262208, 8, 4)
    assert (config.d_head, config.query_scale, config.norm_eps, config.tied_embeddings) == (256, 1 / 16, 1e-6, True)
    assert [i for i, window in enumerate(config.windows) if window == GLOBAL_WINDOW] == [5, 11, 17, 23, 29]
    assert set(config.windows) == {1024, GLOBAL_WINDOW}
    assert config.ropes == (Rope(theta=1e4), Rope(theta=1e6, kind="linear", factor=8.0))
    large = mapped(tmp_path, GEMMA_3_27B)
    assert (large.query_scale, large.d_head, large.n_kv_heads) == (168**-0.5, 128, 16)
    # the model as a whole says whether embeddings are tied, as transformers has it
    untied = mapped(tmp_path, GEMMA_3_4B, tie_word_embeddings=False)
    assert not untied.tied_embeddings


def test_new_keys_say_the_same_as_old_ones(tmp_path: Path) -> None:
    """What transformers 5 writes when it saves what it has read."""
    for fields, _ in PUBLISHED.values():
        old = mapped(tmp_path, fields)
        auto_config(tmp_path).save_pretrained(tmp_path / "new")
        assert "rope_theta" not in json.loads((tmp_path / "new" / "config.json").read_text())
        assert config_from_hf(tmp_path / "new") == old


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_is_written_is_read_back(tmp_path: Path, family: str) -> None:
    for config in (
        family_config(family),
        family_config(family, tied_embeddings=family == "llama", norm_eps=1e-4),
        family_config(family, n_layers=1, vocab_size=9),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
        assert config_from_hf(tmp_path) == config
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_text_model_of_a_multimodal_one_is_written(tmp_path: Path) -> None:
    config = mapped(tmp_path, GEMMA_3_4B)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert config_from_hf(tmp_path) == dataclasses.replace(config, family="gemma3_text")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (family_config("llama", windows=(6, 6, 6)), "llama config.json cannot express this model's windows"),
        (family_config("qwen2", attn_softcap=30.0), "attn_softcap"),
        (family_config("qwen3", qkv_bias=True), "qkv_bias"),
        (family_config("gemma2", query_scale=0.3), "query_scale"),
        (family_config("gemma2", windows=(6, 7, 6, 6, 6, 6, 6)), "windows"),
        (family_config("gemma3", attn_softcap=5.0), "attn_softcap"),
        (family_config("gemma3", rope_index=(1, 0, 0, 0, 0, 0, 0)), "rope_index"),
        (family_config("llama", family="mamba"), "'mamba' cannot be written"),
    ],
)
def test_what_cannot_be_written_is_named(config: ModelConfig, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config_to_hf(config)


def test_fields_that_are_left_aside_are_listed(tmp_path: Path) -> None:
    assert {"attention_dropout", "use_cache", "initializer_range"} <= set(ignored_fields(LLAMA_31))
    assert not {"rope_theta", "attention_bias", "pretraining_tp", "hidden_size"} & set(ignored_fields(LLAMA_31))
    assert {"hidden_act", "sliding_window_size", "_attn_implementation"} <= set(ignored_fields(GEMMA_2_27B))
    assert {"vision_config", "mm_tokens_per_image"} <= set(ignored_fields(GEMMA_3_4B))
    told = GEMMA_3_4B | {"text_config": {"use_cache": True, "head_dim": 256, "layer_types": None}}
    assert [name for name in ignored_fields(told) if "text_config" in name] == ["text_config.use_cache"]


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
        ({"hidden_size": "big"}, "'hidden_size' = 'big', where a whole number"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ({"architectures": "LlamaForCausalLM"}, "a list was expected"),
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' = 1000000000000, where a whole number from 1 to 10,000"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' = 0"),
        ({"num_hidden_layers": 2.0}, "'num_hidden_layers' = 2.0"),
        ({"vocab_size": True}, "'vocab_size' = True"),
        ({"head_dim": -64}, "'head_dim' = -64"),
        ({"max_position_embeddings": 2**31}, "'max_position_embeddings'"),
        ({"num_attention_heads": "32"}, "'num_attention_heads' = '32'"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps' = 0, where a finite number above 0"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' = '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "NaN is not a number of JSON"),
        ({"rope_theta": 0}, "'rope_theta' = 0"),
        ({"rope_theta": -10000.0}, "'rope_theta' = -10000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' = 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "'factor' = True"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2}}, r"rope type \['linear'\]"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "'rope_theta' = 0"),
        ({"rope_scaling": LLAMA_31["rope_scaling"] | {"high_freq_factor": 0.5}}, "high_freq_factor >= low_freq_factor"),
        ({"rope_scaling": LLAMA_31["rope_scaling"] | {"original_max_position_embeddings": 0}}, "'original_max"),
        ({"activation": "geglu"}, "'activation' = 'geglu'.*must be 'swiglu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"chunk_size_feed_forward": False}, "chunk_size_feed_forward"),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="(?s)" + says):
        mapped(tmp_path, **changes)


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        (QWEN_25_7B, {"use_mrope": True}, "use_mrope"),
        (QWEN_25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (QWEN_25_7B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (QWEN_3_8B, {"attention_bias": True}, "attention_bias"),
        (QWEN_3_8B, {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        (QWEN_3_8B, {"model_type": "qwen3_moe", "num_experts": 8}, "model_type 'qwen3_moe'"),
        (QWEN_3_8B, {"num_experts": 8}, "'num_experts' = 8"),
        (QWEN_3_8B, {"layer_types": ["sliding_attention"] * 36}, "no sliding_window in force"),
        (QWEN_3_8B, {"layer_types": ["chunked_attention"] * 36}, "(chunked_attention|layer_types)"),
        (GEMMA_2_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_2_2B, {"hidden_activation": "gelu"}, "hidden_activation 'gelu'.*gelu_pytorch_tanh"),
        (GEMMA_2_2B, {"sliding_window": None}, "no sliding_window in force"),
        (GEMMA_2_2B, {"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
        (GEMMA_2_2B, {"layer_types": ["full_attention"] * 3}, "(windows|layer_types|layers)"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*absent or null"),
        (
            GEMMA_3_1B,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters.*sliding_attention",
        ),
        (GEMMA_3_1B, {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope type 'yarn'"),
        (GEMMA_3_1B, {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "beta": 2}}, "'beta' = 2"),
        (GEMMA_3_4B, {"hidden_size": 2560}, "'hidden_size' = 2560"),
        (GEMMA_3_4B, {"text_config": ...}, "text_config of model_type 'gemma3_text'"),
        (GEMMA_3_4B, {"text_config": {"model_type": "llama"}}, "text_config of model_type 'gemma3_text'"),
        (GEMMA_3_4B, {"text_config": {"logit_scale": 0.5}}, "text_config, has the field 'logit_scale' = 0.5"),
        (GEMMA_3_4B, {"text_config": {"attention_bias": True}}, "text_config, has 'attention_bias' = True"),
        (GEMMA_3_4B, {"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        (GEMMA_3_4B, {"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForConditionalGeneration"),
    ],
)
def test_refused_by_name_in_every_family(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match="(?s)" + says):
        mapped(tmp_path, base, **changes)


def test_bookkeeping_of_published_configs(tmp_path: Path) -> None:
    known = HARMLESS | {name for name, values in NEUTRAL.items() if values}
    missing = (GenerationConfig().to_dict() | PreTrainedConfig().to_dict()).keys() - known
    assert not [name for name in missing if not name.startswith("_")]
    plain = mapped(tmp_path, LLAMA_31)
    for fields in (
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},  # SmolLM2
        {"activation": "swiglu", "head_dim": 128},  # Falcon 3
        {"unsloth_fixed": True, "unsloth_version": "2024.9", "pad_token_id": 128004},
        {"max_sequence_length": 2048, "neftune_noise_alpha": 5.0, "use_flash_attn": True, "name_or_path": "x"},
        {"attn_implementation": "eager", "loss_type": "ForCausalLMLoss", "pad_token": "<pad>"},
        {"use_sliding_window": False, "keys_to_ignore_at_inference": ["past_key_values"], "qk_layer_norms": False},
        {"min_p": 0.1, "stop_strings": ["x"], "watermarking_config": None, "classifier_dropout": 0.1},
    ):
        assert mapped(tmp_path, LLAMA_31, **fields) == plain


def test_a_field_may_be_ignored_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--ignore-field logit_scale, ignore_fields=\['logit_scale'\]"):
        mapped(tmp_path, LLAMA_31, logit_scale=0.5)
    assert config_from_hf(tmp_path, ignore_fields=["logit_scale"]) == mapped(tmp_path, LLAMA_31)
    assert ignored_fields(LLAMA_31 | {"logit_scale": 1}, ["logit_scale"]).count("logit_scale") == 1
    inside = {"text_config": GEMMA_3_4B["text_config"] | {"logit_scale": 0.5}}
    with pytest.raises(UserError, match="text_config, has the field 'logit_scale'"):
        mapped(tmp_path, GEMMA_3_4B, **inside)
    assert config_from_hf(tmp_path, ignore_fields=["logit_scale"]) == mapped(tmp_path, GEMMA_3_4B)
    mapped(tmp_path, LLAMA_31)
    for name in ("attention_bias", "rope_theta"):
        with pytest.raises(UserError, match=f"'{name}' cannot be ignored"):
            config_from_hf(tmp_path, ignore_fields=[name])


@pytest.mark.parametrize(
    ("generation", "config", "tokens"),
    [
        (None, {"eos_token_id": [2, 5]}, (2, 5)),
        (None, {"eos_token_id": 2}, (2,)),
        (None, {"text_config": {"eos_token_id": [1, 106]}}, (1, 106)),
        (None, {"eos_token_id": 0, "text_config": {"eos_token_id": 1}}, (0,)),
        ({"eos_token_id": [3]}, {"eos_token_id": [2, 5]}, (3,)),
        ({"do_sample": True}, {"eos_token_id": [2, 5]}, (2, 5)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({"eos_token_id": []}, {"eos_token_id": 2}, ()),
    ],
)
def test_what_ends_an_answer(tmp_path: Path, generation: object, config: object, tokens: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path) == tokens


@pytest.mark.parametrize("ids", ["5", ["5"], 2.0, True, [True], {"a": 1}, [[2]], -1, 10**20, [None], 32, [0, 32]])
@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
def test_what_is_no_token(tmp_path: Path, field: str, ids: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32, "text_config": {field: ids}}))
    with pytest.raises(UserError, match=f"config.json has {field} .* no ids of tokens: expected 0 to 31"):
        stop_tokens(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 32}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({field: ids}))
    with pytest.raises(UserError, match=f"generation_config.json has {field} .* no ids of tokens"):
        stop_tokens(tmp_path)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json cannot be read: it does not exist"):
        config_from_hf(tmp_path)
    for text, says in (("{", "not JSON"), ("[]", "holds a list where a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            config_from_hf(tmp_path)
