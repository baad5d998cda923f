"""SAEs as libraries save them: SAELens (and ours, which is SAELens' layout), dictionary_learning, sparsify.

Each reader takes what was found and gives the one form of ``sae_form``, with the scales and biases of its layout named
in the config and not folded yet. docs/saes.md has the table.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from checkpoints_convert.sae_files import Found
from checkpoints_convert.sae_releases import canonical_site, layer_in_name, site_and_model
from jaxsteer.files.sae_form import Dictionary, Matrix, SAEConfig, canonical, unit_decoder

log = logging.getLogger(__name__)

OURS = "jaxsteer.sae/1"
ARCHITECTURES = (
    "standard", "jumprelu", "gated", "topk", "abstopk", "matching_pursuit", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


# SAELens


def saelens(found: Found) -> Dictionary:
    """``cfg.json`` with ``sae_weights.safetensors``, of version 6 and before."""
    config = found.settings["cfg.json"]
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    if isinstance(metadata.get("jaxsteer"), dict):
        return _ours(found, metadata["jaxsteer"])
    old = "metadata" not in config
    if old:
        config = _modern(found, config)
        metadata = config
    architecture = str(config.get("architecture", "standard"))
    if architecture not in ARCHITECTURES:
        reason = " (it attends to earlier codes)" if architecture == "temporal" else ""
        found.refuse(f"its architecture is {architecture!r}{reason}; read are {', '.join(ARCHITECTURES)}")
    transcoder = architecture.endswith("transcoder")
    norm, scale = _saelens_norm(found, config)
    activation: Any = {"standard": "relu", "transcoder": "relu", "skip_transcoder": "relu"}.get(
        architecture, "jumprelu" if transcoder else architecture
    )
    where = site_and_model(found, metadata.get("hook_name"), metadata.get("model_name"))
    out = metadata.get("hook_name_out")
    if out and canonical_site(out) != where["site_in"]:
        where["site_out"] = canonical_site(out)
    head = metadata.get("hook_head_index")
    notes = () if head is None else (f"trained on head {head} of its site alone",)
    selection: dict[str, Any] = {"k": found.asked.k or config.get("k")} if activation in ("topk", "abstopk") else {}
    if activation == "matching_pursuit":
        selection = {
            "residual_threshold": float(config.get("residual_threshold", 1e-2)),
            "max_steps": config.get("max_iterations"),
            "stop_on_same_support": bool(config.get("stop_on_duplicate_support", True)),
        }
    d = Dictionary(
        config=SAEConfig(
            activation=activation,
            input_norm=norm,
            restore_norm=not transcoder,
            input_scale=scale,
            output_scale=scale,
            subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)) and not transcoder,
            trained_with_bos=metadata.get("prepend_bos"),
            format="SAELens before 6" if old else "SAELens",
            notes=notes,
            **selection,
            **where,
        ),
        **_saelens_arrays(found, activation),
    )
    if config.get("rescale_acts_by_decoder_norm") and activation in ("topk", "abstopk"):
        d = unit_decoder(canonical(d), selects_by_norm=True)
    return d


def _saelens_arrays(found: Found, activation: str) -> dict[str, Any]:
    """Arrays by their names in ``Dictionary``."""
    W_dec = Matrix(found.tensor("W_dec"))
    arrays: dict[str, Any] = {"W_dec": W_dec, "b_dec": found.vector("b_dec")}
    if activation == "matching_pursuit":
        return arrays | {"W_enc": Matrix(W_dec.stored, transposed=True), "b_enc": np.zeros(W_dec.shape[0])}
    arrays["W_enc"] = Matrix(found.tensor("W_enc"))
    if activation == "gated":
        mag = {"b_mag": found.vector("b_mag"), "mag_scale": np.exp(found.vector("r_mag"))}
        arrays |= {"b_enc": found.vector("b_gate"), **mag}
    else:
        arrays["b_enc"] = found.vector("b_enc")
    if activation == "jumprelu":
        arrays["threshold"] = found.vector("threshold")
    if "W_skip" in found.tensors:
        arrays["W_skip"] = Matrix(found.tensor("W_skip"), transposed=True)
    return arrays


def _saelens_norm(found: Found, config: dict[str, Any]) -> tuple[Any, float]:
    """(norm of rows, constant scale) of ``normalize_activations``."""
    rule = config.get("normalize_activations")
    rule = {None: "none", False: "none", "None": "none", True: "expected_average_only_in"}.get(rule, rule)
    if rule == "none":
        return "none", 1.0
    if rule in ("constant_norm_rescale", "layer_norm"):
        return ("constant_norm" if rule == "constant_norm_rescale" else rule), 1.0
    if rule == "expected_average_only_in":
        if found.asked.norm_scaling_factor is None:
            found.ask(
                "norm_scaling_factor",
                "by which factor its inputs were scaled (normalize_activations is 'expected_average_only_in'; the "
                "factor is in SAELens' catalogue of releases)",
                "0.31",
            )
        return "none", found.asked.norm_scaling_factor
    found.refuse(f"its normalize_activations is {rule!r}, which is folded into the weights when SAELens saves a file")


def _modern(found: Found, config: dict[str, Any]) -> dict[str, Any]:
    """A config of SAELens before 6 in the names of 6, with the defaults of then."""
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    config.setdefault("prepend_bos", True)
    if config.get("activation_fn") == "topk":
        config["architecture"] = "topk"
        config["k"] = (config.get("activation_fn_kwargs") or {}).get("k", config.get("k"))
    factor = found.tensors.get("scaling_factor")
    if factor is not None and not np.all(factor.astype(np.float64) == 1.0):
        found.refuse(
            "its scaling_factor is not all ones: it was fine-tuned (finetuning_scaling_factor), which is not read"
        )
    return config


def _ours(found: Found, record: dict[str, Any]) -> Dictionary:
    """What ``checkpoints_convert.sae.write_sae`` wrote: SAELens' arrays, and our whole config in the metadata."""
    if record.get("format") != OURS:
        found.refuse(f"its record is of the format {record.get('format')!r}, and this version reads {OURS!r}")
    try:
        config = SAEConfig.from_json(record["config"])
    except (KeyError, TypeError) as error:
        found.refuse(f"its record is damaged ({error})")
    d = Dictionary(config=config, **_saelens_arrays(found, config.activation))
    where = site_and_model(found, config.site_in, config.model)
    return d.replace(**where)


