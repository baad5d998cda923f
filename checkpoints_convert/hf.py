"""Hugging Face configurations mapped onto ``ModelConfig``, strictly.

A field that changes the numbers and is not supported at its value is refused by name; so is a field nobody here has
heard of. Silently dropped fields (RoPE scaling, biases, windows) are the classic way to a model that is almost right.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from checkpoints_convert.families import FAMILIES, LAYER_TYPES, Family, rope_to_hf, shared_to_hf
from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.models.config import MAX_LAYERS, ModelConfig

HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype name_or_path is_llama_config loss_type
    initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop dropout mlp_dropout
    resid_dropout residual_dropout embedding_dropout hidden_dropout_prob attention_probs_dropout_prob
    classifier_dropout neftune_noise_alpha gradient_checkpointing use_cache cache_implementation
    attn_implementation use_flash_attn use_flash_attention use_flash_attention_2 flash_attn
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id unk_token_id
    bos_token eos_token pad_token unk_token add_bos_token add_eos_token padding_side truncation_side
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict torchscript
    use_bfloat16 tf_legacy_loss tokenizer_class prefix task_specific_params problem_type finetuning_task
    id2label label2id num_labels is_decoder cross_attention_hidden_size
    keys_to_ignore_at_inference ignore_keys_at_rope_validation base_model_tp_plan base_model_pp_plan
    max_sequence_length max_seq_len max_seq_length seq_length model_max_length
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind cache_config
    compile_config constraints continuous_batching_config disable_compile dola_layers encoder_repetition_penalty
    epsilon_cutoff eta_cutoff force_words_ids guidance_scale is_assistant low_memory max_cache_len
    max_matching_ngram_size max_new_tokens max_time min_new_tokens min_p num_assistant_tokens
    num_assistant_tokens_schedule output_logits penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
    renormalize_logits sequence_bias speculation_type stop_strings target_lookbehind token_healing top_h use_mtp
    watermarking_config
    """.split()
)
"""Fields about training, generation or bookkeeping that no number depends on."""
HARMLESS_PREFIXES = ("_", "transformers.js", "unsloth_")
"""And those that begin so."""

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
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "qk_layer_norms": (False,),
    "use_qkv_bias": (False,),
    "activation": ("swiglu",),
    "attn_logit_softcapping": (),
    "sliding_window": (),
    "auto_map": (),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
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


_SIZE = 2**31 - 1
_COUNTS = dict.fromkeys(
    """
    vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim max_position_embeddings
    sliding_window sliding_window_pattern original_max_position_embeddings n_embd n_head n_inner n_positions
    """.split(),
    _SIZE,
) | {"num_hidden_layers": MAX_LAYERS, "n_layer": MAX_LAYERS}
"""Fields that count something -> the largest count."""
_FACTORS = frozenset(
    """
    rms_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping
    factor low_freq_factor high_freq_factor layer_norm_epsilon
    """.split()
)


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


def config_from_hf(
    directory: str | os.PathLike[str], *, ignore_fields: Collection[str] = (), where: str | None = None
) -> ModelConfig:
    """The ``ModelConfig`` of a Hugging Face model directory, read from its config.json.

    ``ignore_fields`` are names of fields that are taken to change no number although jaxsteer does not know them.
    ``where`` names the file in errors, if its config.json was made of something else. Raises ``UserError`` for a
    family, an architecture, a RoPE type or a field that is not supported, by name, and for impossible numbers.
    """
    directory = Path(directory)
    where = where or f"{directory}/config.json"
    raw = read_json(directory / "config.json")
    family = _family(raw, where)
    if known := sorted(set(ignore_fields) & (family.reads | NEUTRAL.keys())):
        raise UserError(f"{known[0]!r} cannot be ignored: it changes the numbers of a {raw['model_type']} model.")
    _check(raw, family, where, ignore_fields)
    try:
        config = auto_config(directory)
    except Exception as error:  # transformers validates with many exception types; all mean a bad config.json
        raise UserError(
            f"{where} is not a valid {raw['model_type']} configuration: {' '.join(str(error).split())}"
        ) from error
    _check(config.to_dict(), family, where, ignore_fields)
    try:
        return family.from_hf(config, where)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where} describes no possible model: {error}") from error


