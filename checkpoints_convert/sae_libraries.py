"""SAEs as libraries save them: SAELens (and ours, which is SAELens' layout), dictionary_learning, sparsify.

Each reader takes what was found and gives the one form of ``sae_form``, with the scales and biases of its layout named
in the config and not folded yet. docs/saes.md has the table.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from checkpoints_convert.sae_files import SAEFiles
from checkpoints_convert.sae_releases import canonical_site, layer_in_name, site_and_model
from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import Dictionary, Matrix, SAEConfig, canonical, unit_decoder

log = logging.getLogger(__name__)

OURS = "jaxsteer.sae/1"
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Of checkpoints of training; what SAELens saves at its end is "jumprelu"."""
ARCHITECTURES = (
    "standard", "jumprelu", "gated", "topk", "abstopk", "matching_pursuit", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder", *BATCH_TOPK,
)  # fmt: skip
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


# SAELens


def saelens(found: SAEFiles) -> Dictionary:
    """``cfg.json`` with ``sae_weights.safetensors``, of version 6 and before, also of checkpoints of training."""
    config = found.settings["cfg.json"]
    metadata = found.said(config, "metadata", dict, {})
    if isinstance(metadata.get("jaxsteer"), dict):
        return _ours(found, metadata["jaxsteer"])
    old = "metadata" not in config
    if old:
        config = _modern(found, config)
        metadata = config
    architecture = found.said(config, "architecture", str, "standard")
    if architecture not in ARCHITECTURES:
        if architecture == "temporal":
            found.refuse(
                "its architecture is 'temporal': it attends to earlier tokens: its latents are those of a whole text, "
                "and here every state is encoded by itself. Take another SAE of this site"
            )
        found.refuse(f"its architecture is {architecture!r}; read are {', '.join(ARCHITECTURES)}")
    _check_activation(found, found.settings["cfg.json"], architecture)
    transcoder = architecture.endswith("transcoder")
    norm, scale = _saelens_norm(found, config)
    activation: Any = {"standard": "relu", "transcoder": "relu", "skip_transcoder": "relu"}.get(
        architecture, "jumprelu" if transcoder else architecture
    )
    where = site_and_model(found, found.said(metadata, "hook_name", str), found.said(metadata, "model_name", str))
    out = found.said(metadata, "hook_name_out", str)
    if out and canonical_site(out) != where["site_in"]:
        where["site_out"] = canonical_site(out)
    head = metadata.get("hook_head_index")
    notes: tuple[str, ...] = () if head is None else (f"trained on head {head} of its site alone",)
    selection: dict[str, Any] = {}
    if activation in ("topk", "abstopk"):
        selection["k"] = _saelens_k(found, config)
    if activation == "matching_pursuit":
        selection = {
            "residual_threshold": found.said(config, "residual_threshold", float, 1e-2),
            "max_steps": found.said(config, "max_iterations", int),
            "stop_on_same_support": found.said(config, "stop_on_duplicate_support", bool, True),
        }
    arrays = _saelens_arrays(found, activation)
    by_norm = found.said(config, "rescale_acts_by_decoder_norm", bool, False)
    if architecture in BATCH_TOPK:
        activation, selection, note = _saelens_batch_topk(found, config, arrays, by_norm)
        notes += note
    d = Dictionary(
        config=SAEConfig(
            activation=activation,
            input_norm=norm,
            restore_norm=not transcoder,
            input_scale=scale,
            output_scale=scale,
            subtract_b_dec=found.said(config, "apply_b_dec_to_input", bool, True) and not transcoder,
            trained_with_bos=found.said(metadata, "prepend_bos", bool),
            format="SAELens before 6" if old else "SAELens",
            notes=notes,
            **selection,
            **where,
        ),
        **arrays,
    )
    if by_norm and architecture in ("topk", "abstopk", *BATCH_TOPK):
        d = unit_decoder(canonical(d), selects_by_norm=True)
    return d


def _check_activation(found: SAEFiles, config: dict[str, Any], architecture: str) -> None:
    """Refuse activations of SAELens before 6 that are called otherwise than what is computed here."""
    for name in ("activation_fn", "activation_fn_str"):
        said = config.get(name)
        if said not in (None, "relu") and not (said == "topk" and architecture == "topk"):
            found.refuse(f"its {name} is {said!r}, and an SAE of the architecture {architecture!r} is read with relu")


def _saelens_k(found: SAEFiles, config: dict[str, Any]) -> int:
    k = found.overrides.k or found.said(config, "k", int)
    return k or found.ask("k", "how many latents are active at once", "32")


