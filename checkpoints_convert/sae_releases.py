"""SAEs as their authors released them: Gemma Scope, Llama Scope, OpenMOSS, Qwen-Scope and single files.

Each reader takes what was found and gives the one form of ``sae_form``, with the scales and biases of its layout named
in the config and not folded yet. docs/saes.md has the table.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from checkpoints_convert.sae_files import SAEFiles
from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import Dictionary, Matrix, SAEConfig, canonical, unit_decoder
from jaxsteer.models.sites import parse_site, resid_site

BATCH_TOP_K = (
    "trained with one selection over the whole batch and no stored threshold: here every row keeps its own k largest"
)


def canonical_site(name: str) -> str:
    """The site's name here, aliases resolved; a name that is no site of ours stays as it is, so that it can be read."""
    try:
        return parse_site(name).name
    except UserError:
        return name


def site_and_model(found: SAEFiles, site: str | None, model: str | None) -> dict[str, Any]:
    """Config fields: what the caller gives before what the file says; the site must be known from one of them."""
    site = found.overrides.site or site
    if site is None:
        found.ask("site", "at which site it was trained", "'blocks.12.hook_resid_post'")
    if re.search(r"[.\[_L]-\d", site):
        raise UserError(f"The site {site!r} counts from the last layer. An SAE belongs to one layer: count from 0.")
    return {"site_in": canonical_site(site), "model": found.overrides.model or model}


def layer_in_name(found: SAEFiles, pattern: str) -> str | None:
    """The residual stream after the layer that the name says."""
    layer = found.in_name(pattern)
    return None if layer is None else resid_site(int(layer))


# Gemma Scope

_GEMMA_1 = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
_GEMMA_2 = {
    "resid_post": ("hook_resid_post", "hook_resid_post"),
    "attn_out": ("attn.hook_z", "attn.hook_z"),
    "mlp_out": ("hook_mlp_out", "hook_mlp_out"),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}
_GEMMA_HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


