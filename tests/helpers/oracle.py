"""transformers as the oracle. Needs torch; imported only by make_goldens.py and by tests marked ``parity``."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.helpers.parity import GPT2_SIZES, SIZES, VARIANTS, VISION


def build(variant: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model, float32, eager attention (the only path that soft-caps).

    Weights are of order one, so that every term shows, except for queries and keys and the writers of the stream: with
    those the softmax and the depth would amplify the last bit of a sine into the fourth digit of a logit.
    """
    fields = (GPT2_SIZES if variant == "gpt2" else SIZES) | VARIANTS[variant] | changes
    kind = fields.pop("model_type")
    if kind == "gemma3":
        config = AutoConfig.for_model(kind, text_config=fields, **VISION)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    else:
        config = AutoConfig.for_model(kind, **fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plus_one = kind.startswith("gemma")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.5 * noise)
            elif p.ndim == 1:
                writes = plus_one and name.endswith(
                    ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
                )
                p.copy_(0.2 * noise + (0 if plus_one else 1) - (0.5 if writes else 0))
            else:
                writes = any(part in name for part in ("o_proj", "down_proj", "c_proj"))
                fan_in = p.shape[0 if ".c_" in name else -1]  # GPT-2's matrices are [in, out]
                p.copy_(noise / fan_in**0.5 * (0.5 if writes else 1.0))
    return model


