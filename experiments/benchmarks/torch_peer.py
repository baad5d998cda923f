"""The loop that jaxsteer's search is measured against: EPO in PyTorch as it is published, written plainly.

What it shares with the published EPO and RESGA code (arXiv 2402.01702, 2601.02896): a transformers model, called with
``output_hidden_states=True`` and returning the logits of every position; prompts as one-hot matrices multiplied by the
embedding table; gradients by autograd through that product, for new members of the population only; no cache of what
precedes the prompt; in every forward call one context, drawn at random and shared by the rows of that call.

What it leaves out, in its favour: their defects (token filters, retokenisation and the archive cost it nothing
either), writing logs, and a forward batch of 2 rows, which is what RESGA's own configuration uses.

Needs torch: ``make parity`` installs it, or ``pip install 'jaxsteer[parity]'``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_convert import write_hf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params, init_params


def build(config: ModelConfig, params: Params | None = None) -> LlamaForCausalLM:
    """The model as transformers sees it, float32, in evaluation mode; random weights where none are given."""
    params = init_params(config, jax.random.key(0)) if params is None else params
    with tempfile.TemporaryDirectory() as directory:
        write_hf(params, config, Path(directory) / "model")
        model = LlamaForCausalLM.from_pretrained(Path(directory) / "model", dtype=torch.float32)
    return model.eval().requires_grad_(False)


def build_random(config: ModelConfig, dtype: str, device: str) -> LlamaForCausalLM:
    """A model of these sizes with random weights that are drawn on the device: what large shapes are timed with."""
    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.d_head,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
    )
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = LlamaForCausalLM(sizes)
        finally:
            torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


Context = tuple[torch.Tensor, torch.Tensor]
"""Ids before the prompt and behind it."""


def run(
    model: LlamaForCausalLM, prompt: torch.Tensor, around: Context, direction: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and cross-entropy of prompts given as one-hot rows (B, S, V) in one context.

    Target: the stream after block ``layer`` at the last token, projected on ``direction``. Cross-entropy of the prompt:
    nats per token that has a predecessor.
    """
    context, closing = around
    table = model.get_input_embeddings().weight
    before, behind = (table[ids][None].expand(prompt.shape[0], -1, -1) for ids in (context, closing))
    embeds = torch.cat([before, prompt @ table, behind], dim=1)
    out = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    target = out.hidden_states[layer + 1][:, -1] @ direction
    log_probs = torch.log_softmax(out.logits[:, :-1], dim=-1)
    labels = prompt if len(context) else prompt[:, 1:]
    end = len(context) + prompt.shape[1] - 1
    scored = log_probs[:, end - labels.shape[1] : end]
    return target, -(scored * labels).sum(-1).mean(-1)


