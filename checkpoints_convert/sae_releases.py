"""SAEs as their authors released them: Gemma Scope, Llama Scope, OpenMOSS, Qwen-Scope and single files.

Each reader takes what was found and gives the one form of ``sae_form``, with the scales and biases of its layout named
in the config and not folded yet. docs/saes.md has the table.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from checkpoints_convert.sae_files import Found
from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import Dictionary, Matrix, SAEConfig, canonical, unit_decoder
from jaxsteer.models.sites import parse_site, resid_site

BATCH_TOP_K = (
    "trained with one selection over the whole batch and no stored threshold: here every row keeps its own k largest"
)
_DEEP = 1 << 20


def canonical_site(name: str) -> str:
    """The site's name here, aliases resolved; a name that is no site of ours stays as it is, so that it can be read."""
    try:
        return parse_site(name, _DEEP).name
    except UserError:
        return name


def site_and_model(found: Found, site: str | None, model: str | None) -> dict[str, Any]:
    """Config fields: what was asked for before what the file says; the site must be known from one of them."""
    site = found.asked.site or site
    if site is None:
        found.ask("site", "at which site it was trained", "'blocks.12.hook_resid_post'")
    if re.search(r"[.\[_L]-\d", site):
        raise UserError(f"The site {site!r} counts from the last layer. An SAE belongs to one layer: count from 0.")
    return {"site_in": canonical_site(site), "model": found.asked.model or model}


def layer_in_name(found: Found, pattern: str) -> str | None:
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