def _family(raw: dict[str, Any], where: str) -> Family:
    supported = "; ".join(f"{name} ({', '.join(family.architectures)})" for name, family in FAMILIES.items())
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{where} has architectures {architectures!r}, where a list was expected.")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        given = f"model_type {model_type!r}" if model_type else "no model_type"
        named = f" and architectures {architectures}" if architectures else ""
        raise UserError(f"{where} has {given}{named}, which is not supported. Supported: {supported}.")
    accepted = FAMILIES[model_type].architectures
    # A missing list is accepted: the tensor names decide, and every tensor must be accounted for.
    if architectures and architectures[0] not in accepted:
        raise UserError(
            f"{where} has architecture {architectures[0]!r}, which is not supported for model_type {model_type!r}: it "
            f"must be {' or '.join(accepted)}. Supported: {supported}."
        )
    return FAMILIES[model_type]


def _check(fields: dict[str, Any], family: Family, where: str, ignore_fields: Collection[str] = ()) -> None:
    """Refuse what ``family`` does not know, by name; for a model of several parts, also inside its text part."""
    _check_fields({name: value for name, value in fields.items() if name not in ignore_fields}, family, where)
    _check_numbers(fields, where)
    if family.text is not None:
        text = fields.get("text_config")
        if not isinstance(text, dict) or text.get("model_type", family.text) != family.text:
            raise UserError(f"{where} must hold a text_config of model_type {family.text!r}.")
        return _check(text, FAMILIES[family.text], f"{where}, text_config,", ignore_fields)
    _check_rope(fields.get("rope_scaling"), where)
    rope = fields.get("rope_parameters")
    if family.rope_per_layer_type and isinstance(rope, dict):
        if extra := set(rope) - set(LAYER_TYPES):
            raise UserError(
                f"{where} has {sorted(extra)} in rope_parameters, which must hold one object for each of {LAYER_TYPES}."
            )
        for parameters in rope.values():
            _check_rope(parameters, where)
        return
    _check_rope(rope, where)


def _ignored(name: str, family: Family) -> bool:
    return name.startswith(HARMLESS_PREFIXES) or name in HARMLESS or name in family.unread


def stop_tokens(directory: Path) -> tuple[int, ...]:
    """The tokens that end an answer: of generation_config.json, or where it names none of config.json, as transformers.

    Raises ``UserError`` for a file that cannot be read, and for what is no token of the vocabulary (first tokens too).
    """
    names = [name for name in ("generation_config.json", "config.json") if (directory / name).is_file()]
    wholes = {name: read_json(directory / name) for name in names}
    both = [(name, part) for name, whole in wholes.items() for part in (whole, whole.get("text_config"))]
    parts = [(name, part) for name, part in both if isinstance(part, dict)]
    size = next((part["vocab_size"] for _, part in parts if type(part.get("vocab_size")) is int), _SIZE)
    stops: list[tuple[int, ...]] = []
    for name, part in parts:
        for field in ("bos_token_id", "eos_token_id"):
            if (ids := part.get(field)) is None:
                continue
            tokens = ids if isinstance(ids, list) else [ids]
            if not all(type(token) is int and 0 <= token < size for token in tokens):
                raise UserError(
                    f"{directory / name} has {field} {ids!r}, which are no ids of tokens: expected 0 to {size - 1}."
                )
            if field == "eos_token_id":
                stops.append(tuple(tokens))
    return stops[0] if stops else ()