def save(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def renamed(directory: Path, out: Path, prefixes: dict[str, str | None]) -> Path:
    """A copy of a one-file checkpoint whose tensors begin with another prefix, or are left out for None."""
    shutil.copytree(directory, out)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        new = prefixes.get(old, "")
        if new is not None:
            tensors[new + name.removeprefix(old)] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def text_model(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder stack, with ``embed_tokens``, ``layers`` and ``norm``; in GPT-2 ``wte``, ``h`` and ``ln_f``."""
    return getattr(model.base_model, "language_model", model.base_model)


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    text = text_model(model)
    return text.h if is_gpt2(model) else text.layers


def is_gpt2(model: PreTrainedModel) -> bool:
    return model.config.model_type == "gpt2"


def batch(model: PreTrainedModel, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [3, length]: one full row, one padded left, one padded right."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.get_text_config().vocab_size, (3, length))
    mask = np.ones_like(tokens)
    mask[1, :7], mask[2, -5:] = 0, 0
    return torch.tensor(tokens), torch.tensor(mask)


def answers(model: PreTrainedModel, *, length: int = 20, seed: int = 1) -> dict[str, np.ndarray]:
    """Everything that ``tests.helpers.parity.check`` compares."""
    config, table = model.config.get_text_config(), model.get_input_embeddings()
    ids, attention = batch(model, length, seed)
    seen: dict[str, torch.Tensor] = {}
    handles = _hooks(model, seen)
    rows = table.weight[ids].detach().requires_grad_()
    out = model(
        inputs_embeds=rows * getattr(table, "embed_scale", 1.0),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    both = (attention[:, 1:] * attention[:, :-1]).bool()
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][both], ids[:, 1:][both])
    (gradient,) = torch.autograd.grad(loss, rows)
    last = config.num_hidden_layers - 1
    hidden = [*out.hidden_states[:-1], seen[f"blocks.{last}.hook_resid_post"]]  # [-1] is after the final norm
    for layer, pattern in enumerate(out.attentions):
        seen[f"blocks.{layer}.attn.hook_pattern"] = pattern
    result = {
        "tokens": ids.numpy().astype(np.int32),
        "mask": attention.numpy().astype(np.int8),
        "logits": out.logits,
        "hidden": torch.stack(hidden),
        "gradient": gradient,
    }
    result |= {f"site:{name}": value[0] for name, value in seen.items() if ".1." in name}
    return {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in result.items()}


def _hooks(model: PreTrainedModel, seen: dict[str, torch.Tensor]) -> list[object]:
    """Hooks at the places that our sites are named for."""
    config, handles = model.config.get_text_config(), []
    n = config.num_attention_heads
    k = getattr(config, "num_key_value_heads", n)
    h = getattr(config, "head_dim", None) or config.hidden_size // n

    def kept(value: torch.Tensor, name: str, heads: int | None) -> torch.Tensor:
        """The value that goes on is made of the one that was seen, so that this has a gradient."""
        seen[name] = value.unflatten(-1, (heads, h)) if heads else value
        return seen[name].flatten(-2) if heads else value

    def output(module: torch.nn.Module, name: str, heads: int | None = None) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: kept(out, name, heads)))

    def input_(module: torch.nn.Module, name: str, heads: int | None = None) -> None:
        handles.append(module.register_forward_pre_hook(lambda m, args: (kept(args[0], name, heads), *args[1:])))

    def thirds(module: torch.nn.Module, at: str) -> None:
        def see(m: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
            parts = zip("qkv", out.chunk(3, -1), strict=True)
            return torch.cat([kept(part, f"{at}attn.hook_{name}", n) for name, part in parts], -1)

        handles.append(module.register_forward_hook(see))

    for i, layer in enumerate(_layers(model)):
        at = f"blocks.{i}."
        if is_gpt2(model):
            output(layer, at + "hook_resid_post")
            input_(layer, at + "hook_resid_pre")
            input_(layer.ln_2, at + "hook_resid_mid")
            output(layer.attn.c_proj, at + "hook_attn_out")
            output(layer.mlp, at + "hook_mlp_out")
            input_(layer.attn.c_proj, at + "attn.hook_z", n)
            thirds(layer.attn.c_attn, at)
            output(layer.ln_2, at + "mlp.hook_in")
            output(layer.mlp.c_fc, at + "mlp.hook_pre")
            input_(layer.mlp.c_proj, at + "mlp.hook_post")
            continue
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        output(layer, at + "hook_resid_post")
        input_(layer, at + "hook_resid_pre")
        input_(before_mlp, at + "hook_resid_mid")
        output(layer.post_attention_layernorm if gemma else layer.self_attn.o_proj, at + "hook_attn_out")
        output(layer.post_feedforward_layernorm if gemma else layer.mlp, at + "hook_mlp_out")
        input_(layer.self_attn.o_proj, at + "attn.hook_z", n)
        output(layer.self_attn.q_proj, at + "attn.hook_q", n)
        output(layer.self_attn.k_proj, at + "attn.hook_k", k)
        output(layer.self_attn.v_proj, at + "attn.hook_v", k)
        output(before_mlp, at + "mlp.hook_in")
        output(layer.mlp.gate_proj, at + "mlp.hook_pre")
        output(layer.mlp.up_proj, at + "mlp.hook_pre_linear")
        input_(layer.mlp.down_proj, at + "mlp.hook_post")
    return handles


def gradients(
    model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray, *, split: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The value at every site of block 1 and outside of the blocks, and the gradient of ``cross_entropy`` there.

    ``split`` gives every head of queries, keys and values a copy of the stream: then at these copies alone.
    """
    seen: dict[str, torch.Tensor] = {}
    handles, text = _hooks(model, seen), text_model(model)
    attention = sys.modules[type(text).__module__]
    _spread(text.ln_f if is_gpt2(model) else text.norm, "ln_final", seen)
    for i, layer in enumerate(_layers(model)):
        spread = _spread_gpt2 if is_gpt2(model) else _spread_layer
        spread(layer, f"blocks.{i}.", seen, split)
    ids, attended = torch.tensor(tokens), torch.tensor(mask)
    with mock.patch.object(attention, "eager_attention_forward", partial(_attend, seen)):
        out = model(ids, attention_mask=attended, position_ids=(attended.cumsum(-1) - 1).clamp(min=0), use_cache=False)
    for handle in handles:
        handle.remove()
    both = (attended[:, 1:] * attended[:, :-1]).bool()
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][both], ids[:, 1:][both])
    seen["hook_embed"] = seen["blocks.0.hook_resid_pre"]
    inputs = [f"blocks.1.hook_{name}_input" for name in "qkv"]
    names = inputs if split else [n for n in seen if not n.startswith("blocks.") or n.startswith("blocks.1.")]
    slopes = torch.autograd.grad(loss, [seen[name] for name in names])
    return {name: (seen[name].detach().numpy(), slope.numpy()) for name, slope in zip(names, slopes, strict=True)}


def _spread(norm: torch.nn.Module, name: str, seen: dict[str, torch.Tensor]) -> None:
    """Let a norm compute as before, by way of its scale and of what it divides."""
    centred = isinstance(norm, torch.nn.LayerNorm)
    gemma, eps = hasattr(norm, "eps") and not centred, getattr(norm, "eps", None) or norm.variance_epsilon

    def forward(x: torch.Tensor, see: bool = True) -> torch.Tensor:
        kept = seen if see else {}
        if name.endswith("ln2"):
            x = kept[name.replace("ln2", "hook_mlp_in")] = x * 1  # a copy: the stream goes on without it
        x = x - x.mean(-1, keepdim=True) if centred else x
        scale = kept[f"{name}.hook_scale"] = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        quotient = kept[f"{name}.hook_normalized"] = x / scale
        return quotient * (1 + norm.weight if gemma else norm.weight) + (norm.bias if centred else 0)

    norm.forward = forward