def _saelens_batch_topk(
    found: SAEFiles, config: dict[str, Any], arrays: dict[str, Any], by_norm: bool
) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """(activation, k, notes) of a checkpoint of training; what its threshold means is put into ``arrays``.

    The threshold is compared with p_j |W_dec[j]| where ``rescale_acts_by_decoder_norm`` says so, else with p_j.
    """
    threshold = found.scalar("topk_threshold") if "topk_threshold" in found.tensors else 0.0
    if threshold > 0:
        norms = arrays["W_dec"].row_norms() if by_norm else np.ones(arrays["W_dec"].shape[0])
        arrays["threshold"] = np.divide(threshold, norms, out=np.full_like(norms, np.inf), where=norms > 0)
        return "jumprelu", {}, ()
    k = found.overrides.k or round(found.said(config, "k", float, 0.0))
    if not k:
        found.ask("k", "how many latents are active at once, and has no threshold yet", "32")
    note = f"its threshold was never fitted: every row keeps its own {k} largest latents instead"
    log.warning("the SAE %s: %s", found.origin, note)
    return "topk", {"k": k}, (note,)


def _saelens_arrays(found: SAEFiles, activation: str) -> dict[str, Any]:
    """Arrays by their names in ``Dictionary``."""
    W_dec = found.matrix("W_dec")
    arrays: dict[str, Any] = {"W_dec": W_dec, "b_dec": found.vector("b_dec")}
    if activation == "matching_pursuit":
        return arrays | {"W_enc": Matrix(W_dec.stored, transposed=True), "b_enc": np.zeros(W_dec.shape[0])}
    arrays["W_enc"] = found.matrix("W_enc")
    if activation == "gated":
        mag = {"b_mag": found.vector("b_mag"), "mag_scale": _exp(found.vector("r_mag"))}
        arrays |= {"b_enc": found.vector("b_gate"), **mag}
    else:
        arrays["b_enc"] = found.vector("b_enc")
    if activation == "jumprelu":
        training = "threshold" not in found.tensors and "log_threshold" in found.tensors
        arrays["threshold"] = _exp(found.vector("log_threshold")) if training else found.vector("threshold")
    if "W_skip" in found.tensors:
        arrays["W_skip"] = found.matrix("W_skip", transposed=True)
    return arrays