def _jumprelu(found: SAEFiles, config: SAEConfig, into: int | None = None) -> Dictionary:
    """Arrays named W_enc, W_dec, b_enc, b_dec, threshold in any case, oriented [in, out].

    Decoders into several layers, [F, layers, D], are read at the layer with the number ``into``.
    """
    lower = {name.lower(): name for name in found.tensors}
    missing = [name for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold") if name not in lower]
    if missing:
        found.refuse(f"tensors are missing: {', '.join(missing)}")
    if into is not None:
        decoders = found.tensors[lower["w_dec"]][:, into]
        found = dataclasses.replace(found, tensors=found.tensors | {lower["w_dec"]: decoders})
    return Dictionary(
        config=config,
        W_enc=found.matrix(lower["w_enc"]),
        W_dec=found.matrix(lower["w_dec"]),
        b_enc=found.vector(lower["b_enc"]),
        b_dec=found.vector(lower["b_dec"]),
        threshold=found.vector(lower["threshold"]),
        W_skip=found.matrix("affine_skip_connection") if "affine_skip_connection" in found.tensors else None,
    )


def gemma_scope_1(found: SAEFiles) -> Dictionary:
    """``params.npz``: JumpReLU on the raw activations. Embedding SAEs are taken to the scaled stream."""
    size, kind, part = (found.in_name(f"gemma-scope-{p}") for p in (
        r"(2b|9b|27b)-(?:pt|it)", r"(?:2b|9b|27b)-(pt|it)", r"(?:2b|9b|27b)-(?:pt|it)-(res|mlp|att|transcoders)",
    ))  # fmt: skip
    model = None if size is None or kind is None else f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
    layer = found.in_name(r"layer_(\d+)")
    site = f"blocks.{layer}.{_GEMMA_1[part.lower()]}" if layer is not None and part is not None else None
    embedding = found.in_name(r"(embedding)/width") is not None
    where = site_and_model(found, "hook_embed" if embedding else site, model)
    if part == "transcoders" and layer is not None:
        where["site_out"] = f"blocks.{layer}.hook_mlp_out"
    d = _jumprelu(found, SAEConfig(activation="jumprelu", format="Gemma Scope 1", trained_with_bos=False, **where))
    if not embedding:
        return d
    scale = 1.0 / math.sqrt(len(d.b_dec))
    return d.replace(
        "trained on embeddings before their scale sqrt(D)", input_scale=scale, output_scale=scale
    )  # fmt: skip


def gemma_scope_2(found: SAEFiles) -> Dictionary:
    """``params.safetensors`` in lower case, with or without ``config.json``; transcoders may have an affine skip.

    Crosscoders and cross-layer transcoders have a file for each layer, with latents that read this layer and write to
    several: such a file is read as the SAE of its layer that writes to one of them, ``site_out`` or its own.
    """
    config = next((s for s in found.settings.values() if "hf_hook_point_in" in s), {})
    architecture = found.said(config, "architecture", str, "jump_relu")
    if architecture not in ("jump_relu", "jumprelu"):
        found.refuse(f"its architecture is {architecture!r}, and only jump_relu is known")
    size, layer = found.in_name(r"gemma-scope-2-(\w+?-(?:pt|it))"), found.in_name(r"layer_(\d+)")
    name = found.said(config, "model_name", str, "").replace("gemma-v3", "gemma-3")
    model = (name if "/" in name else f"google/{name}") if name else f"google/gemma-3-{size}" if size else None
    if model is not None and "270m" in model:  # the base model of this size has no suffix
        model = model.removesuffix("-pt")
    w_dec = next((values for key, values in found.tensors.items() if key.lower() == "w_dec"), None)
    if w_dec is not None and w_dec.ndim == 3:
        return _gemma_layers(found, model, w_dec.shape[1])
    part = found.in_name(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/")
    sites: tuple[str, str] | tuple[None, None] = (None, None)
    if config and found.overrides.site is None:
        into = found.said(config, "hf_hook_point_in", str) or found.refuse("its config names no hf_hook_point_in")
        out = found.said(config, "hf_hook_point_out", str) or into
        sites = _gemma_hook(found, into), _gemma_hook(found, out)
    elif layer is not None and part is not None:
        into, out = _GEMMA_2[part.lower()]
        sites = f"blocks.{layer}.{into}", f"blocks.{layer}.{out}"
    where = site_and_model(found, sites[0], model)
    if sites[1] != sites[0]:
        where["site_out"] = sites[1]
    return _jumprelu(found, SAEConfig(activation="jumprelu", format="Gemma Scope 2", **where))


def _gemma_layers(found: SAEFiles, model: str | None, n_layers: int) -> Dictionary:
    """One layer of a crosscoder (over the residual streams that the folder names) or of a cross-layer transcoder."""
    number = found.in_name(r"params_layer_(\d+)\.safetensors") or found.in_name(r"layer_(\d+)\.safetensors")
    listed = found.in_name(r"crosscoder/layer_(\d+(?:_\d+)+)_width")
    layers = [int(layer) for layer in listed.split("_")] if listed else list(range(n_layers))
    known = listed or found.in_name(r"(?:^|[/:])(clt)/")
    if not known or number is None or not int(number) < len(layers) == n_layers:
        found.refuse(
            f"w_dec has three axes, of {n_layers} layers: it is one layer of a crosscoder or of a cross-layer "
            f"transcoder, and its path does not say which (crosscoder/layer_7_13_17_22_width_.../params_layer_2"
            f".safetensors, clt/width_.../params_layer_2.safetensors)"
        )
    read, write = ("hook_resid_post", "hook_resid_post") if listed else ("mlp.hook_in", "hook_mlp_out")
    own = int(number)
    sites = [f"blocks.{layer}.{write}" for layer in layers]
    out = canonical_site(found.overrides.site_out or sites[own])
    if out not in sites:
        found.refuse(f"site_out {out!r} is none of the sites that it writes to: {', '.join(sites)}")
    where = site_and_model(found, f"blocks.{layers[own]}.{read}", model) | {"site_out": out}
    note = f"one layer of a {'crosscoder' if listed else 'cross-layer transcoder'}: other layers write to {out} too"
    config = SAEConfig(activation="jumprelu", format="Gemma Scope 2", notes=(note,), **where)
    d = _jumprelu(found, config, into=sites.index(out))
    if out == sites[own]:
        return d
    # The bias of another layer, and its affine part, stand in the file of that layer.
    return d.replace("b_dec of another layer left out", b_dec=np.zeros_like(d.b_dec), W_skip=None)


def _gemma_hook(found: SAEFiles, hook: str) -> str:
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", hook)
    if match is None or match[2] not in _GEMMA_HOOKS:
        found.refuse(f"its config names the place {hook!r}; known are model.layers.i. and one of {list(_GEMMA_HOOKS)}")
    return f"blocks.{match[1]}.{_GEMMA_HOOKS[match[2]]}"


# OpenMOSS: Llama Scope and later


def llama_scope(found: SAEFiles) -> Dictionary:
    """``hyperparams.json`` with ``checkpoints/final.safetensors``: one threshold, stored in units of the raw input."""
    return _openmoss(found, found.settings["hyperparams.json"], "Llama Scope")


def openmoss(found: SAEFiles) -> Dictionary:
    """``config.json`` with ``sae_weights.safetensors``: a threshold per latent, in units of the normalised input."""
    return _openmoss(found, found.settings["config.json"], "OpenMOSS")


def _openmoss(found: SAEFiles, config: dict[str, Any], name: str) -> Dictionary:
    if found.said(config, "use_glu_encoder", bool, False) or any("glu" in key for key in found.tensors):
        found.refuse("its encoder is gated by a second matrix (glu), which is not read")
    if config.get("sae_type", "sae") not in ("sae", "SAE"):
        found.refuse(f"it is a {config['sae_type']}, and of this library only plain SAEs and transcoders are read")
    into = found.said(config, "hook_point_in", str)
    out = found.said(config, "hook_point_out", str) or into
    if "encoder.weight" in found.tensors:
        W_enc, W_dec = (found.matrix(f"{part}.weight", transposed=True) for part in ("encoder", "decoder"))
        biases = "encoder.bias", "decoder.bias"
    else:
        W_enc, W_dec = found.matrix("W_E"), found.matrix("W_D")
        biases = "b_E", "b_D"
    has_bias = found.said(config, "use_decoder_bias", bool, True)
    b_dec = found.vector(biases[1]) if has_bias else np.zeros(W_dec.shape[1])
    scale_in, scale_out, norm = _openmoss_scales(found, config, into, out, W_enc.shape[0], len(b_dec))
    kind = found.said(config, "act_fn", str, "relu").lower()
    if kind not in ("relu", "jumprelu", "topk", "batchtopk"):
        found.refuse(f"its act_fn is {kind!r}; known are relu, jumprelu, topk and batchtopk")
    where = site_and_model(found, into, _openmoss_model(found))
    if out is not None and out != into:
        where["site_out"] = canonical_site(out)
    by_norm = found.said(config, "sparsity_include_decoder_norm", bool, True)
    d = Dictionary(
        config=SAEConfig(
            activation="topk" if kind == "batchtopk" else kind,  # type: ignore[arg-type]
            k=found.overrides.k or found.said(config, "top_k", int) if kind.endswith("topk") else None,
            format=name,
            input_norm=norm,  # type: ignore[arg-type]
            input_scale=scale_in,
            output_scale=scale_out,
            subtract_b_dec=found.said(config, "apply_decoder_bias_to_pre_encoder", bool, False),
            **where,
        ),
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=found.vector(biases[0]),
        b_dec=b_dec,
        threshold=_openmoss_threshold(found, config, scale_in, W_enc.shape[1]) if kind == "jumprelu" else None,
    )
    if kind == "batchtopk":
        d = d.replace(BATCH_TOP_K)
    if by_norm and d.threshold is not None:  # the gate asks n_j p_j > threshold, and p_j passes
        norms = d.W_dec.row_norms()
        d = d.replace(threshold=np.divide(d.threshold, norms, out=np.full_like(norms, np.inf), where=norms > 0))
    if by_norm and d.config.activation == "topk":
        d = unit_decoder(canonical(d), selects_by_norm=True)
    return d


def _openmoss_scales(
    found: SAEFiles, config: dict[str, Any], into: str | None, out: str | None, d_in: int, d_out: int
) -> tuple[float, float, str]:
    """(input scale, output scale, norm of rows) of ``norm_activation``."""
    rule = found.said(config, "norm_activation", str) or "inference"
    if rule == "token-wise":
        return 1.0, 1.0, "constant_norm"
    if rule in ("inference", "none"):
        return 1.0, 1.0, "none"
    if rule != "dataset-wise":
        found.refuse(f"its norm_activation is {rule!r}; known are dataset-wise, token-wise and inference")
    stored = found.said(config, "dataset_average_activation_norm", dict, {})
    if found.overrides.norm_scaling_factor is not None:
        return found.overrides.norm_scaling_factor, found.overrides.norm_scaling_factor, "none"
    norms = []
    for side, hook in (("in", into), ("out", out)):
        key = f"dataset_average_activation_norm.{hook}"
        name = side if side in stored else str(hook)
        value = found.scalar(key) if key in found.tensors else found.said(stored, name, float)
        if value is None:
            found.ask("norm_scaling_factor", f"the average norm at {hook}, by which inputs are scaled", "0.31")
        if value <= 0:
            found.refuse(f"the average norm at {hook} is {value}")
        norms.append(value)
    return math.sqrt(d_in) / norms[0], math.sqrt(d_out) / norms[1], "none"


def _openmoss_threshold(found: SAEFiles, config: dict[str, Any], scale: float, latents: int) -> np.ndarray:
    """Thresholds of n_j * p_j, in units of the normalised input."""
    log = next((key for key in found.tensors if key.endswith("log_jumprelu_threshold")), None)
    if log is not None:
        stored = found.tensor(log)
        values = found.vector(log) if stored.ndim == 1 and stored.size != 1 else np.full(latents, found.scalar(log))
        with np.errstate(over="ignore"):
            return np.exp(values)
    threshold = found.said(config, "jump_relu_threshold", float)
    if threshold is None:
        found.refuse("it is a JumpReLU SAE without log_jumprelu_threshold and without jump_relu_threshold")
    return np.full(latents, scale * threshold)


def _openmoss_model(found: SAEFiles) -> str | None:
    if found.in_name(r"(Llama3_1-8B-Base)"):
        return "meta-llama/Llama-3.1-8B"
    return "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if found.in_name(r"(Llama-Scope-R1-Distill)") else None


# One file each


def qwen_scope(found: SAEFiles) -> Dictionary:
    """``layer{i}.sae.pt``: the k largest pre-activations with their signs, k in the repository's name."""
    k = found.overrides.k or found.in_name(r"-L0_(\d+)")
    if k is None:
        found.ask("k", "how many latents are active at once (the repository is called ...-L0_50 or ...-L0_100)", "50")
    model = found.in_name(r"SAE-Res-(.+?)-W\d+K")
    where = site_and_model(found, layer_in_name(found, r"layer(\d+)\.sae\.pt"), f"Qwen/{model}" if model else None)
    return Dictionary(
        config=SAEConfig(activation="topk", k=int(k), relu=False, format="Qwen-Scope", **where),
        W_enc=found.matrix("W_enc", transposed=True),
        W_dec=found.matrix("W_dec", transposed=True),
        b_enc=found.vector("b_enc"),
        b_dec=found.vector("b_dec"),
    )


def goodfire(found: SAEFiles) -> Dictionary:
    """One file with ``encoder_linear`` and ``decoder_linear``: relu, nothing subtracted."""
    name = found.in_name(r"(Llama-3\.\d-\d+B-Instruct)-SAE")
    model = f"meta-llama/{name}" if name else None
    return _linear(found, "encoder_linear", "decoder_linear", "Goodfire", model)


def qresearch(found: SAEFiles) -> Dictionary:
    """One file with ``encoder`` and ``decoder``, both with biases, and no JSON: relu, nothing subtracted."""
    model = found.in_name(r"(DeepSeek-R1-Distill-Llama-8B)")
    return _linear(found, "encoder", "decoder", "qresearch", f"deepseek-ai/{model}" if model else None)


def _linear(found: SAEFiles, encoder: str, decoder: str, name: str, model: str | None) -> Dictionary:
    where = site_and_model(found, layer_in_name(found, r"-SAE-l(\d+)"), model)
    return Dictionary(
        config=SAEConfig(activation="relu", format=name, **where),
        W_enc=found.matrix(f"{encoder}.weight", transposed=True),
        W_dec=found.matrix(f"{decoder}.weight", transposed=True),
        b_enc=found.vector(f"{encoder}.bias"),
        b_dec=found.vector(f"{decoder}.bias"),
    )


def goodfire_r1(found: SAEFiles) -> Dictionary:
    """One file with a tied ``W``: k latents per token on average over the batch, without a stored threshold."""
    topic = found.in_name(r"(?:^|[/:])(math|logic)(?:/|$)")
    k = found.overrides.k or {"math": 128, "logic": 64}.get((topic or "").lower())
    if k is None:
        found.ask("k", "how many latents are active per token (128 in math/, 64 in logic/)", "128")
    r1 = found.in_name(r"(DeepSeek-R1)-SAE")
    where = site_and_model(
        found, layer_in_name(found, r"-SAE-l(\d+)"), "deepseek-ai/DeepSeek-R1" if r1 else None
    )  # fmt: skip
    W, b_enc = found.matrix("W").stored, found.vector("b_enc")
    tall = W.shape[1] == len(b_enc)
    return Dictionary(
        config=SAEConfig(activation="topk", k=k, format="Goodfire R1", notes=(BATCH_TOP_K,), **where),
        W_enc=Matrix(W, transposed=not tall),
        W_dec=Matrix(W, transposed=tall),
        b_enc=b_enc,
        b_dec=found.vector("b_dec"),
    )
