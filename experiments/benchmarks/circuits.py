"""How fast are patching and attribution? Beside a plain PyTorch loop, and EAP-IG's own code.

python experiments/benchmarks/circuits.py [--parts patching attribution memory] [--rounds 3] [--json FILE]

A random Llama of 15M parameters (that of generate.py) and texts of 64 random tokens, float32, the same weights, as many
threads on both sides as there are cores. Rounds alternate and one side computes at a time; compiling stands apart.

patching     every head at every position (2,304 patches of one text), exactly. Theirs: transformers, a forward pass for
             each with a hook on the output projection of one block; no gradients, cache, or logits but the last.
attribution  EAP-IG with 5 steps of 64 pairs of texts. Theirs: ``get_scores_eap_ig`` of hannamw/EAP-IG in
             TransformerLens with its four batch sizes, where both are installed; its device "cuda" is made the CPU.
             The scores are compared: theirs begin at the corrupted end, and count the other way round.
memory       no peer: two texts of 2,048 tokens with 8 GB free. What XLA says of every program that was tried (the last
             one runs), and the largest resident memory of the process afterwards: run this part alone.

Needs torch and transformers: ``make parity`` makes such an environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.generate import VOCAB, machine
from jaxsteer.circuits import memory as planned
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import run_circuits
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.paths import patch_edges
from jaxsteer.circuits.rows import make_rows
from jaxsteer.models import sharding
from jaxsteer.models.config import llama_config
from jaxsteer.models.model import Model
from jaxsteer.models.params import init_params
from jaxsteer.objectives import LogitDifference

LENGTH, PAIRS, STEPS = 64, 64, 5
LONG, FREE = 2048, 8_000_000_000
BATCHES = (4, 8, 16, 32)


def make_model() -> Model:
    """The random model, untied so that both libraries have one layout."""
    sizes = dict(vocab_size=VOCAB, d_model=288, n_layers=6, n_heads=6, d_mlp=768, max_positions=4096)
    config = llama_config(**sizes, tied_embeddings=True)
    return Model(
        params=init_params(config, jax.random.key(0)), config=config, tokenizer=None, name="15m", fingerprint="15m"
    )


def texts(count: int, length: int = LENGTH) -> list[np.ndarray]:
    """Pairs of texts that differ in every token."""
    return list(np.random.default_rng(count).integers(3, VOCAB, (2, count, length)).astype(np.int32))


def metric(count: int) -> LogitDifference:
    """Of two random tokens for each text."""
    plus, minus = np.random.default_rng(1).integers(3, VOCAB, (2, count)).astype(np.int32)
    return LogitDifference(plus=plus, minus=minus)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def rounds_of(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of every side, the first pass apart, and what they found."""
    first, found = {}, {}
    for name, call in sides.items():
        first[name], found[name] = timed(call)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            seconds[name].append(timed(call)[0])
    return {"first_seconds": first, "seconds": seconds}, found


# Patching


