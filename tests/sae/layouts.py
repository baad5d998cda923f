"""Small SAEs written in every layout, each with its formulas in float64 NumPy, written down a second time here.

A case's ``encode`` and ``decode`` follow the library that writes the layout, except for the units of its latents, which
are those that docs/saes.md states.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import torchzip

D, O, F, K = 8, 6, 24, 5  # noqa: E741
Array = np.ndarray


@dataclasses.dataclass
class Case:
    """A written SAE and what it must compute."""

    path: Path
    encode: Callable[[Array], Array]
    decode: Callable[[Array, Array], Array]
    """Of (latents, the input that was encoded)."""
    format: str
    site: str
    model: str | None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def relu(p: Array) -> Array:
    return np.maximum(p, 0.0)


def jump(p: Array, threshold: Array | float) -> Array:
    return relu(p) * (p > threshold)


def top(q: Array, k: int) -> Array:
    """q where it is among the k largest of its row, else 0."""
    return np.where(q >= np.sort(q, axis=-1)[..., -k, None], q, 0.0)


def weights(seed: int, *, d_out: int = D, dtype: Any = np.float32) -> dict[str, Array]:
    """W_enc [D, F], W_dec [F, O] of uneven row norms, biases, thresholds, in float64 but representable in dtype."""
    rng = np.random.default_rng(seed)
    raw = {
        "W_enc": rng.standard_normal((D, F)) / 2,
        "W_dec": rng.standard_normal((F, d_out)) * rng.uniform(0.3, 2.0, (F, 1)),
        "b_enc": rng.standard_normal(F) / 3,
        "b_dec": rng.standard_normal(d_out),
        "threshold": rng.uniform(0.1, 1.0, F),
        "extra": rng.standard_normal(F) / 3,
        "scale": rng.standard_normal(F) / 3,
        "W_skip": rng.standard_normal((D, d_out)),
    }
    return {name: value.astype(dtype).astype(np.float64) for name, value in raw.items()}


def f32(arrays: dict[str, Any], dtype: Any = np.float32) -> dict[str, Any]:
    return {name: np.ascontiguousarray(value, dtype) for name, value in arrays.items()}


def folder(path: Path, arrays: dict[str, Any], file: str, settings: dict[str, Any], dtype: Any = np.float32) -> Path:
    """Write the tensors under ``file`` and JSON files beside them, in the folder ``path``."""
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(f32(arrays, dtype), path / file)
    elif file.endswith(".npz"):
        np.savez(path / file, **f32(arrays, dtype))
    else:
        torchzip.write(path / file, arrays)
    for name, contents in settings.items():
        (path / name).write_text(json.dumps(contents))
    return path


def plain_decode(w: dict[str, Array]) -> Callable[[Array, Array], Array]:
    return lambda f, x: f @ w["W_dec"] + w["b_dec"]


# Gemma Scope


def gemma_scope_1(tmp: Path) -> Case:
    w = weights(0)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    path = tmp / "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    folder(path, {n: w[n] for n in names}, "params.npz", {})
    return Case(
        path, lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]), plain_decode(w),
        "Gemma Scope 1", "blocks.20.hook_resid_post", "google/gemma-2-2b",
    )  # fmt: skip


def gemma_scope_1_embedding(tmp: Path) -> Case:
    w = weights(1)
    path = tmp / "gemma-scope-9b-it-res/embedding/width_4k/average_l0_5"
    folder(path, {n.lower(): w[n] for n in ("W_enc", "W_dec")} | {n: w[n] for n in ("b_enc", "b_dec", "threshold")},
           "params.npz", {})  # fmt: skip
    return Case(
        path,
        lambda x: jump(x / np.sqrt(D) @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda f, x: np.sqrt(D) * (f @ w["W_dec"] + w["b_dec"]),
        "Gemma Scope 1", "hook_embed", "google/gemma-2-9b-it",
    )  # fmt: skip


def gemma_scope_2_transcoder(tmp: Path) -> Case:
    w = weights(2, d_out=O)
    arrays = {n.lower(): w[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    config = {
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
        "width": F, "model_name": "google/gemma-v3-1b-pt", "architecture": "jump_relu", "l0": 20,
        "affine_connection": True, "type": "transcoder",
    }  # fmt: skip
    path = folder(
        tmp / "transcoder/layer_7_width_16k_l0_small_affine",
        arrays | {"affine_skip_connection": w["W_skip"]},
        "params.safetensors",
        {"config.json": config},
    )
    return Case(
        path,
        lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda f, x: f @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"],
        "Gemma Scope 2", "blocks.7.mlp.hook_in", "google/gemma-3-1b-pt",
    )  # fmt: skip


def gemma_scope_2_bare(tmp: Path) -> Case:
    w = weights(3)
    arrays = {n.lower(): w[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    path = folder(tmp / "gemma-scope-2-4b-it/attn_out_all/layer_3_width_16k_l0_big", arrays, "params.safetensors", {})
    return Case(
        path, lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]), plain_decode(w),
        "Gemma Scope 2", "blocks.3.attn.hook_z", "google/gemma-3-4b-it",
    )  # fmt: skip


# OpenMOSS


def llama_scope(tmp: Path) -> Case:
    w = weights(4, dtype=ml_dtypes.bfloat16)
    arrays = {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"],
    }  # fmt: skip
    params = {
        "hook_point_in": "blocks.24.hook_resid_post", "hook_point_out": "blocks.24.hook_resid_post",
        "act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 5.0, "out": 4.0}, "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "d_model": D, "d_sae": F, "top_k": 50,
    }  # fmt: skip
    path = folder(
        tmp / "Llama3_1-8B-Base-L24R-8x", arrays, "checkpoints/final.safetensors", {"hyperparams.json": params},
        ml_dtypes.bfloat16,
    )  # fmt: skip
    s, s_out, n = np.sqrt(D) / 5.0, np.sqrt(D) / 4.0, np.linalg.norm(w["W_dec"], axis=1)

    def encode(x: Array) -> Array:
        p = s * (x @ w["W_enc"]) + w["b_enc"]
        return np.where(n * p > s * 0.5, p, 0.0)

    return Case(
        path, encode, lambda f, x: (f @ w["W_dec"] + w["b_dec"]) / s_out,
        "Llama Scope", "blocks.24.hook_resid_post", "meta-llama/Llama-3.1-8B",
    )  # fmt: skip


def _openmoss_config(**changes: Any) -> dict[str, Any]:
    return {
        "sae_type": "sae", "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
        "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "d_model": D, "expansion_factor": 3,
    } | changes  # fmt: skip


def openmoss(tmp: Path) -> Case:
    w = weights(5)
    arrays = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    arrays["log_jumprelu_threshold"] = np.log(w["threshold"])
    arrays["dataset_average_activation_norm.blocks.3.hook_resid_post"] = np.float32(4.0)
    path = folder(
        tmp / "Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L3R", arrays, "sae_weights.safetensors",
        {"config.json": _openmoss_config(apply_decoder_bias_to_pre_encoder=True)},
    )  # fmt: skip
    s, n = np.sqrt(D) / 4.0, np.linalg.norm(w["W_dec"], axis=1)

    def encode(x: Array) -> Array:
        p = (s * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        return np.where(n * p > w["threshold"], p, 0.0)

    return Case(
        path, encode, lambda f, x: (f @ w["W_dec"] + w["b_dec"]) / s,
        "OpenMOSS", "blocks.3.hook_resid_post", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    )  # fmt: skip


def openmoss_topk(tmp: Path) -> Case:
    w = weights(6)
    arrays = {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"],
    }  # fmt: skip
    config = _openmoss_config(act_fn="topk", top_k=K, norm_activation="token-wise")
    path = folder(tmp / "L3R", arrays, "sae_weights.safetensors", {"config.json": config})
    n = np.linalg.norm(w["W_dec"], axis=1)

    def norm(x: Array) -> Array:
        return np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(D)

    return Case(
        path,
        lambda x: top(relu(x / norm(x) @ w["W_enc"] + w["b_enc"]) * n, K),
        lambda f, x: (f @ (w["W_dec"] / n[:, None]) + w["b_dec"]) * norm(x),
        "OpenMOSS", "blocks.3.hook_resid_post", None,
    )  # fmt: skip


# SAELens

METADATA = {"model_name": "gemma-2-2b", "hook_name": "blocks.5.hook_resid_pre", "prepend_bos": True,
            "sae_lens_version": "6.54.12"}  # fmt: skip


def saelens_cfg(architecture: str, **changes: Any) -> dict[str, Any]:
    return {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": METADATA,
    } | changes  # fmt: skip


def _saelens(
    tmp: Path,
    w: dict[str, Array],
    names: dict[str, str],
    cfg: dict[str, Any],
    encode: Any,
    decode: Any,
    **arguments: Any,
) -> Case:
    arrays = {name: w[ours] for name, ours in names.items()}
    if "W_skip" in arrays:
        arrays["W_skip"] = arrays["W_skip"].T
    path = folder(tmp / "saelens", arrays | {}, "sae_weights.safetensors", {"cfg.json": cfg})
    save_file({"sparsity": np.zeros(F, np.float32)}, path / "sparsity.safetensors")
    return Case(path, encode, decode, "SAELens", "blocks.5.hook_resid_pre", "gemma-2-2b", arguments)


_FOUR = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def saelens_standard(tmp: Path) -> Case:
    w = weights(7)
    return _saelens(
        tmp, w, _FOUR, saelens_cfg("standard"),
        lambda x: relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), plain_decode(w),
    )  # fmt: skip


def saelens_jumprelu_layer_norm(tmp: Path) -> Case:
    w = weights(8)

    def stats(x: Array) -> tuple[Array, Array]:
        return x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)

    def encode(x: Array) -> Array:
        mu, std = stats(x)
        return jump(((x - mu) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"], w["threshold"])

    def decode(f: Array, x: Array) -> Array:
        mu, std = stats(x)
        return (f @ w["W_dec"] + w["b_dec"]) * std + mu

    cfg = saelens_cfg("jumprelu", normalize_activations="layer_norm")
    return _saelens(tmp, w, _FOUR | {"threshold": "threshold"}, cfg, encode, decode)


def saelens_topk_rescaled(tmp: Path) -> Case:
    w = weights(9)
    n = np.linalg.norm(w["W_dec"], axis=1)
    cfg = saelens_cfg("topk", k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    return _saelens(
        tmp, w, _FOUR, cfg,
        lambda x: relu(top((x @ w["W_enc"] + w["b_enc"]) * n, K)),
        lambda f, x: (f / n) @ w["W_dec"] + w["b_dec"],
    )  # fmt: skip


def saelens_abstopk_constant_norm(tmp: Path) -> Case:
    w = weights(10)

    def encode(x: Array) -> Array:
        c = np.sqrt(D) / np.linalg.norm(x, axis=-1, keepdims=True)
        p = (x * c - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        return np.where(top(np.abs(p), K) > 0, p, 0.0)

    cfg = saelens_cfg("abstopk", k=K, normalize_activations="constant_norm_rescale")
    return _saelens(
        tmp, w, _FOUR, cfg, encode,
        lambda f, x: (f @ w["W_dec"] + w["b_dec"]) / (np.sqrt(D) / np.linalg.norm(x, axis=-1, keepdims=True)),
    )  # fmt: skip


def saelens_gated(tmp: Path) -> Case:
    w = weights(11)
    names = {
        "W_enc": "W_enc",
        "W_dec": "W_dec",
        "b_gate": "b_enc",
        "b_mag": "extra",
        "r_mag": "scale",
        "b_dec": "b_dec",
    }

    def encode(x: Array) -> Array:
        x = x - w["b_dec"]
        magnitude = relu(x @ (w["W_enc"] * np.exp(w["scale"])) + w["extra"])
        return (x @ w["W_enc"] + w["b_enc"] > 0) * magnitude

    return _saelens(tmp, w, names, saelens_cfg("gated"), encode, plain_decode(w))


def saelens_matching_pursuit(tmp: Path) -> Case:
    w = weights(12)
    w["W_dec"] = (w["W_dec"] / np.linalg.norm(w["W_dec"], axis=1, keepdims=True)).astype(np.float32).astype(float)

    def row(x: Array) -> Array:
        r, f, support = x - w["b_dec"], np.zeros(F), set()
        for _ in range(D):
            j = int(np.argmax(relu(r @ w["W_dec"].T)))
            v = max(float(r @ w["W_dec"][j]), 0.0)
            f[j] += v
            r = r - v * w["W_dec"][j]
            now = set(np.flatnonzero(f))
            if now == support or np.linalg.norm(r) < 0.01:
                break
            support = now
        return f

    cfg = saelens_cfg("matching_pursuit", residual_threshold=0.01, metadata=METADATA)
    return _saelens(
        tmp, w, {"W_dec": "W_dec", "b_dec": "b_dec"}, cfg, lambda x: np.stack([row(r) for r in x]), plain_decode(w)
    )


def saelens_jumprelu_skip_transcoder(tmp: Path) -> Case:
    w = weights(13, d_out=O)
    metadata = METADATA | {"hook_name_out": "blocks.5.hook_mlp_out"}
    cfg = saelens_cfg("jumprelu_skip_transcoder", d_out=O, metadata=metadata)
    return _saelens(
        tmp, w, _FOUR | {"threshold": "threshold", "W_skip": "W_skip"}, cfg,
        lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]),
        lambda f, x: f @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"],
    )  # fmt: skip


def saelens_scaled(tmp: Path) -> Case:
    w, s = weights(14), 0.37
    return _saelens(
        tmp, w, _FOUR, saelens_cfg("standard", normalize_activations="expected_average_only_in"),
        lambda x: relu((s * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]),
        lambda f, x: (f @ w["W_dec"] + w["b_dec"]) / s,
        norm_scaling_factor=s,
    )  # fmt: skip


def saelens_batch_topk_training(tmp: Path) -> Case:
    w, scale, threshold = weights(33), 0.4, 0.9
    n = np.linalg.norm(w["W_dec"], axis=1)
    cfg = saelens_cfg(
        "matryoshka_batchtopk", k=12.5, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False,
        normalize_activations="expected_average_only_in", topk_threshold_lr=0.01,
    )  # fmt: skip
    case = _saelens(
        tmp, w | {"topk_threshold": np.asarray(threshold)}, _FOUR | {"topk_threshold": "topk_threshold"}, cfg,
        lambda x: jump((scale * x @ w["W_enc"] + w["b_enc"]) * n, threshold) / scale,
        lambda f, x: ((f * scale / n) @ w["W_dec"] + w["b_dec"]) / scale,
    )  # fmt: skip
    (case.path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    return case


def saelens_batch_topk_unfitted(tmp: Path) -> Case:
    w = weights(34)
    arrays = w | {"topk_threshold": np.asarray(0.0)}
    return _saelens(
        tmp, arrays, _FOUR | {"topk_threshold": "topk_threshold"}, saelens_cfg("batchtopk", k=float(K)),
        lambda x: relu(top((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)), plain_decode(w),
    )  # fmt: skip


def saelens_jumprelu_training(tmp: Path) -> Case:
    w = weights(35)
    return _saelens(
        tmp, w | {"log": np.log(w["threshold"])}, _FOUR | {"log_threshold": "log"}, saelens_cfg("jumprelu"),
        lambda x: jump((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], w["threshold"]), plain_decode(w),
    )  # fmt: skip


def saelens_old(tmp: Path) -> Case:
    w = weights(15)
    cfg = {
        "model_name": "llama-3-8b-it", "hook_point": "blocks.25.hook_resid_post", "hook_point_layer": 25,
        "d_in": D, "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "dtype": "torch.float32",
        "normalize_activations": "none",
    }  # fmt: skip
    arrays = {name: w[name] for name in _FOUR} | {"scaling_factor": np.ones(F)}
    path = folder(tmp / "old", arrays, "sae_weights.safetensors", {"cfg.json": cfg})
    return Case(
        path, lambda x: relu(top((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)), plain_decode(w),
        "SAELens before 6", "blocks.25.hook_resid_post", "llama-3-8b-it",
    )  # fmt: skip


# dictionary_learning


def _dl(tmp: Path, kind: str, arrays: dict[str, Any], encode: Any, decode: Any, **arguments: Any) -> Case:
    config = {
        "trainer": {"dict_class": kind, "trainer_class": "T", "activation_dim": D, "dict_size": F, "k": K, "layer": 11,
                    "lm_name": "Qwen/Qwen2.5-7B-Instruct", "submodule_name": "resid_post_layer_11"},
        "buffer": {"ctx_len": 128},
    }  # fmt: skip
    path = folder(
        tmp / "resid_post_layer_11/trainer_1", arrays, "ae.pt", {"config.json": config, "eval_results.json": {}}
    )
    return Case(
        path, encode, decode, "dictionary_learning", "blocks.11.hook_resid_post", "Qwen/Qwen2.5-7B-Instruct", arguments
    )


def _linear(w: dict[str, Array], encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Any]:
    # Transposed as views, as torch saves what was assigned as ``w.T``.
    dec = w["W_dec"].astype(np.float32)
    return {
        f"{encoder}.weight": torchzip.parameter(w["W_enc"].T.astype(np.float32)),
        f"{encoder}.bias": w["b_enc"].astype(np.float32),
        f"{decoder}.weight": torchzip.View(dec.reshape(-1), (dec.shape[1], F), (1, dec.shape[1])),
    }


def dl_auto_encoder(tmp: Path) -> Case:
    w = weights(16)
    n = np.linalg.norm(w["W_dec"], axis=1)
    return _dl(
        tmp, "AutoEncoder", _linear(w) | {"bias": w["b_dec"].astype(np.float32)},
        lambda x: relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * n,
        lambda f, x: (f / n) @ w["W_dec"] + w["b_dec"],
    )  # fmt: skip


def dl_auto_encoder_new(tmp: Path) -> Case:
    w = weights(17)
    return _dl(
        tmp, "AutoEncoderNew", _linear(w) | {"decoder.bias": w["b_dec"].astype(np.float32)},
        lambda x: relu(x @ w["W_enc"] + w["b_enc"]), plain_decode(w),
    )  # fmt: skip


def dl_gated(tmp: Path) -> Case:
    w = weights(18)
    arrays = {name: value for name, value in _linear(w).items() if name != "encoder.bias"}
    arrays |= f32({"decoder_bias": w["b_dec"], "r_mag": w["scale"], "gate_bias": w["b_enc"], "mag_bias": w["extra"]})

    def encode(x: Array) -> Array:
        g = (x - w["b_dec"]) @ w["W_enc"]
        return (g + w["b_enc"] > 0) * relu(np.exp(w["scale"]) * g + w["extra"])

    return _dl(tmp, "GatedAutoEncoder", arrays, encode, plain_decode(w))


def _dl_topk(w: dict[str, Array], threshold: float) -> dict[str, Any]:
    return _linear(w) | {
        "b_dec": w["b_dec"].astype(np.float32),
        "k": np.asarray(K, np.int32),
        "threshold": np.asarray(threshold, np.float32),
    }


def dl_topk(tmp: Path) -> Case:
    w = weights(19)
    return _dl(
        tmp, "AutoEncoderTopK", _dl_topk(w, 0.75),
        lambda x: top(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), K), plain_decode(w),
    )  # fmt: skip


def dl_topk_by_threshold(tmp: Path) -> Case:
    w = weights(20)
    return _dl(
        tmp, "AutoEncoderTopK", _dl_topk(w, 0.75),
        lambda x: jump((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0.75), plain_decode(w), use_threshold=True,
    )  # fmt: skip


def dl_batch_topk(tmp: Path) -> Case:
    w = weights(21)
    return _dl(
        tmp, "BatchTopKSAE", _dl_topk(w, 0.5),
        lambda x: jump((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0.5), plain_decode(w),
    )  # fmt: skip


def dl_batch_topk_unfitted(tmp: Path) -> Case:
    w = weights(22)
    return _dl(
        tmp, "BatchTopKSAE", _dl_topk(w, -1.0),
        lambda x: top(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), K), plain_decode(w),
    )  # fmt: skip


def dl_matryoshka(tmp: Path) -> Case:
    w = weights(23)
    arrays = f32({name: w[name] for name in _FOUR})
    arrays |= {"k": np.asarray(K, np.int32), "threshold": np.asarray(0.25, np.float32)}
    arrays["group_sizes"] = np.asarray([8, 16], np.int64)
    return _dl(
        tmp, "MatryoshkaBatchTopKSAE", arrays,
        lambda x: jump((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0.25), plain_decode(w),
    )  # fmt: skip


def dl_jumprelu(tmp: Path) -> Case:
    w = weights(24)
    arrays = f32({name: w[name] for name in (*_FOUR, "threshold")})
    return _dl(
        tmp, "JumpReluAutoEncoder", arrays,
        lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]), plain_decode(w),
    )  # fmt: skip


# sparsify


def _sparsify(
    tmp: Path, hook: str, w: dict[str, Array], cfg: dict[str, Any], encode: Any, decode: Any, site: str
) -> Case:
    arrays = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if cfg.get("skip_connection"):
        arrays["W_skip"] = w["W_skip"].T
    full = {"d_in": D, "num_latents": F, "k": K, "normalize_decoder": True, "multi_topk": False} | cfg
    path = folder(tmp / "run" / hook, arrays, "sae.safetensors", {"cfg.json": full})
    (path.parent / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M"}))
    return Case(path, encode, decode, "sparsify", site, "HuggingFaceTB/SmolLM2-135M")


def sparsify_topk(tmp: Path) -> Case:
    w = weights(25)
    return _sparsify(
        tmp, "layers.9", w, {"activation": "topk"},
        lambda x: top(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), K), plain_decode(w),
        "blocks.9.hook_resid_post",
    )  # fmt: skip


def sparsify_groupmax_skip_transcoder(tmp: Path) -> Case:
    w = weights(26)

    def encode(x: Array) -> Array:
        a = relu(x @ w["W_enc"] + w["b_enc"]).reshape(-1, 4, F // 4)
        return np.where(a == a.max(-1, keepdims=True), a, 0.0).reshape(-1, F)

    return _sparsify(
        tmp, "layers.9.mlp", w, {"activation": "groupmax", "k": 4, "transcode": True, "skip_connection": True},
        encode, lambda f, x: f @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"], "blocks.9.mlp.hook_in",
    )  # fmt: skip


# Single files


def _file(tmp: Path, name: str, arrays: dict[str, Any]) -> Path:
    (tmp / name).parent.mkdir(parents=True, exist_ok=True)
    return torchzip.write(tmp / name, arrays)


def goodfire(tmp: Path) -> Case:
    w = weights(27)
    arrays = _linear(w, "encoder_linear", "decoder_linear") | f32({"decoder_linear.bias": w["b_dec"]})
    return Case(
        _file(tmp, "Llama-3.1-8B-Instruct-SAE-l19.pth", arrays),
        lambda x: relu(x @ w["W_enc"] + w["b_enc"]), plain_decode(w),
        "Goodfire", "blocks.19.hook_resid_post", "meta-llama/Llama-3.1-8B-Instruct",
    )  # fmt: skip


def qresearch(tmp: Path) -> Case:
    w = weights(28)
    arrays = _linear(w) | f32({"decoder.bias": w["b_dec"]})
    return Case(
        _file(tmp, "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", arrays),
        lambda x: relu(x @ w["W_enc"] + w["b_enc"]), plain_decode(w),
        "qresearch", "blocks.19.hook_resid_post", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    )  # fmt: skip


def goodfire_r1(tmp: Path) -> Case:
    w = weights(29)
    return Case(
        _file(tmp, "math/DeepSeek-R1-SAE-l37.pt", f32({"W": w["W_enc"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]})),
        lambda x: top(relu(x @ w["W_enc"] + w["b_enc"]), K), lambda f, x: f @ w["W_enc"].T + w["b_dec"],
        "Goodfire R1", "blocks.37.hook_resid_post", "deepseek-ai/DeepSeek-R1", {"k": K},
    )  # fmt: skip


def qwen_scope(tmp: Path) -> Case:
    w = weights(30)
    arrays = f32({"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]})
    return Case(
        _file(tmp, f"SAE-Res-Qwen3-8B-Base-W64K-L0_{20}/layer17.sae.pt", arrays),
        lambda x: top(x @ w["W_enc"] + w["b_enc"] + 1e3, 20) - 1e3 * (top(x @ w["W_enc"] + w["b_enc"] + 1e3, 20) > 0),
        plain_decode(w), "Qwen-Scope", "blocks.17.hook_resid_post", "Qwen/Qwen3-8B-Base",
    )  # fmt: skip


CASES: tuple[Callable[[Path], Case], ...] = (
    gemma_scope_1, gemma_scope_1_embedding, gemma_scope_2_transcoder, gemma_scope_2_bare, llama_scope, openmoss,
    openmoss_topk, saelens_standard, saelens_jumprelu_layer_norm, saelens_topk_rescaled, saelens_abstopk_constant_norm,
    saelens_gated, saelens_matching_pursuit, saelens_jumprelu_skip_transcoder, saelens_scaled, saelens_old,
    saelens_batch_topk_training, saelens_batch_topk_unfitted, saelens_jumprelu_training,
    dl_auto_encoder, dl_auto_encoder_new, dl_gated, dl_topk, dl_topk_by_threshold, dl_batch_topk,
    dl_batch_topk_unfitted, dl_matryoshka, dl_jumprelu, sparsify_topk, sparsify_groupmax_skip_transcoder, goodfire,
    qresearch, goodfire_r1, qwen_scope,
)  # fmt: skip