def _spread_layer(layer: torch.nn.Module, at: str, seen: dict[str, torch.Tensor], split: bool) -> None:
    """The same for a layer: its norms, what each head writes, and what each head is given."""
    gemma, h = hasattr(layer, "pre_feedforward_layernorm"), layer.self_attn.head_dim
    _spread(layer.input_layernorm, at + "ln1", seen)
    _spread(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm, at + "ln2", seen)
    if gemma:
        _spread(layer.post_attention_layernorm, at + "ln1_post", seen)
        _spread(layer.post_feedforward_layernorm, at + "ln2_post", seen)

    def write(z: torch.Tensor) -> torch.Tensor:
        z, matrix = z.unflatten(-1, (-1, h)), layer.self_attn.o_proj.weight.unflatten(1, (-1, h))
        seen[at + "attn.hook_result"] = torch.einsum("btnh,dnh->btnd", z, matrix)
        seen[at + "attn.hook_out"] = seen[at + "attn.hook_result"].sum(2)
        return seen[at + "attn.hook_out"]

    def mlp_out(_m: object, _args: object, out: torch.Tensor) -> None:
        seen[at + "mlp.hook_out"] = out

    layer.self_attn.o_proj.forward = write
    layer.mlp.register_forward_hook(mlp_out)
    for name in "qkv" if split else "":
        module = getattr(layer.self_attn, f"{name}_proj")

        def project(_x: torch.Tensor, name: str = name, module: torch.nn.Module = module) -> torch.Tensor:
            matrix = module.weight.unflatten(0, (-1, h))
            copies = seen[at + "hook_resid_pre"].unsqueeze(2).repeat(1, 1, len(matrix), 1)
            seen[at + f"hook_{name}_input"] = copies
            out = torch.einsum("btnd,nhd->btnh", layer.input_layernorm.forward(copies, see=False), matrix).flatten(-2)
            return out if module.bias is None else out + module.bias

        module.forward = project


def _spread_gpt2(layer: torch.nn.Module, at: str, seen: dict[str, torch.Tensor], split: bool) -> None:
    """``_spread_layer`` for a block of GPT-2, whose matrices are [in, out] and queries, keys and values one."""
    attn, h = layer.attn, layer.attn.head_dim
    _spread(layer.ln_1, at + "ln1", seen)
    _spread(layer.ln_2, at + "ln2", seen)

    def write(z: torch.Tensor) -> torch.Tensor:
        matrix = attn.c_proj.weight.unflatten(0, (-1, h))
        seen[at + "attn.hook_result"] = torch.einsum("btnh,nhd->btnd", z.unflatten(-1, (-1, h)), matrix)
        seen[at + "attn.hook_out"] = seen[at + "attn.hook_result"].sum(2) + attn.c_proj.bias
        return seen[at + "attn.hook_out"]

    def mlp_out(_m: object, _args: object, out: torch.Tensor) -> None:
        seen[at + "mlp.hook_out"] = out

    def project(_x: torch.Tensor) -> torch.Tensor:
        outs = []
        for name, matrix, bias in zip("qkv", attn.c_attn.weight.chunk(3, 1), attn.c_attn.bias.chunk(3), strict=True):
            matrix = matrix.unflatten(1, (-1, h))
            copies = seen[at + "hook_resid_pre"].unsqueeze(2).repeat(1, 1, matrix.shape[1], 1)
            seen[at + f"hook_{name}_input"] = copies
            x = layer.ln_1.forward(copies, see=False)
            outs.append(torch.einsum("btnd,dnh->btnh", x, matrix).flatten(-2) + bias)
        return torch.cat(outs, -1)

    attn.c_proj.forward = write
    layer.mlp.register_forward_hook(mlp_out)
    if split:
        attn.c_attn.forward = project


def _attend(seen: dict[str, torch.Tensor], module: torch.nn.Module, q, k, v, mask, scaling, softcap=None, **_: object):  # noqa: ANN001, ANN202
    """Eager attention of transformers, by way of the sites inside it."""
    at, groups = f"blocks.{module.layer_idx}.attn.", getattr(module, "num_key_value_groups", 1)
    q = seen[at + "hook_rot_q"] = q.transpose(1, 2)
    k = seen[at + "hook_rot_k"] = k.transpose(1, 2)
    scores = torch.einsum("btnh,bunh->bntu", q, k.repeat_interleave(groups, 2)) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = seen[at + "hook_attn_scores"] = scores + mask
    pattern = seen[at + "hook_pattern"] = scores.softmax(-1)
    return torch.einsum("bntu,bnuh->btnh", pattern, v.repeat_interleave(groups, 1)), pattern