def _jumprelu(found: Found, config: SAEConfig) -> Dictionary:
    """Arrays named W_enc, W_dec, b_enc, b_dec, threshold in any case, oriented [in, out]."""
    lower = {name.lower(): name for name in found.tensors}
    missing = [name for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold") if name not in lower]
    if missing:
        found.refuse(f"tensors are missing: {', '.join(missing)}")
    if found.tensors[lower["w_dec"]].ndim != 2:
        found.refuse("it is a cross-layer transcoder or a crosscoder (w_dec has three axes), which are not read yet")
    skip = found.tensors.get("affine_skip_connection")
    return Dictionary(
        config=config,
        W_enc=Matrix(found.tensor(lower["w_enc"])),
        W_dec=Matrix(found.tensor(lower["w_dec"])),
        b_enc=found.vector(lower["b_enc"]),
        b_dec=found.vector(lower["b_dec"]),
        threshold=found.vector(lower["threshold"]),
        W_skip=None if skip is None else Matrix(skip),
    )


def gemma_scope_1(found: Found) -> Dictionary:
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


def gemma_scope_2(found: Found) -> Dictionary:
    """``params.safetensors`` in lower case, with or without ``config.json``; transcoders may have an affine skip."""
    config = next((s for s in found.settings.values() if "hf_hook_point_in" in s), {})
    if config.get("type") in ("crosscoder", "clt") or found.in_name(r"(?:^|[/:])(crosscoder|clt)(?:/|$)"):
        found.refuse("it is a crosscoder or cross-layer transcoder of Gemma Scope 2, which are not read yet")
    if (config.get("architecture") or "jump_relu") not in ("jump_relu", "jumprelu"):
        found.refuse(f"its architecture is {config['architecture']!r}, and only jump_relu is known")
    size, layer = found.in_name(r"gemma-scope-2-(\w+?-(?:pt|it))"), found.in_name(r"layer_(\d+)")
    part = found.in_name(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/")
    sites: tuple[str, str] | tuple[None, None] = (None, None)
    if config:
        sites = _gemma_hook(found, config["hf_hook_point_in"]), _gemma_hook(found, config["hf_hook_point_out"])
    elif layer is not None and part is not None:
        into, out = _GEMMA_2[part.lower()]
        sites = f"blocks.{layer}.{into}", f"blocks.{layer}.{out}"
    name = str(config.get("model_name") or "").replace("gemma-v3", "gemma-3")
    model = (name if "/" in name else f"google/{name}") if name else f"google/gemma-3-{size}" if size else None
    where = site_and_model(found, sites[0], model)
    if sites[1] != sites[0]:
        where["site_out"] = sites[1]
    return _jumprelu(found, SAEConfig(activation="jumprelu", format="Gemma Scope 2", **where))


def _gemma_hook(found: Found, hook: str) -> str:
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", hook)
    if match is None or match[2] not in _GEMMA_HOOKS:
        found.refuse(f"its config names the place {hook!r}; known are model.layers.i. and one of {list(_GEMMA_HOOKS)}")
    return f"blocks.{match[1]}.{_GEMMA_HOOKS[match[2]]}"


# OpenMOSS: Llama Scope and later


def llama_scope(found: Found) -> Dictionary:
    """``hyperparams.json`` with ``checkpoints/final.safetensors``: one threshold, stored in units of the raw input."""
    return _openmoss(found, found.settings["hyperparams.json"], "Llama Scope")


def openmoss(found: Found) -> Dictionary:
    """``config.json`` with ``sae_weights.safetensors``: a threshold per latent, in units of the normalised input."""
    return _openmoss(found, found.settings["config.json"], "OpenMOSS")


def _openmoss(found: Found, config: dict[str, Any], name: str) -> Dictionary:
    if config.get("use_glu_encoder") or any("glu" in key for key in found.tensors):
        found.refuse("its encoder is gated by a second matrix (glu), which is not read")
    if config.get("sae_type", "sae") not in ("sae", "SAE"):
        found.refuse(f"it is a {config['sae_type']}, and of this library only plain SAEs and transcoders are read")
    into, out = config.get("hook_point_in"), config.get("hook_point_out") or config.get("hook_point_in")
    if "encoder.weight" in found.tensors:
        W_enc, W_dec = (Matrix(found.tensor(f"{part}.weight"), transposed=True) for part in ("encoder", "decoder"))
        biases = "encoder.bias", "decoder.bias"
    else:
        W_enc, W_dec = Matrix(found.tensor("W_E")), Matrix(found.tensor("W_D"))
        biases = "b_E", "b_D"
    b_dec = found.vector(biases[1]) if config.get("use_decoder_bias", True) else np.zeros(W_dec.shape[1])
    scale_in, scale_out, norm = _openmoss_scales(found, config, into, out, W_enc.shape[0], len(b_dec))
    kind = str(config.get("act_fn", "relu")).lower()
    if kind not in ("relu", "jumprelu", "topk", "batchtopk"):
        found.refuse(f"its act_fn is {kind!r}; known are relu, jumprelu, topk and batchtopk")
    where = site_and_model(found, into, _openmoss_model(found))
    if out is not None and out != into:
        where["site_out"] = canonical_site(out)
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    d = Dictionary(
        config=SAEConfig(
            activation="topk" if kind == "batchtopk" else kind,  # type: ignore[arg-type]
            k=found.asked.k or config.get("top_k") if kind.endswith("topk") else None,
            format=name,
            input_norm=norm,  # type: ignore[arg-type]
            input_scale=scale_in,
            output_scale=scale_out,
            subtract_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
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
    found: Found, config: dict[str, Any], into: str | None, out: str | None, d_in: int, d_out: int
) -> tuple[float, float, str]:
    """(input scale, output scale, norm of rows) of ``norm_activation``."""
    rule = config.get("norm_activation") or "inference"
    if rule == "token-wise":
        return 1.0, 1.0, "constant_norm"
    if rule in ("inference", "none"):
        return 1.0, 1.0, "none"
    if rule != "dataset-wise":
        found.refuse(f"its norm_activation is {rule!r}; known are dataset-wise, token-wise and inference")
    stored = config.get("dataset_average_activation_norm") or {}
    if found.asked.norm_scaling_factor is not None:
        return found.asked.norm_scaling_factor, found.asked.norm_scaling_factor, "none"
    norms = []
    for side, hook in (("in", into), ("out", out)):
        key = f"dataset_average_activation_norm.{hook}"
        value = found.scalar(key) if key in found.tensors else stored.get(side, stored.get(hook))
        if value is None:
            found.ask("norm_scaling_factor", f"the average norm at {hook}, by which inputs are scaled", "0.31")
        norms.append(float(value))
    return math.sqrt(d_in) / norms[0], math.sqrt(d_out) / norms[1], "none"


def _openmoss_threshold(found: Found, config: dict[str, Any], scale: float, latents: int) -> np.ndarray:
    """Thresholds of n_j * p_j, in units of the normalised input."""
    log = next((key for key in found.tensors if key.endswith("log_jumprelu_threshold")), None)
    if log is not None:
        return np.exp(found.tensor(log).astype(np.float64)) * np.ones(latents)
    if "jump_relu_threshold" not in config:
        found.refuse("it is a JumpReLU SAE without log_jumprelu_threshold and without jump_relu_threshold")
    return np.full(latents, scale * float(config["jump_relu_threshold"]))


def _openmoss_model(found: Found) -> str | None:
    if found.in_name(r"(Llama3_1-8B-Base)"):
        return "meta-llama/Llama-3.1-8B"
    return "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if found.in_name(r"(Llama-Scope-R1-Distill)") else None


# One file each


def qwen_scope(found: Found) -> Dictionary:
    """``layer{i}.sae.pt``: the k largest pre-activations with their signs, k in the repository's name."""
    k = found.asked.k or found.in_name(r"-L0_(\d+)")
    if k is None:
        found.ask("k", "how many latents are active at once (the repository is called ...-L0_50 or ...-L0_100)", "50")
    model = found.in_name(r"SAE-Res-(.+?)-W\d+K")
    where = site_and_model(found, layer_in_name(found, r"layer(\d+)\.sae\.pt"), f"Qwen/{model}" if model else None)
    return Dictionary(
        config=SAEConfig(activation="topk", k=int(k), relu=False, format="Qwen-Scope", **where),
        W_enc=Matrix(found.tensor("W_enc"), transposed=True),
        W_dec=Matrix(found.tensor("W_dec"), transposed=True),
        b_enc=found.vector("b_enc"),
        b_dec=found.vector("b_dec"),
    )


def goodfire(found: Found) -> Dictionary:
    """One file with ``encoder_linear`` and ``decoder_linear``: relu, nothing subtracted."""
    name = found.in_name(r"(Llama-3\.\d-\d+B-Instruct)-SAE")
    model = f"meta-llama/{name}" if name else None
    return _linear(found, "encoder_linear", "decoder_linear", "Goodfire", model)


def qresearch(found: Found) -> Dictionary:
    """One file with ``encoder`` and ``decoder``, both with biases, and no JSON: relu, nothing subtracted."""
    model = found.in_name(r"(DeepSeek-R1-Distill-Llama-8B)")
    return _linear(found, "encoder", "decoder", "qresearch", f"deepseek-ai/{model}" if model else None)


def _linear(found: Found, encoder: str, decoder: str, name: str, model: str | None) -> Dictionary:
    where = site_and_model(found, layer_in_name(found, r"-SAE-l(\d+)"), model)
    return Dictionary(
        config=SAEConfig(activation="relu", format=name, **where),
        W_enc=Matrix(found.tensor(f"{encoder}.weight"), transposed=True),
        W_dec=Matrix(found.tensor(f"{decoder}.weight"), transposed=True),
        b_enc=found.vector(f"{encoder}.bias"),
        b_dec=found.vector(f"{decoder}.bias"),
    )


def goodfire_r1(found: Found) -> Dictionary:
    """One file with a tied ``W``: k latents per token on average over the batch, without a stored threshold."""
    topic = found.in_name(r"(?:^|[/:])(math|logic)(?:/|$)")
    k = found.asked.k or {"math": 128, "logic": 64}.get((topic or "").lower())
    if k is None:
        found.ask("k", "how many latents are active per token (128 in math/, 64 in logic/)", "128")
    r1 = found.in_name(r"(DeepSeek-R1)-SAE")
    where = site_and_model(
        found, layer_in_name(found, r"-SAE-l(\d+)"), "deepseek-ai/DeepSeek-R1" if r1 else None
    )  # fmt: skip
    W, b_enc = found.tensor("W"), found.vector("b_enc")
    tall = W.ndim == 2 and W.shape[1] == len(b_enc)
    return Dictionary(
        config=SAEConfig(activation="topk", k=k, format="Goodfire R1", notes=(BATCH_TOP_K,), **where),
        W_enc=Matrix(W, transposed=not tall),
        W_dec=Matrix(W, transposed=tall),
        b_enc=b_enc,
        b_dec=found.vector("b_dec"),
    )
