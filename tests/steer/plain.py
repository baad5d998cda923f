"""The model and the edits once more: float64 NumPy, one row, every place visited in a plain Python loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxsteer.models.config import ModelConfig
from tests.helpers.reference import cap, rms, rotated

PlainTap = Callable[[str, int, np.ndarray], np.ndarray]


def run(
    params: object, config: ModelConfig, tokens: np.ndarray, change: PlainTap
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (T, V) of one row without padding, and the value at every site after ``change``."""
    seen: dict[str, np.ndarray] = {}

    def tap(place: str, layer: int, value: np.ndarray) -> np.ndarray:
        name = place if place == "hook_embed" else f"blocks.{layer}.{place}"
        seen[name] = change(place, layer, value)
        return seen[name]

    wide = lambda a: None if a is None else np.asarray(a, np.float64)  # noqa: E731
    embed = wide(params.embed)
    x = tap("hook_embed", 0, embed[tokens] * (math.sqrt(config.d_model) if config.embed_scale else 1.0))
    for layer in range(config.n_layers):
        w = {n: wide(a)[layer] for n, a in vars(params.layers).items() if a is not None}
        x = tap("hook_resid_pre", layer, x)
        h = rms(x, w["attn_norm"], config)
        q, k, v = (np.einsum("td,dnh->tnh", h, w[name]) + w.get(f"{name}_bias", 0) for name in "qkv")
        q, k, v = (tap(f"attn.hook_{name}", layer, value) for name, value in zip("qkv", (q, k, v)))
        if config.qk_norm:
            q, k = rms(q, w["q_norm"], config), rms(k, w["k_norm"], config)
        rope = config.ropes[config.rope_index[layer]]
        pattern = tap("attn.hook_pattern", layer, _pattern(rotated(q, rope), rotated(k, rope), config, layer))
        values = np.repeat(v, config.n_heads // config.n_kv_heads, axis=1)
        z = tap("attn.hook_z", layer, np.einsum("ntu,unh->tnh", pattern, values))
        out = np.einsum("tnh,nhd->td", z, w["o"])
        x = x + tap("hook_attn_out", layer, rms(out, w["post_attn_norm"], config) if config.post_norms else out)
        x = tap("hook_resid_mid", layer, x)
        h = tap("mlp.hook_in", layer, rms(x, w["mlp_norm"], config))
        gate = tap("mlp.hook_pre", layer, h @ w["gate"])
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        up = tap("mlp.hook_pre_linear", layer, h @ w["up"])
        out = tap("mlp.hook_post", layer, gate * up) @ w["down"]
        x = x + tap("hook_mlp_out", layer, rms(out, w["post_mlp_norm"], config) if config.post_norms else out)
        x = tap("hook_resid_post", layer, x)
    unembed = embed.T if params.unembed is None else wide(params.unembed)
    return cap(rms(x, wide(params.final_norm), config) @ unembed, config.final_softcap), seen


def _pattern(q: np.ndarray, k: np.ndarray, config: ModelConfig, layer: int) -> np.ndarray:
    t = len(q)
    pattern = np.zeros((config.n_heads, t, t))
    for n in range(config.n_heads):
        keys = k[:, n // (config.n_heads // config.n_kv_heads)]
        for i in range(t):
            first = max(0, i - config.windows[layer] + 1)
            scores = cap(keys[first : i + 1] @ q[i, n] * config.query_scale, config.attn_softcap)
            weights = np.exp(scores - scores.max())
            pattern[n, i, first : i + 1] = weights / weights.sum()
    return pattern


def changed(operation: str, h: np.ndarray, v: np.ndarray | None, number: float) -> np.ndarray:
    """One token's value after one operation, by its definition; ``v`` as the user gives it."""
    flat = h.ravel()
    if operation == "scale":
        return h * number
    if operation == "add":
        return h + number * v
    if operation == "add_keep_norm":
        moved = flat + number * v.ravel()
        return (moved * np.linalg.norm(flat) / np.linalg.norm(moved)).reshape(h.shape)
    if operation == "ablate":
        rows = v.reshape(-1, flat.size)
        # least squares: the part of h that is a combination of the rows
        return (flat - number * rows.T @ np.linalg.lstsq(rows.T, flat)[0]).reshape(h.shape)
    u = v.ravel() / np.linalg.norm(v)
    along = flat @ u
    wanted = {"floor": max(along, number), "ceiling": min(along, number), "clamp": number}[operation]
    return (flat - along * u + wanted * u).reshape(h.shape)
