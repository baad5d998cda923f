"""transformers as the oracle. Needs torch; imported only by make_goldens.py and by tests marked ``parity``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.parity import SIZES, VARIANTS


def build(variant: str, *, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A tiny random Llama, float32, eager attention, with weights of order one so that every term shows."""
    config = LlamaConfig(**(SIZES | VARIANTS[variant] | changes), attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise / p.shape[-1] ** 0.5 * (2.0 if "q_proj" in name or "k_proj" in name else 1.0))
    return model


def save(model: LlamaForCausalLM, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def answers(model: LlamaForCausalLM, *, length: int = 20, seed: int = 1) -> dict[str, np.ndarray]:
    """Everything that ``tests.helpers.parity.check`` compares: one full row, one padded left, one padded right."""
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    tokens = rng.integers(0, vocab, (3, length))
    mask = np.ones_like(tokens)
    mask[1, :7], mask[2, -5:] = 0, 0
    ids, attention = torch.tensor(tokens), torch.tensor(mask)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    seen: dict[str, torch.Tensor] = {}
    handles = _hooks(model, seen)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(
        inputs_embeds=embeds,
        attention_mask=attention,
        position_ids=positions,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    both = (attention[:, 1:] * attention[:, :-1]).bool()
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][both], ids[:, 1:][both])
    (gradient,) = torch.autograd.grad(loss, embeds)
    last = model.config.num_hidden_layers - 1
    hidden = [*out.hidden_states[:-1], seen.pop(f"blocks.{last}.hook_resid_post")]  # [-1] is after the final norm
    for layer, pattern in enumerate(out.attentions):
        seen[f"blocks.{layer}.attn.hook_pattern"] = pattern
    result = {
        "tokens": tokens.astype(np.int32),
        "mask": mask.astype(np.int8),
        "logits": out.logits,
        "hidden": torch.stack(hidden),
        "gradient": gradient,
    }
    result |= {f"site:{name}": value[0] for name, value in seen.items() if ".1." in name}
    return {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in result.items()}


def _hooks(model: LlamaForCausalLM, seen: dict[str, torch.Tensor]) -> list[object]:
    """Hooks at the places of formats.md section 5."""
    config, handles = model.config, []
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def output(module: torch.nn.Module, name: str, heads: int | None = None) -> None:
        keep = lambda m, args, out: seen.__setitem__(name, out.unflatten(-1, (heads, h)) if heads else out)  # noqa: E731
        handles.append(module.register_forward_hook(keep))

    def input_(module: torch.nn.Module, name: str, heads: int | None = None) -> None:
        keep = lambda m, args: seen.__setitem__(name, args[0].unflatten(-1, (heads, h)) if heads else args[0])  # noqa: E731
        handles.append(module.register_forward_pre_hook(keep))

    for i, layer in enumerate(model.model.layers):
        at = f"blocks.{i}."
        output(layer, at + "hook_resid_post")
        input_(layer, at + "hook_resid_pre")
        input_(layer.post_attention_layernorm, at + "hook_resid_mid")
        output(layer.self_attn.o_proj, at + "hook_attn_out")
        output(layer.mlp, at + "hook_mlp_out")
        input_(layer.self_attn.o_proj, at + "attn.hook_z", n)
        output(layer.self_attn.q_proj, at + "attn.hook_q", n)
        output(layer.self_attn.k_proj, at + "attn.hook_k", k)
        output(layer.self_attn.v_proj, at + "attn.hook_v", k)
        output(layer.post_attention_layernorm, at + "mlp.hook_in")
        output(layer.mlp.gate_proj, at + "mlp.hook_pre")
        output(layer.mlp.up_proj, at + "mlp.hook_pre_linear")
        input_(layer.mlp.down_proj, at + "mlp.hook_post")
    return handles