def ignored_fields(raw: dict[str, Any], ignore_fields: Collection[str] = ()) -> list[str]:
    """Names of the fields of a config.json (of a supported family) that mapping it leaves aside, or was told to."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:  # beside a converted checkpoint may stand anything
        return []
    told = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
    given = [name for name, value in raw.items() if value is not None and name not in told]
    names = [name for name in given if name in ignore_fields or _ignored(name, family)]
    if family.text is not None:
        inside = {"model_type": family.text} | (raw.get("text_config") or {})
        names += [f"text_config.{name}" for name in ignored_fields(inside, ignore_fields)]
    return sorted(names)


def _check_fields(fields: dict[str, Any], family: Family, where: str) -> None:
    for name, value in fields.items():
        if value is None or name in family.reads or _ignored(name, family):
            continue
        allowed = NEUTRAL.get(name)
        if allowed is None:
            raise UserError(
                f"{where} has the field {name!r} = {value!r}, which jaxsteer does not know, so the "
                f"model might compute something else than the checkpoint means. If it changes no number, ignore it "
                f"(--ignore-field {name}, ignore_fields=[{name!r}]); otherwise this model is not supported."
            )
        if not any(type(value) is type(good) and value == good for good in allowed):
            wanted = " or ".join(repr(good) for good in allowed) or "absent or null"
            raise UserError(
                f"{where} has {name!r} = {value!r}, which changes the numbers and is not supported: "
                f"it must be {wanted}."
            )


def _check_numbers(fields: dict[str, Any], where: str) -> None:
    """Refuse sizes and factors that are no numbers, or that no model can have: before anything is built of them."""
    for name, value in fields.items():
        if value is None:
            continue
        if (most := _COUNTS.get(name)) and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"{where} has {name!r} = {value!r}, where a whole number from 1 to {most:,} was expected.")
        if name in _FACTORS and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise UserError(f"{where} has {name!r} = {value!r}, where a finite number above 0 was expected.")


def _check_rope(rope: Any, where: str) -> None:
    """Refuse a rope type or a rope field that is not supported."""
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise UserError(f"{where}: the RoPE settings must be an object or null, got {rope!r}.")
    _check_numbers(rope, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(f"{where} has rope type {kind!r}, which is not supported. Supported: {', '.join(_ROPE_KEYS)}.")
    missing = [key for key in _ROPE_KEYS[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"{where}: rope type {kind!r} needs {', '.join(missing)}, which is missing.")
    for key, value in rope.items():
        neutral = value is None or any(
            type(value) is type(good) and value == good for good in _ROPE_NEUTRAL.get(key, ())
        )
        if not neutral and key not in _ROPE_KEYS[kind] and key not in _ROPE_IGNORED:
            raise UserError(f"{where}: rope type {kind!r} has the field {key!r} = {value!r}, which is not supported.")


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model: what ``config_from_hf`` maps back to the same config.

    A Gemma 3 that was read from a multimodal checkpoint is written as the text model that it is here. Raises
    ``UserError`` for a config that its family's configuration cannot express.
    """
    model_type = "gemma3_text" if config.family == "gemma3" else config.family
    if model_type not in FAMILIES:
        raise UserError(f"Family {config.family!r} cannot be written. Supported: {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    fields: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": model_type,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        **({} if family.own_names else shared_to_hf(config)),
        "tie_word_embeddings": config.tied_embeddings,
        **({"rope_parameters": rope_to_hf(config.ropes[0])} if config.ropes else {}),
        **family.to_hf(config),
    }
    with quiet_transformers():
        from transformers import AutoConfig
    try:
        back = family.from_hf(AutoConfig.for_model(**copy.deepcopy(fields)), "config.json")
    except Exception as error:  # as in config_from_hf
        raise UserError(f"A {model_type} config.json cannot express this model: {error}") from error
    names = [field.name for field in dataclasses.fields(config) if field.name != "family"]
    if lost := [name for name in names if getattr(back, name) != getattr(config, name)]:
        raise UserError(f"A {model_type} config.json cannot express this model's {', '.join(lost)}.")
    return fields
