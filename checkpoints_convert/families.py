"""The families: how each one's transformers configuration becomes a ``ModelConfig``, and the way back.

A further family is one mapping here, its entry in ``FAMILIES``, and its table of tensor names in
``checkpoints_convert.names``. What a mapping does not read is refused by ``checkpoints_convert.hf``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxsteer.errors import UserError
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope

COMMON = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_scaling rope_theta
    """.split()
)
"""Fields that the mapping of every text model reads. What a family reads beyond them stands in ``FAMILIES``."""

LAYER_TYPES = ("sliding_attention", "full_attention")
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _rope_from_hf(parameters: dict[str, Any]) -> Rope:
    """One rotary table from transformers' ``rope_parameters`` (already checked)."""
    kind = parameters.get("rope_type", "default")
    fields: dict[str, Any] = {"theta": float(parameters["rope_theta"]), "kind": kind}
    if kind != "default":
        fields["factor"] = float(parameters["factor"])
    if kind == "llama3":
        fields |= {name: float(parameters[name]) for name in ("low_freq_factor", "high_freq_factor")}
        fields["original_max_positions"] = int(parameters["original_max_position_embeddings"])
    return Rope(**fields)


def _sliding(config: Any, where: str) -> list[bool]:
    """Per layer, whether ``layer_types`` (authoritative; filled in by transformers where absent) says sliding."""
    types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    if unknown := set(types) - set(LAYER_TYPES):
        raise UserError(f"{where} has layer_types {sorted(unknown)}, which are not supported: only {LAYER_TYPES} are.")
    sliding = [kind == "sliding_attention" for kind in types]
    if any(sliding) and not config.sliding_window:
        raise UserError(f"{where} has sliding layers in layer_types but no sliding_window in force.")
    return sliding


def _text_model(config: Any, where: str, *, activation: str, **fields: Any) -> ModelConfig:
    """What all families share; ``fields`` are those of ``ModelConfig`` that a family sets otherwise."""
    name = "hidden_activation" if activation == "gelu_pytorch_tanh" else "hidden_act"
    if getattr(config, name) != activation:
        found = getattr(config, name)
        raise UserError(f"{where} has {name} {found!r}; {config.model_type} models have {activation!r}.")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sliding = _sliding(config, where)
    shared: dict[str, Any] = dict(
        family=config.model_type,
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        activation=ACTIVATIONS[activation],
        norm_eps=float(config.rms_norm_eps),
        query_scale=1.0 / math.sqrt(d_head),
        tied_embeddings=bool(config.tie_word_embeddings),
        windows=tuple(config.sliding_window if slides else GLOBAL_WINDOW for slides in sliding),
        rope_index=(0,) * config.num_hidden_layers,
    )
    if "ropes" not in fields:
        shared["ropes"] = (_rope_from_hf(config.rope_parameters),)
    return ModelConfig(**(shared | fields))


def _llama(config: Any, where: str) -> ModelConfig:
    return _text_model(config, where, activation="silu")


def _qwen2(config: Any, where: str) -> ModelConfig:
    return _text_model(config, where, activation="silu", qkv_bias=True)


def _qwen3(config: Any, where: str) -> ModelConfig:
    return _text_model(config, where, activation="silu", qk_norm=True)


def _gemma2(config: Any, where: str, **fields: Any) -> ModelConfig:
    return _text_model(
        config,
        where,
        activation="gelu_pytorch_tanh",
        norm_plus_one=True,
        post_norms=True,
        embed_scale=True,
        query_scale=config.query_pre_attn_scalar**-0.5,
        attn_softcap=config.attn_logit_softcapping,
        final_softcap=config.final_logit_softcapping,
        **fields,
    )


def _gemma3_text(config: Any, where: str, **fields: Any) -> ModelConfig:
    return _gemma2(
        config,
        where,
        qk_norm=True,
        ropes=tuple(_rope_from_hf(config.rope_parameters[kind]) for kind in LAYER_TYPES),
        rope_index=tuple(0 if slides else 1 for slides in _sliding(config, where)),
        **fields,
    )


def _gemma3(config: Any, where: str) -> ModelConfig:
    text = config.text_config
    if text.final_logit_softcapping is not None:  # transformers caps in Gemma3ForCausalLM, not in this class
        raise UserError(
            f"{where} has 'final_logit_softcapping' = {text.final_logit_softcapping!r} in text_config, which "
            f"{FAMILIES['gemma3'].architectures[0]} leaves out. Set it to null, or write the text model alone."
        )
    return _gemma3_text(text, where, family="gemma3", tied_embeddings=bool(config.tie_word_embeddings))