# dictionary_learning

_CLASSES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "threshold", "MatryoshkaBatchTopKSAE": "threshold", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip


def dictionary_learning(found: Found) -> Dictionary:
    """``ae.pt`` with ``config.json``: every ``dict_class``. Input scales are folded when the library saves."""
    trainer = found.settings["config.json"]["trainer"]
    kind = str(trainer.get("dict_class"))
    if kind not in _CLASSES:
        found.refuse(f"its dict_class is {kind!r}; read are {', '.join(_CLASSES)}")
    layer = trainer.get("layer")
    site = layer_in_name(found, r"resid_post_layer_(\d+)")
    if site is None and isinstance(layer, int) and str(trainer.get("submodule_name", "resid_post")).startswith("resid"):
        site = f"blocks.{layer}.hook_resid_post"
    where = site_and_model(found, site, trainer.get("lm_name"))
    arrays = _dl_arrays(found, kind)
    f = len(arrays["b_enc"])
    activation, extra, note = _dl_activation(found, kind, f)
    if extra.get("threshold") is not None:
        arrays["threshold"] = extra.pop("threshold")
    extra.pop("threshold", None)
    subtract = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder") or bool(trainer.get("apply_b_dec_to_input"))
    d = Dictionary(
        config=SAEConfig(
            activation=activation, subtract_b_dec=subtract, format="dictionary_learning", notes=note, **extra, **where
        ),
        **arrays,
    )
    return unit_decoder(canonical(d)) if kind == "AutoEncoder" else d  # as the library's own loader does


