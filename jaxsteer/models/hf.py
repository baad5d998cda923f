"""Hugging Face configurations mapped onto ``ModelConfig``, strictly.

A field that changes the numbers and is not supported at its value is refused by name; so is a field nobody here has
heard of. Silently dropped fields (RoPE scaling, biases, windows) are the classic way to a model that is almost right.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope

HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps
    tie_word_embeddings rope_parameters rope_scaling rope_theta
    initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    use_bfloat16 tf_legacy_loss tokenizer_class prefix task_specific_params problem_type finetuning_task
    id2label label2id num_labels is_decoder cross_attention_hidden_size gradient_checkpointing
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    unsloth_fixed unsloth_version
    """.split()
)
"""Fields that the mappings read, and fields about training, generation or bookkeeping that no number depends on."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "pretraining_tp": (0, 1),
    "quantization_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "attn_output_gate": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, []),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "auto_map": (),
}
"""Fields that change the numbers and are supported at these values only (and when absent or null)."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_NEUTRAL = {"partial_rotary_factor": (1, 1.0), "attention_factor": (1, 1.0), "attention_scaling": (1, 1.0)}
# Written by transformers for every type; a number only where _ROPE_KEYS says so.
_ROPE_IGNORED = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import transformers inside this, or it warns that PyTorch is missing, which is as it should be."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def auto_config(directory: Path) -> Any:
    """Transformers' config object of a directory, which upgrades old keys and knows each family's defaults."""
    with quiet_transformers():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``UserError`` names the file when it is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}. A Hugging Face model directory needs one.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Download or write the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object was expected.")
    return value


def config_from_hf(directory: str | os.PathLike[str]) -> ModelConfig:
    """The ``ModelConfig`` of a Hugging Face model directory, read from its config.json.

    Raises ``UserError`` for a family, an architecture, a RoPE type or a field that is not supported, by name.
    """
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    _check_family(raw, directory)
    _check_fields(raw, directory)
    _check_rope(raw.get("rope_scaling"), directory)
    _check_rope(raw.get("rope_parameters"), directory)
    try:
        config = auto_config(directory)
    except Exception as error:  # transformers validates with many exception types; all mean a bad config.json
        raise UserError(f"{directory}/config.json is not a valid {raw['model_type']} configuration: {error}") from error
    _check_fields(config.to_dict(), directory)
    try:
        return FAMILIES[raw["model_type"]][1](config, directory)
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{directory}/config.json describes no possible model: {error}") from error


def _check_family(raw: dict[str, Any], directory: Path) -> None:
    supported = "; ".join(f"{name} ({', '.join(archs)})" for name, (archs, _) in FAMILIES.items())
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    if model_type not in FAMILIES:
        given = f"model_type {model_type!r}" if model_type else "no model_type"
        named = f" and architectures {architectures}" if architectures else ""
        raise UserError(f"{directory}/config.json has {given}{named}, which is not supported. Supported: {supported}.")
    accepted = FAMILIES[model_type][0]
    # A missing list is accepted: the tensor names decide, and every tensor must be accounted for.
    if architectures and architectures[0] not in accepted:
        raise UserError(
            f"{directory}/config.json has architecture {architectures[0]!r}, which is not supported for model_type "
            f"{model_type!r}: it must be {' or '.join(accepted)}. Supported: {supported}."
        )


def _check_fields(fields: dict[str, Any], directory: Path) -> None:
    for name, value in fields.items():
        if value is None or name.startswith("_") or name in HARMLESS:
            continue
        allowed = NEUTRAL.get(name)
        if allowed is None:
            raise UserError(
                f"{directory}/config.json has the field {name!r} = {value!r}, which jaxsteer does not know, so the "
                f"model might compute something else than the checkpoint means. Remove the field if it changes no "
                f"number; otherwise this model is not supported."
            )
        if not any(type(value) is type(good) and value == good for good in allowed):
            wanted = " or ".join(repr(good) for good in allowed) or "absent or null"
            raise UserError(
                f"{directory}/config.json has {name!r} = {value!r}, which changes the numbers and is not supported: "
                f"it must be {wanted}."
            )


def _check_rope(rope: Any, directory: Path) -> None:
    """Refuse a rope type or a rope field that is not supported."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise UserError(f"{directory}/config.json: the RoPE settings must be an object or null, got {rope!r}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"{directory}/config.json has rope type {kind!r}, which is not supported. Supported: "
            f"{', '.join(_ROPE_KEYS)}."
        )
    missing = [key for key in _ROPE_KEYS[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"{directory}/config.json: rope type {kind!r} needs {', '.join(missing)}, which is missing.")
    for key, value in rope.items():
        neutral = value is None or value in _ROPE_NEUTRAL.get(key, ())
        if not neutral and key not in _ROPE_KEYS[kind] and key not in _ROPE_IGNORED:
            raise UserError(
                f"{directory}/config.json: rope type {kind!r} has the field {key!r} = {value!r}, which is not "
                f"supported."
            )


def rope_from_hf(parameters: dict[str, Any]) -> Rope:
    """One rotary table from transformers' ``rope_parameters`` (already checked)."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return Rope(theta=float(parameters["rope_theta"]))
    rope = Rope(theta=float(parameters["rope_theta"]), kind=kind, factor=float(parameters["factor"]))
    if kind == "linear":
        return rope
    return Rope(
        theta=rope.theta,
        kind="llama3",
        factor=rope.factor,
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=int(parameters["original_max_position_embeddings"]),
    )


def _llama(config: Any, directory: Path) -> ModelConfig:
    if config.hidden_act != "silu":
        raise UserError(f"{directory}/config.json has hidden_act {config.hidden_act!r}; Llama models have 'silu'.")
    _check_rope(config.rope_parameters, directory)
    d_head = config.head_dim or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        family="llama",
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        norm_eps=float(config.rms_norm_eps),
        query_scale=1.0 / math.sqrt(d_head),
        tied_embeddings=bool(config.tie_word_embeddings),
        windows=(GLOBAL_WINDOW,) * config.num_hidden_layers,
        ropes=(rope_from_hf(config.rope_parameters),),
        rope_index=(0,) * config.num_hidden_layers,
    )


FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[Any, Path], ModelConfig]]] = {
    "llama": (("LlamaForCausalLM",), _llama),
}
"""``model_type`` -> (architectures that are accepted, mapping of the transformers config)."""


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a Llama-shaped ``ModelConfig``: what ``config_from_hf`` maps back to the same config."""
    if config.family != "llama":
        raise UserError(f"Only the llama family can be written in Hugging Face format yet, not {config.family!r}.")
    rope = config.ropes[0]
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": parameters,
    }