def _exp(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(values)  # where it is infinite, ``Dictionary`` says so


def _saelens_norm(found: SAEFiles, config: dict[str, Any]) -> tuple[Any, float]:
    """(norm of rows, constant scale) of ``normalize_activations``."""
    rule = config.get("normalize_activations")
    if rule is None or rule is False or rule in ("none", "None"):
        return "none", 1.0
    if rule in ("constant_norm_rescale", "layer_norm"):
        return ("constant_norm" if rule == "constant_norm_rescale" else rule), 1.0
    if rule is True or rule == "expected_average_only_in":
        scale = found.overrides.norm_scaling_factor  # a checkpoint of training has it beside the weights
        scale = scale or found.said(found.settings.get("activation_scaler.json", {}), "scaling_factor", float)
        if scale is None:
            found.ask(
                "norm_scaling_factor",
                "by which factor its inputs were scaled (normalize_activations is 'expected_average_only_in'; the "
                "factor is in SAELens' catalogue of releases)",
                "0.31",
            )
        return "none", scale
    found.refuse(f"its normalize_activations is {rule!r}, which is folded into the weights when SAELens saves a file")


def _modern(found: SAEFiles, config: dict[str, Any]) -> dict[str, Any]:
    """A config of SAELens before 6 in the names of 6, with the defaults of then."""
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    config.setdefault("prepend_bos", True)
    if config.get("activation_fn") == "topk":
        config["architecture"] = "topk"
        config["k"] = found.said(config, "activation_fn_kwargs", dict, {}).get("k", config.get("k"))
    factor = found.tensors.get("scaling_factor")
    if factor is not None and not np.all(factor.astype(np.float64) == 1.0):
        found.refuse(
            "its scaling_factor is not all ones: it was fine-tuned (finetuning_scaling_factor), which is not read"
        )
    return config


def _ours(found: SAEFiles, record: dict[str, Any]) -> Dictionary:
    """What ``checkpoints_convert.sae.write_sae`` wrote: SAELens' arrays, and our whole config in the metadata."""
    if record.get("format") != OURS:
        found.refuse(f"its record is of the format {record.get('format')!r}, and this version reads {OURS!r}")
    stored = found.said(record, "config", dict, {})
    if unknown := sorted(stored.keys() - {field.name for field in dataclasses.fields(SAEConfig)}):
        found.refuse(f"its record has {', '.join(unknown)}: it is damaged, or a later version of jaxsteer wrote it")
    try:
        config = SAEConfig.from_json(stored)
    except UserError as error:
        found.refuse(f"its record is damaged ({error})")
    d = Dictionary(config=config, **_saelens_arrays(found, config.activation))
    where = site_and_model(found, config.site_in, config.model)
    return d.replace(**where)


# dictionary_learning

_CLASSES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "threshold", "MatryoshkaBatchTopKSAE": "threshold", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip


def dictionary_learning(found: SAEFiles) -> Dictionary:
    """``ae.pt`` with ``config.json``: every ``dict_class``. Input scales are folded when the library saves."""
    trainer = found.settings["config.json"]["trainer"]
    kind = found.said(trainer, "dict_class", str, "")
    if kind not in _CLASSES:
        found.refuse(f"its dict_class is {kind!r}; read are {', '.join(_CLASSES)}")
    layer = found.said(trainer, "layer", int)
    site = layer_in_name(found, r"resid_post_layer_(\d+)")
    if site is None and layer is not None and found.said(trainer, "submodule_name", str, "resid").startswith("resid"):
        site = f"blocks.{layer}.hook_resid_post"
    where = site_and_model(found, site, found.said(trainer, "lm_name", str))
    arrays = _dl_arrays(found, kind)
    activation, extra, note = _dl_activation(found, kind, trainer, len(arrays["b_enc"]))
    subtract = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    d = Dictionary(
        config=SAEConfig(
            activation=activation,
            subtract_b_dec=subtract or found.said(trainer, "apply_b_dec_to_input", bool, False),
            format="dictionary_learning",
            notes=note,
            k=extra.pop("k", None),
            **where,
        ),
        **arrays,
        **extra,
    )
    if kind == "AutoEncoder" and found.overrides.unit_decoder is not False:  # as the library's own loader does
        d = unit_decoder(canonical(d))
    return d


def _dl_arrays(found: SAEFiles, kind: str) -> dict[str, Any]:
    """Arrays by their names in ``Dictionary``."""
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        arrays: dict[str, Any] = {name: found.matrix(name) for name in ("W_enc", "W_dec")}
        return arrays | {name: found.vector(name) for name in ("b_enc", "b_dec")}
    arrays = {
        "W_enc": found.matrix("encoder.weight", transposed=True),
        "W_dec": found.matrix("decoder.weight", transposed=True),
    }
    if kind == "GatedAutoEncoder":
        vectors = {"b_enc": "gate_bias", "b_dec": "decoder_bias", "b_mag": "mag_bias"}
        arrays["mag_scale"] = _exp(found.vector("r_mag"))
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        vectors = {"b_enc": "encoder.bias", "b_dec": bias}
    return arrays | {name: found.vector(stored) for name, stored in vectors.items()}


def _dl_activation(
    found: SAEFiles, kind: str, trainer: dict[str, Any], latents: int
) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """(activation, k or threshold, notes)."""
    rule = _CLASSES[kind]
    if rule == "jumprelu":
        return "jumprelu", {"threshold": found.vector("threshold")}, ()
    if rule not in ("topk", "threshold"):
        return rule, {}, ()
    threshold = found.scalar("threshold") if "threshold" in found.tensors else -1.0
    if threshold >= 0 and (rule == "threshold" or found.overrides.use_threshold):
        return "jumprelu", {"threshold": np.full(latents, threshold)}, ()
    if found.overrides.use_threshold:
        found.refuse("it has no threshold: its training never fitted one")
    # Files of 2024 have k in config.json alone.
    k = found.overrides.k or (int(found.scalar("k")) if "k" in found.tensors else found.said(trainer, "k", int))
    if not k:
        found.ask("k", "how many latents are active at once", "32")
    if rule == "topk":
        return "topk", {"k": k}, ()
    note = f"its threshold was never fitted ({threshold:g}): every row keeps its own {k} largest latents instead"
    log.warning("the SAE %s: %s", found.origin, note)
    return "topk", {"k": k}, (note,)


# sparsify


def sparsify(found: SAEFiles) -> Dictionary:
    """``cfg.json`` with ``sae.safetensors``: topk or groupmax, also as a transcoder and with a skip connection."""
    config = found.settings.get("cfg.json", {})
    if found.said(config, "signed", bool, False):
        found.refuse("it is 'signed' (an older option of sparsify), which is not read")
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        found.refuse(f"its activation is {activation!r}; known are topk and groupmax")
    k = _saelens_k(found, config)
    transcode = found.said(config, "transcode", bool, False)
    layer, mlp = found.in_name(r"layers\.(\d+)"), found.in_name(r"layers\.\d+(\.mlp)(?:/|$)")
    site, site_out = None, None
    if found.in_name(r"(?:^|[/:])(?:model\.)?(embed_tokens)(?:/|$)"):
        site = "hook_embed"
    elif layer is not None and mlp:
        site = f"blocks.{layer}.mlp.hook_in" if transcode else f"blocks.{layer}.hook_mlp_out"
        site_out = f"blocks.{layer}.hook_mlp_out" if transcode else None
    elif layer is not None and found.in_name(r"(layers\.\d+)(?:/|$)"):
        site = f"blocks.{layer}.hook_resid_post"
    where = site_and_model(found, site, found.said(found.settings.get("../config.json", {}), "model", str))
    return Dictionary(
        config=SAEConfig(
            activation=activation,
            k=k,
            subtract_b_dec=not transcode,
            format="sparsify",
            site_out=site_out,
            **where,
        ),
        W_enc=found.matrix("encoder.weight", transposed=True),
        W_dec=found.matrix("W_dec"),
        b_enc=found.vector("encoder.bias"),
        b_dec=found.vector("b_dec"),
        W_skip=found.matrix("W_skip", transposed=True) if "W_skip" in found.tensors else None,
    )
