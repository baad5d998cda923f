"""The transformer once more: float64 NumPy, one row and one layer at a time, nothing shared with the package."""

from __future__ import annotations

import math

import numpy as np

from jaxsteer.models.config import ModelConfig, Rope


def frequency(rope: Rope, j: int, d_head: int) -> float:
    """Rotary frequency of pair ``j``."""
    base = 1.0 / rope.theta ** (2 * j / d_head)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / base
        ratio = rope.original_max_positions / wavelength
        if ratio < rope.low_freq_factor:
            return base / rope.factor
        if ratio > rope.high_freq_factor:
            return base
        t = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - t) * base / rope.factor + t * base
    return base


def rotated(x: np.ndarray, rope: Rope) -> np.ndarray:
    """(T, heads, H) after the half-split rotary embedding at positions 0 ... T - 1."""
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    for t in range(x.shape[0]):
        for j in range(half):
            angle = t * frequency(rope, j, x.shape[-1])
            a, b = x[t, :, j], x[t, :, j + half]
            out[t, :, j] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rms(x: np.ndarray, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    scale = 1 + weight if config.norm_plus_one else weight
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, config: ModelConfig) -> np.ndarray:
    if config.norm == "rms":
        return rms(x, weight, config)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + config.norm_eps) * weight + bias


def cap(x: np.ndarray, limit: float | None) -> np.ndarray:
    return x if limit is None else limit * np.tanh(x / limit)


def reference_forward(params: object, config: ModelConfig, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) and the residual stream (L + 1, T, D), before the first and after every block, of one row."""
    wide = lambda a: None if a is None else np.asarray(a, np.float64)  # noqa: E731
    embed = wide(params.embed)
    x = embed[np.asarray(tokens)]
    if config.embed_scale:
        x = x * math.sqrt(config.d_model)
    if config.learned_positions:
        x = x + wide(params.positions)[: len(x)]
    states = [x]
    for layer in range(config.n_layers):
        w = {n: wide(a)[layer] for n, a in vars(params.layers).items() if a is not None}
        out = attention(w, config, normed(x, w["attn_norm"], w.get("attn_norm_bias"), config), layer)
        x = x + (rms(out, w["post_attn_norm"], config) if config.post_norms else out)
        h = normed(x, w["mlp_norm"], w.get("mlp_norm_bias"), config)
        gate = h @ w["gate"] if config.gated_mlp else h @ w["up"] + w.get("up_bias", 0)
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ w["up"]) if config.gated_mlp else gate) @ w["down"] + w.get("down_bias", 0)
        x = x + (rms(out, w["post_mlp_norm"], config) if config.post_norms else out)
        states.append(x)
    final = normed(x, wide(params.final_norm), wide(params.final_norm_bias), config)
    unembed = embed.T if params.unembed is None else wide(params.unembed)
    return cap(final @ unembed, config.final_softcap), np.stack(states)


def attention(w: dict[str, np.ndarray], config: ModelConfig, x: np.ndarray, layer: int) -> np.ndarray:
    q, k, v = (np.einsum("td,dnh->tnh", x, w[name]) for name in "qkv")
    if config.qkv_bias:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if config.qk_norm:
        q, k = rms(q, w["q_norm"], config), rms(k, w["k_norm"], config)
    if config.ropes:
        rope = config.ropes[config.rope_index[layer]]
        q, k = rotated(q, rope), rotated(k, rope)
    out = np.zeros_like(x) + w.get("o_bias", 0)
    for n in range(config.n_heads):
        kv = n // (config.n_heads // config.n_kv_heads)
        for t in range(x.shape[0]):
            first = max(0, t - config.windows[layer] + 1)
            scores = cap(k[first : t + 1, kv] @ q[t, n] * config.query_scale, config.attn_softcap)
            weights = np.exp(scores - scores.max())
            z = (weights / weights.sum()) @ v[first : t + 1, kv]
            out[t] += z @ w["o"][n]
    return out