def _gpt2(config: Any, where: str) -> ModelConfig:
    if config.activation_function != "gelu_new":
        raise UserError(
            f"{where} has activation_function {config.activation_function!r}; gpt2 models have 'gelu_new' here."
        )
    d_head = config.n_embd // config.n_head
    if d_head * config.n_head != config.n_embd:
        raise UserError(f"{where} has n_embd {config.n_embd}, which {config.n_head} heads (n_head) cannot share.")
    return ModelConfig(
        family="gpt2",
        vocab_size=config.vocab_size,
        d_model=config.n_embd,
        n_layers=config.n_layer,
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        d_head=d_head,
        d_mlp=config.n_inner or 4 * config.n_embd,
        max_positions=config.n_positions,
        activation="gelu_tanh",
        gated_mlp=False,
        norm="layer",
        norm_eps=float(config.layer_norm_epsilon),
        qkv_bias=True,
        writer_bias=True,
        query_scale=1.0 / math.sqrt(d_head),
        tied_embeddings=bool(config.tie_word_embeddings),
        learned_positions=True,
        windows=(GLOBAL_WINDOW,) * config.n_layer,
        ropes=(),
        rope_index=(),
    )


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """One entry of ``rope_parameters``: the inverse of reading it."""
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    return parameters


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": min(config.windows) if config.windowed else None,
        "layer_types": [LAYER_TYPES[window == GLOBAL_WINDOW] for window in config.windows],
    }


def _plain_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _qwen_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": config.windowed, **_windows_to_hf(config)}


def _gemma_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
        **_windows_to_hf(config),
    }


def _gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
    ropes = {kind: rope_to_hf(rope) for kind, rope in zip(LAYER_TYPES, config.ropes, strict=True)}
    return _gemma_to_hf(config) | {"rope_parameters": ropes, "attn_logit_softcapping": None}


def _gpt2_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
    }


def shared_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields that all families but GPT-2 have by these names."""
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
    }


class Family(NamedTuple):
    """How the configurations of one ``model_type`` are read and written."""

    architectures: tuple[str, ...]
    """Those that are accepted; the first one is written."""
    reads: frozenset[str]
    """Every field that ``from_hf`` honours."""
    unread: frozenset[str]
    """Fields of its files that look like numbers of the model, and that transformers never looks at either."""
    from_hf: Callable[[Any, str], ModelConfig]
    """Transformers' config object and the name of its file -> ``ModelConfig``."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """The fields of config.json beyond those that all families have, and ``shared_to_hf``."""
    rope_per_layer_type: bool = False
    """Whether ``rope_parameters`` holds an object for each of ``LAYER_TYPES``."""
    text: str | None = None
    """For a model of several parts: the ``model_type`` of its ``text_config``, whose fields count."""
    own_names: bool = False
    """Whether ``to_hf`` gives the fields of ``shared_to_hf`` by names of its own."""


_SILU = COMMON | {"hidden_act"}
_QWEN = _SILU | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_GEMMA3 = COMMON | {
    "hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping",
    "sliding_window", "sliding_window_pattern", "layer_types", "rope_local_base_freq",
}  # fmt: skip
# transformers' Gemma 3 attention never caps, so that what a checkpoint with this field means is unknown there.
_GEMMA2 = _GEMMA3 - {"sliding_window_pattern", "rope_local_base_freq"} | {"attn_logit_softcapping"}
_GEMMA_UNREAD = frozenset({"hidden_act", "sliding_window_size"})
_VISION = frozenset(
    """
    vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id
    image_token_id
    """.split()
)
_GPT2 = frozenset(
    """
    vocab_size n_embd n_layer n_head n_inner n_positions layer_norm_epsilon activation_function tie_word_embeddings
    """.split()
)
_GPT2_UNREAD = frozenset(
    "n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout".split()
)
_NONE: frozenset[str] = frozenset()

FAMILIES: dict[str, Family] = {
    "llama": Family(("LlamaForCausalLM",), _SILU, _NONE, _llama, _plain_to_hf),
    "qwen2": Family(("Qwen2ForCausalLM",), _QWEN, _NONE, _qwen2, _qwen_to_hf),
    "qwen3": Family(("Qwen3ForCausalLM",), _QWEN, _NONE, _qwen3, _qwen_to_hf),
    "gemma2": Family(("Gemma2ForCausalLM",), _GEMMA2, _GEMMA_UNREAD, _gemma2, _gemma_to_hf),
    "gemma3_text": Family(
        ("Gemma3ForCausalLM",), _GEMMA3, _GEMMA_UNREAD, _gemma3_text, _gemma3_to_hf, rope_per_layer_type=True
    ),
    "gemma3": Family(
        ("Gemma3ForConditionalGeneration",),
        frozenset({"text_config", "tie_word_embeddings"}),
        _VISION,
        _gemma3,
        _gemma3_to_hf,
        text="gemma3_text",
    ),
    "gpt2": Family(("GPT2LMHeadModel",), _GPT2, _GPT2_UNREAD, _gpt2, _gpt2_to_hf, own_names=True),
}
"""``model_type`` -> how it is read and written."""
