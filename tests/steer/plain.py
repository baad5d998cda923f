"""The model and the edits once more: float64 NumPy, one row, every place visited in a plain Python loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sites import Site
from tests.helpers.reference import cap, rms, rotated

MASKED = -1e30
PlainTap = Callable[[str, int, np.ndarray], np.ndarray]


def run(
    params: object, config: ModelConfig, tokens: np.ndarray, change: PlainTap
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (T, V) of one row without padding, and the value at every site after ``change``."""
    seen: dict[str, np.ndarray] = {}

    def tap(kind: str, layer: int, value: np.ndarray) -> np.ndarray:
        name = Site(layer, kind).name
        seen[name] = change(kind, layer, value)
        return seen[name]

    def norm(name: str, layer: int, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        scale = tap(f"{name}.hook_scale", layer, np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps))
        return tap(f"{name}.hook_normalized", layer, x / scale) * (1 + weight if config.norm_plus_one else weight)

    wide = lambda a: None if a is None else np.asarray(a, np.float64)  # noqa: E731
    embed = wide(params.embed)
    x = tap("hook_embed", 0, embed[tokens] * (math.sqrt(config.d_model) if config.embed_scale else 1.0))
    for layer in range(config.n_layers):
        w = {n: wide(a)[layer] for n, a in vars(params.layers).items() if a is not None}
        x = tap("hook_resid_pre", layer, x)
        heads = {}
        for name in "qkv":  # every head has an input of its own
            copies = tap(f"hook_{name}_input", layer, np.repeat(x[:, None], w[name].shape[1], axis=1))
            normed = np.stack([norm("ln1", layer, copies[:, n], w["attn_norm"]) for n in range(copies.shape[1])], 1)
            heads[name] = np.einsum("tnd,dnh->tnh", normed, w[name]) + w.get(f"{name}_bias", 0)
        norm("ln1", layer, x, w["attn_norm"])  # what is seen there
        q, k, v = (tap(f"attn.hook_{name}", layer, value) for name, value in heads.items())
        if config.qk_norm:
            q, k = rms(q, w["q_norm"], config), rms(k, w["k_norm"], config)
        rope = config.ropes[config.rope_index[layer]]
        q, k = tap("attn.hook_rot_q", layer, rotated(q, rope)), tap("attn.hook_rot_k", layer, rotated(k, rope))
        back = np.arange(len(x))[:, None] - np.arange(len(x))
        hidden = (back < 0) | (back >= config.windows[layer])
        groups = config.n_heads // config.n_kv_heads
        scores = cap(np.einsum("tnh,unh->ntu", q, np.repeat(k, groups, 1)) * config.query_scale, config.attn_softcap)
        scores = tap("attn.hook_attn_scores", layer, np.where(hidden, MASKED, scores))
        scores = seen[f"blocks.{layer}.attn.hook_attn_scores"] = np.where(hidden, MASKED, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = tap("attn.hook_pattern", layer, weights / weights.sum(-1, keepdims=True))
        z = tap("attn.hook_z", layer, np.einsum("ntu,unh->tnh", pattern, np.repeat(v, groups, axis=1)))
        result = tap("attn.hook_result", layer, np.einsum("tnh,nhd->tnd", z, w["o"]))
        out = tap("attn.hook_out", layer, result.sum(1))
        x = x + tap(
            "hook_attn_out", layer, norm("ln1_post", layer, out, w["post_attn_norm"]) if config.post_norms else out
        )
        x = tap("hook_resid_mid", layer, x)
        h = tap("mlp.hook_in", layer, norm("ln2", layer, tap("hook_mlp_in", layer, x), w["mlp_norm"]))
        gate = tap("mlp.hook_pre", layer, h @ w["gate"])
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        up = tap("mlp.hook_pre_linear", layer, h @ w["up"])
        out = tap("mlp.hook_out", layer, tap("mlp.hook_post", layer, gate * up) @ w["down"])
        x = x + tap(
            "hook_mlp_out", layer, norm("ln2_post", layer, out, w["post_mlp_norm"]) if config.post_norms else out
        )
        x = tap("hook_resid_post", layer, x)
    unembed = embed.T if params.unembed is None else wide(params.unembed)
    return cap(norm("ln_final", 0, x, wide(params.final_norm)) @ unembed, config.final_softcap), seen


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
