"""A Llama of ours in TransformerLens, with nothing folded or centred: the peer of several benchmarks.

Needs torch and transformer-lens.
"""

from __future__ import annotations

import os
from typing import Any

from jaxsteer.models.model import Model


def build_hooked(model: Model, **options: bool) -> Any:
    """``HookedTransformer`` of the same weights, float32, on all cores; ``options`` are those of its configuration."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    from experiments.benchmarks.torch_peer import build

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.n_layers, d_model=c.d_model, n_ctx=256, d_head=c.d_head, n_heads=c.n_heads, d_mlp=c.d_mlp,
        d_vocab=c.vocab_size, act_fn="silu", gated_mlp=True, normalization_type="RMS", eps=c.norm_eps,
        positional_embedding_type="rotary", rotary_base=int(c.ropes[0].theta), rotary_dim=c.d_head,
        rotary_adjacent_pairs=False, final_rms=True, original_architecture="LlamaForCausalLM", device="cpu", **options,
    )  # fmt: skip
    net = HookedTransformer(config)
    net.load_and_process_state_dict(
        convert_llama_weights(build(c, model.params), config), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return net