def _dl_arrays(found: Found, kind: str) -> dict[str, Any]:
    """Arrays by their names in ``Dictionary``."""
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        arrays: dict[str, Any] = {name: Matrix(found.tensor(name)) for name in ("W_enc", "W_dec")}
        return arrays | {name: found.vector(name) for name in ("b_enc", "b_dec")}
    arrays = {
        "W_enc": Matrix(found.tensor("encoder.weight"), transposed=True),
        "W_dec": Matrix(found.tensor("decoder.weight"), transposed=True),
    }
    if kind == "GatedAutoEncoder":
        vectors = {"b_enc": "gate_bias", "b_dec": "decoder_bias", "b_mag": "mag_bias"}
        arrays["mag_scale"] = np.exp(found.vector("r_mag"))
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        vectors = {"b_enc": "encoder.bias", "b_dec": bias}
    return arrays | {name: found.vector(stored) for name, stored in vectors.items()}


def _dl_activation(found: Found, kind: str, latents: int) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """(activation, k or threshold, notes)."""
    rule = _CLASSES[kind]
    if rule == "jumprelu":
        return "jumprelu", {"threshold": found.vector("threshold")}, ()
    if rule not in ("topk", "threshold"):
        return rule, {}, ()
    threshold = found.scalar("threshold") if "threshold" in found.tensors else -1.0
    if threshold >= 0 and (rule == "threshold" or found.asked.use_threshold):
        return "jumprelu", {"threshold": np.full(latents, threshold)}, ()
    if found.asked.use_threshold:
        found.refuse("it has no threshold: its training never fitted one")
    k = found.asked.k or int(found.scalar("k"))
    if rule == "topk":
        return "topk", {"k": k}, ()
    note = f"its threshold was never fitted ({threshold:g}): every row keeps its own {k} largest latents instead"
    log.warning("the SAE %s: %s", found.origin, note)
    return "topk", {"k": k}, (note,)


# sparsify


def sparsify(found: Found) -> Dictionary:
    """``cfg.json`` with ``sae.safetensors``: topk or groupmax, also as a transcoder and with a skip connection."""
    config = found.settings.get("cfg.json", {})
    if config.get("signed"):
        found.refuse("it is 'signed' (an older option of sparsify), which is not read")
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        found.refuse(f"its activation is {activation!r}; known are topk and groupmax")
    k = found.asked.k or config.get("k")
    if k is None:
        found.ask("k", "how many latents are active at once", "32")
    transcode = bool(config.get("transcode"))
    layer, mlp = found.in_name(r"layers\.(\d+)"), found.in_name(r"layers\.\d+(\.mlp)(?:/|$)")
    site, site_out = None, None
    if found.in_name(r"(?:^|[/:])(?:model\.)?(embed_tokens)(?:/|$)"):
        site = "hook_embed"
    elif layer is not None and mlp:
        site = f"blocks.{layer}.mlp.hook_in" if transcode else f"blocks.{layer}.hook_mlp_out"
        site_out = f"blocks.{layer}.hook_mlp_out" if transcode else None
    elif layer is not None and found.in_name(r"(layers\.\d+)(?:/|$)"):
        site = f"blocks.{layer}.hook_resid_post"
    where = site_and_model(found, site, found.settings.get("../config.json", {}).get("model"))
    skip = found.tensors.get("W_skip")
    return Dictionary(
        config=SAEConfig(
            activation=activation,
            k=int(k),
            subtract_b_dec=not transcode,
            format="sparsify",
            site_out=site_out,
            **where,
        ),
        W_enc=Matrix(found.tensor("encoder.weight"), transposed=True),
        W_dec=Matrix(found.tensor("W_dec")),
        b_enc=found.vector("encoder.bias"),
        b_dec=found.vector("b_dec"),
        W_skip=None if skip is None else Matrix(skip, transposed=True),
    )
