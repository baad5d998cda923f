"""transformers as the oracle. Needs torch; imported only by make_goldens.py and by tests marked ``parity``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.helpers.parity import SIZES, VARIANTS, VISION


def build(variant: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model, float32, eager attention (the only path that soft-caps).

    Weights are of order one, so that every term shows, except for queries and keys and the writers of the stream: with
    those the softmax and the depth would amplify the last bit of a sine into the fourth digit of a logit.
    """
    fields = SIZES | VARIANTS[variant] | changes
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
                writes = "o_proj" in name or "down_proj" in name
                p.copy_(noise / p.shape[-1] ** 0.5 * (0.5 if writes else 1.0))
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
    """The decoder stack, with ``embed_tokens``, ``layers`` and ``norm``."""
    return getattr(model.model, "language_model", model.model)


def batch(model: PreTrainedModel, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [3, length]: one full row, one padded left, one padded right."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.get_text_config().vocab_size, (3, length))
    mask = np.ones_like(tokens)
    mask[1, :7], mask[2, -5:] = 0, 0
    return torch.tensor(tokens), torch.tensor(mask)


def answers(model: PreTrainedModel, *, length: int = 20, seed: int = 1) -> dict[str, np.ndarray]:
    """Everything that ``tests.helpers.parity.check`` compares."""
    config, text = model.config.get_text_config(), text_model(model)
    ids, attention = batch(model, length, seed)
    seen: dict[str, torch.Tensor] = {}
    handles = _hooks(model, seen)
    rows = text.embed_tokens.weight[ids].detach().requires_grad_()
    out = model(
        inputs_embeds=rows * getattr(text.embed_tokens, "embed_scale", 1.0),
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
    n, k = config.num_attention_heads, config.num_key_value_heads
    h = getattr(config, "head_dim", None) or config.hidden_size // n

    def output(module: torch.nn.Module, name: str, heads: int | None = None) -> None:
        keep = lambda m, args, out: seen.__setitem__(name, out.unflatten(-1, (heads, h)) if heads else out)  # noqa: E731
        handles.append(module.register_forward_hook(keep))

    def input_(module: torch.nn.Module, name: str, heads: int | None = None) -> None:
        keep = lambda m, args: seen.__setitem__(name, args[0].unflatten(-1, (heads, h)) if heads else args[0])  # noqa: E731
        handles.append(module.register_forward_pre_hook(keep))

    for i, layer in enumerate(text_model(model).layers):
        at = f"blocks.{i}."
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