def torch_loop(model: Model, own: np.ndarray, other: np.ndarray) -> Callable[[], np.ndarray]:
    """One forward pass per patch: effects [layers, positions, heads]."""
    import torch

    from experiments.benchmarks.torch_peer import build

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net, config = build(model.config, model.params), model.config
    ids, source = (torch.tensor(text[None].astype(np.int64)) for text in (own, other))
    plus, minus = int(metric(1).plus[0]), int(metric(1).minus[0])

    def score() -> float:
        logits = net(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return float(logits[plus] - logits[minus])

    def loop() -> np.ndarray:
        kept: list[Any] = []
        with torch.inference_mode():
            hooks = [
                layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
                for layer in net.model.layers
            ]
            net(source, use_cache=False, logits_to_keep=1)
            for hook in hooks:
                hook.remove()
            base, effects = score(), np.zeros((config.n_layers, len(own), config.n_heads))
            for layer, block in enumerate(net.model.layers):
                for position in range(len(own)):
                    for head in range(config.n_heads):
                        place = (0, position, slice(head * config.d_head, (head + 1) * config.d_head))

                        def change(_: Any, args: Any, place: Any = place, value: Any = kept[layer]) -> Any:
                            z = args[0].clone()
                            z[place] = value[place]
                            return (z,)

                        hook = block.self_attn.o_proj.register_forward_pre_hook(change)
                        effects[layer, position, head] = score() - base
                        hook.remove()
        return effects

    return loop


def patching(model: Model, rounds: int) -> dict[str, Any]:
    """All heads x positions of one text."""
    (own,), (other,) = texts(1)
    rows, source = make_rows(model, [own]), make_rows(model, [other])
    sides: dict[str, Callable[[], Any]] = {
        "jaxsteer": lambda: patch(model, rows, metric(1), "attn.hook_z", source, heads="each").effects[0],
        "torch loop": torch_loop(model, own, other),
    }
    result, found = rounds_of(sides, rounds)
    ours, theirs = found["jaxsteer"], found["torch loop"]
    return result | {
        "patches": int(ours.size),
        "largest_effect": float(np.abs(theirs).max()),
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


# Attribution


def eap_ig(model: Model, clean: np.ndarray, corrupted: np.ndarray, batch: int) -> Callable[[], dict[str, float]]:
    """EAP-IG's own code on the same weights: scores by edge."""
    import eap.attribute
    import torch
    from eap.graph import Graph

    from experiments.benchmarks.transformer_lens_peer import build_hooked

    class OnCpu:
        """torch, whose zeros for "cuda" are on the CPU."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def zeros(self, *sizes: Any, device: str, **options: Any) -> Any:
            return torch.zeros(*sizes, **options)

    net = build_hooked(model, use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True)
    one = metric(len(clean))
    pairs = torch.tensor(np.stack([one.plus, one.minus], 1).astype(np.int64))
    eap.attribute.torch = OnCpu()
    eap.attribute.tokenize_plus = lambda _, ids: (
        ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]
    )  # fmt: skip
    both = [torch.tensor(each.astype(np.int64)) for each in (clean, corrupted)]
    data = [tuple(part[i : i + batch] for part in (*both, pairs)) for i in range(0, len(clean), batch)]

    def score(logits: Any, _: Any, __: Any, labels: Any) -> Any:
        two = logits[:, -1].gather(1, labels)
        return (two[:, 0] - two[:, 1]).sum()

    def run() -> dict[str, float]:
        graph = Graph.from_model(net)
        graph.scores[:] = eap.attribute.get_scores_eap_ig(net, graph, data, score, steps=STEPS, quiet=True)
        return {name: float(edge.score) for name, edge in graph.edges.items()}

    return run


def attribution(model: Model, rounds: int) -> dict[str, Any]:
    """5 steps, 64 pairs."""
    clean, corrupted = texts(PAIRS)
    rows, source = make_rows(model, list(clean)), make_rows(model, list(corrupted))

    def ours() -> dict[str, float]:
        found = attribute_edges(model, source, metric(PAIRS), rows, steps=STEPS, rule="left")
        return dict(zip(found.names, found.values, strict=True))

    sides: dict[str, Callable[[], Any]] = {"jaxsteer": ours}
    tried = {}
    if importlib.util.find_spec("eap") is not None:
        calls = {batch: eap_ig(model, clean, corrupted, batch) for batch in BATCHES}
        tried = {batch: timed(call)[0] for batch, call in calls.items()}
        sides["EAP-IG"] = calls[min(tried, key=tried.__getitem__)]
    result, found = rounds_of(sides, rounds)
    result |= {"pairs": PAIRS, "steps": STEPS, "edges": len(found["jaxsteer"]), "tried_seconds": tried}
    if "EAP-IG" in found:
        a, b = (np.array([found[side][name] for name in found["jaxsteer"]]) for side in sides)
        result |= {"largest_score": float(np.abs(b).max()), "largest_difference": float(np.abs(a + b).max())}
    return result


# Memory


def memory(model: Model, _: int) -> dict[str, Any]:
    """Every kind of work on long texts, once."""
    from unittest import mock

    tried: list[int] = []
    whole = planned.program_bytes

    def noted(lowered: Any, model: Model) -> int:
        tried.append(whole(lowered, model))
        return tried[-1]

    rows, source = (make_rows(model, list(each)) for each in texts(2, LONG))
    graph, one = Graph.of(model.config), metric(2)
    calls: dict[str, Callable[[], Any]] = {
        "patching": lambda: patch(model, rows, one, "attn.hook_z", source, layers=[5], positions=range(0, LONG, 128)),
        "attribution": lambda: attribute_edges(model, rows, one, source, steps=1),
        "edges": lambda: patch_edges(model, rows, one, source, ["input->logits", "m0->a5.h0<q>", "a0.h0->m5"]),
        "circuits": lambda: run_circuits(model, rows, one, source, graph, [graph.edges] * 3),
    }
    found: dict[str, Any] = {"tokens": LONG, "free_bytes": FREE, "programs": {}, "seconds": {}, "first_seconds": {}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mock.patch.object(sharding, "free_memory", lambda: FREE), mock.patch.object(planned, "program_bytes", noted):
        for name, call in calls.items():
            tried.clear()
            found["first_seconds"][name] = timed(call)[0]
            found["seconds"][name] = [found["first_seconds"][name]]
            found["programs"][name] = list(tried)
            found[f"resident_bytes_after_{name}"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"resident_bytes_before": 1024 * before}


PARTS: dict[str, Callable[[Model, int], dict[str, Any]]] = {
    "patching": patching,
    "attribution": attribution,
    "memory": memory,
}


def table(name: str, result: dict[str, Any]) -> str:
    """Medians over the rounds, and every ratio."""
    lines = [f"{name}: {json.dumps({k: v for k, v in result.items() if k not in ('seconds', 'first_seconds')})}"]
    for side, seconds in result["seconds"].items():
        first = result["first_seconds"][side]
        lines.append(f"{side:>12}  {statistics.median(seconds):>8.2f} s  (first pass {first:.2f} s)")
    if len(result["seconds"]) == 2:
        ours, theirs = result["seconds"].values()
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"ratio {statistics.median(ratios):.2f} (rounds: {each})")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    model, results = make_model(), {}
    for name in options.parts:
        results[name] = PARTS[name](model, options.rounds)
        print(table(name, results[name]), flush=True)
    result = {"machine": machine(), **results}
    print(json.dumps(result["machine"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