class Search:
    """EPO with one population: ``step()`` makes, scores and selects one generation of children."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        layer: int,
        prompt_length: int = 8,
        population: int = 16,
        children: int = 32,
        top_k: int = 512,
        contexts: Sequence[Context] = (),
        batch: int = 512,
        seed: int = 0,
        direction: torch.Tensor | None = None,
        fluency: torch.Tensor | None = None,
    ) -> None:
        self.model, self.layer, self.children, self.batch = model, layer, children, batch
        self.vocab, self.device, self.dtype = model.config.vocab_size, model.device, model.dtype
        self.top_k = min(top_k, self.vocab - 1)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        nothing = torch.zeros(0, dtype=torch.long)
        self.contexts = [tuple(ids.to(self.device) for ids in one) for one in contexts or [(nothing, nothing)]]
        if direction is None:
            direction = torch.randn(model.config.hidden_size, generator=self.generator, device=self.device)
        self.direction = direction.to(self.dtype)
        self.fluency = torch.logspace(-1, 1, population, device=self.device) if fluency is None else fluency
        self.ids = self._integers(self.vocab, (population, prompt_length))
        self.target, self.cross_entropy = self.score(self.ids)
        self.gradient = self._gradients(self.ids, self.fluency)

    def _integers(self, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def _context(self) -> Context:
        return self.contexts[int(self._integers(len(self.contexts), (1,)))]

    def _one_hot(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids, self.vocab).to(self.dtype)

    def score(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Target and cross-entropy of prompts (M, S), ``batch`` rows in one forward call."""
        targets, entropies = [], []
        with torch.no_grad():
            for rows in ids.split(self.batch):
                both = run(self.model, self._one_hot(rows), self._context(), self.direction, self.layer)
                targets.append(both[0])
                entropies.append(both[1])
        return torch.cat(targets), torch.cat(entropies)

    def _gradients(self, ids: torch.Tensor, fluency: torch.Tensor) -> torch.Tensor:
        """Gradient (m, S, V) of J = fluency * cross-entropy - target with respect to the one-hot rows."""
        prompt = self._one_hot(ids).requires_grad_()
        target, cross_entropy = run(self.model, prompt, self._context(), self.direction, self.layer)
        return torch.autograd.grad((fluency * cross_entropy - target).sum(), prompt)[0]

    def step(self) -> None:
        """One generation."""
        population, length = self.ids.shape
        best = (-self.gradient).topk(self.top_k, dim=-1).indices
        parent = torch.arange(population, device=self.device).repeat_interleave(self.children)
        position = self._integers(length, parent.shape)
        token = best[parent, position, self._integers(self.top_k, parent.shape)]
        offspring = self.ids[parent].clone()
        offspring[torch.arange(len(parent), device=self.device), position] = token
        target, cross_entropy = self.score(offspring)
        target = torch.cat([self.target, target])
        cross_entropy = torch.cat([self.cross_entropy, cross_entropy])
        chosen = (self.fluency[:, None] * cross_entropy - target).argmin(dim=1)
        self.ids = torch.cat([self.ids, offspring])[chosen]
        self.target, self.cross_entropy = target[chosen], cross_entropy[chosen]
        self.gradient = self.gradient[chosen.clamp(max=population - 1)]
        new = torch.nonzero(chosen >= population)[:, 0]
        if len(new):
            self.gradient[new] = self._gradients(self.ids[new], self.fluency[new])


def measure(
    config: ModelConfig,
    *,
    params: Params | None = None,
    model: LlamaForCausalLM | None = None,
    layer: int | None = None,
    prompt_length: int = 8,
    population: int = 16,
    children: int = 32,
    contexts: Sequence[Context] = (),
    steps: int = 10,
    batch: int = 512,
    threads: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the loop on one model (``model``, or one with ``params``), after a small step that warms up.

    ``layer`` is read by the objective (default: the middle one). With ``contexts`` a forward call sees one of them, so
    a candidate costs one pass over its tokens and is judged in one context only:
    compare ``candidate_contexts_per_s`` with a search that judges every candidate in all contexts. ``batch`` rows make
    a forward call. ``threads`` are torch's (default: torch's own choice). Rates are from the median step.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = build(config, params) if model is None else model
    search = Search(
        model,
        layer=config.n_layers // 2 if layer is None else layer,
        prompt_length=prompt_length,
        population=population,
        children=1,
        contexts=contexts,
        batch=batch,
        seed=seed,
    )
    search.step()
    search.children = children
    seconds = []
    for _ in range(steps):
        _wait(model)
        started = time.perf_counter()
        search.step()
        _wait(model)
        seconds.append(time.perf_counter() - started)
    per_step = statistics.median(seconds)
    candidates = population * children
    return {
        "candidates_per_s": candidates / per_step,
        "candidate_contexts_per_s": candidates / per_step,
        "seconds_per_step": per_step,
        "seconds_per_step_all": seconds,
        "candidates_per_step": candidates,
        "contexts_per_candidate": 1,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def contexts_of(before: Sequence[np.ndarray], closing: Sequence[np.ndarray]) -> list[Context]:
    """Contexts for ``Search`` from the ids of slots."""
    both = zip(before, closing, strict=True)
    return [(torch.tensor(b.astype(np.int64)), torch.tensor(c.astype(np.int64))) for b, c in both]


def _wait(model: LlamaForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
