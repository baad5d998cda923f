"""How fast is a search? Beside a matrix product, the published loop in PyTorch, and nanoGCG, in the same run.

python experiments/benchmarks/search_speed.py [--quick] [--json [FILE]] [--models organism 15m 125m] [--parts ...]

| part | what it measures |
|---|---|
| steps | a step of EPO (16 parents, 512 children, 8 tokens) without and with 16 contexts of 64; and torch_peer.py |
| gcg | a step of GCG (512 candidates, 8 tokens, a target of 4) without and with a context of 64; and nanogcg_peer.py |
| target | seconds until a prompt reaches a given projection on the organism, and the same in torch_peer.py |
| compile | seconds to compile a step at 4 and at 80 layers |
| problems | candidates per second of ``run_search`` with 1, 16, 256 and 4,096 problems |
| real | a step of EPO of a real model (``--model FILE``): 8 parents, 128 children, 4 conversations; and torch_peer.py |
| restarts | four searches per core side by side, beside the published loop alone and in a process per core |

The ceiling is a matrix product timed before and after in the same process; "of peak" counts the multiplications that a
step has to do, children sharing their parents' tokens (``step_flops``); "plain" counts those of a step that runs every
child whole. Rates are from the median step and count every candidate in every context, because the published loop
judges a candidate in one context only. Peers are measured where torch and nanoGCG are installed (``pip install
'jaxsteer[bench]'``). Figures are ratios of one run on one machine: run it quietly, and the last two parts, which give
every core a device (or JAX_NUM_CPU_DEVICES of them), apart from the others.

A GPU: ``--shape llama-3.1-8b --dtype bfloat16`` (any name of ``jaxsteer.checkpoints.published``, or "tiny") makes
random weights on the device and measures steps and gcg there, with the utilisation of the device's matrix units and the
memory used. ``--layers`` cuts the depth.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need memory of the same device

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from jaxsteer.checkpoints.published import NAMES, published_config
from jaxsteer.models.config import ModelConfig, llama_config
from jaxsteer.models.params import Params, init_params
from jaxsteer.objectives import Projection, TargetLogProb, needs
from jaxsteer.prompt_search import EpoConfig, Task, make_problem, make_task
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompt_search.algorithms.gcg import GcgConfig, gcg
from jaxsteer.prompt_search.shared_scoring import score_children, starts
from jaxsteer.prompts import Slots

POPULATION, CHILDREN, LENGTH = 16, 32, 8
CONTEXTS, CONTEXT_LENGTH = 16, 64
TARGET = 4
PARTS = ("steps", "gcg", "target", "compile", "problems", "restarts", "real")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
"""bf16 FLOP/s of the matrix units as their makers give them (dense), for the utilisation."""


def tiny() -> ModelConfig:
    """A shape to try the benchmark itself."""
    return llama_config(vocab_size=300, d_model=32, n_layers=2, n_heads=2, d_mlp=64, max_positions=256)


def organism() -> ModelConfig:
    """The shape of the shipped organism."""
    from jaxsteer.checkpoints.loading import load

    return load("organism:llama").config


SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "organism": organism,
    "15m": lambda: llama_config(vocab_size=32_000, d_model=288, n_layers=6, n_heads=6, d_mlp=768, max_positions=256),
    "125m": lambda: llama_config(
        vocab_size=32_000, d_model=768, n_layers=12, n_heads=12, d_mlp=2048, max_positions=256
    ),
}


def slots_of(contexts: int, vocab_size: int, *, target: int = 0) -> Slots:
    """Slots of random ids: BOS alone, or ``contexts`` texts of 64 tokens; the last slot token is read."""
    rng = np.random.default_rng(0)
    before = [np.asarray([1], np.int32)]
    if contexts:
        before = [rng.integers(2, vocab_size, CONTEXT_LENGTH).astype(np.int32) for _ in range(contexts)]
    nothing = [np.zeros(0, np.int32)] * len(before)
    return Slots(
        before=before,
        after=nothing,
        closing=nothing,
        read_index=np.full(len(before), LENGTH - 1, np.int32),
        conversations=(),
        length=LENGTH,
        surroundings=(),
        target=tuple(rng.integers(2, vocab_size, target).astype(np.int32) for _ in before) if target else (),
    )


def task_of(params: Params, config: ModelConfig, objective: Any, slots: Slots, batch: int | None = None) -> Task:
    """A task that allows every token but the first two."""
    allowed = np.arange(config.vocab_size) > 1
    return make_task(params, config, slots, needs=needs(objective, config), allowed=allowed, batch=batch)


def projection(config: ModelConfig) -> Projection:
    """A random direction in the middle of the model."""
    delta = jax.random.normal(jax.random.key(1), (config.d_model,))
    return Projection(delta=delta, site=f"blocks.{config.n_layers // 2}.hook_resid_post")


def seconds_of(step: Callable[[], Any], steps: int, *, warm: bool = True) -> list[float]:
    """Wall seconds of every call, after one that warms up."""
    if warm:
        jax.block_until_ready(step())
    out = []
    for _ in range(steps):
        started = time.perf_counter()
        jax.block_until_ready(step())
        out.append(time.perf_counter() - started)
    return out


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a matrix product, the best of a few."""
    n = 8192 if jax.default_backend() != "cpu" else 2048 if dtype == "float32" else 256
    a = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / min(seconds_of(lambda: product(a, a), 8))


def step_flops(config: ModelConfig, contexts: int, *, shared: bool = True) -> dict[str, float]:
    """Matrix-product FLOPs that scoring the children and the rest of a step of EPO need.

    2 per weight and token; attention and top-k are left out. Children: the blocks at their tokens (above the
    objective's layer only those that predict another slot token), and the unembedding where a next token is scored.
    ``shared``: half of their tokens are their parents', which run once more for that; otherwise all are run. The rest:
    the parents' forward pass, its repetition under rematerialisation and the gradient, and the vocabulary products of
    the proposals.
    """
    d, c, s = config.d_model, max(contexts, 1), LENGTH
    block = d * config.d_head * (2 * config.n_heads + 2 * config.n_kv_heads) + 3 * d * config.d_mlp
    read = config.n_layers // 2 + 1

    def row(tokens: float, predictors: float) -> float:
        blocks = (tokens * read + predictors * (config.n_layers - read)) * block
        return blocks + predictors * d * config.vocab_size

    whole = row(s, s - 1)
    parents = (s - 1) * (config.n_layers * block + d * config.vocab_size)
    children = CHILDREN * row((s + 1) / 2, (s - 1) / 2) + parents if shared else CHILDREN * whole
    rest = POPULATION * c * 3 * whole + POPULATION * s * (c + 1) * d * config.vocab_size
    return {"scoring": 2.0 * POPULATION * c * children, "rest": 2.0 * rest}


def measure_step(
    config: ModelConfig, params: Params, contexts: int, steps: int, dtype: str = "float32"
) -> dict[str, Any]:
    """A step of EPO on one problem from a random population, and the scoring of its children alone."""
    objective = projection(config)
    task = task_of(params, config, objective, slots_of(contexts, config.vocab_size))
    search = epo(EpoConfig(population=POPULATION, children=CHILDREN))
    problem = make_problem(objective, POPULATION, seed=2)
    state = jax.jit(search.init)(params, task, problem)
    compiled = jax.jit(search.step).lower(params, task, problem, state).compile()
    plan = starts(CHILDREN, LENGTH)
    brood = jnp.repeat(state.ids, CHILDREN, axis=0)
    scoring = jax.jit(score_children, static_argnums=5)

    def step() -> Any:
        nonlocal state
        state, summary = compiled(params, task, problem, state)
        return summary

    peak = matmul_rate(dtype)
    seconds = seconds_of(step, steps, warm=steps > 1)
    alone = statistics.median(
        seconds_of(lambda: scoring(params, task, objective, state.ids, brood, plan), max(1, steps - 1))
    )
    peak = max(peak, matmul_rate(dtype))
    per_step = statistics.median(seconds)
    rows = POPULATION * CHILDREN * max(contexts, 1)
    flops = step_flops(config, contexts)
    plain = sum(step_flops(config, contexts, shared=False).values())
    out = {
        "candidates_per_s": POPULATION * CHILDREN / per_step,
        "candidate_contexts_per_s": rows / per_step,
        "seconds_per_step": per_step,
        "seconds_per_step_all": seconds,
        "seconds_scoring": alone,
        "matmul_gflops": peak / 1e9,
        "share_of_matmul_peak": sum(flops.values()) / per_step / peak,
        "share_of_matmul_peak_scoring": flops["scoring"] / alone / peak,
        "plain_share_of_matmul_peak": plain / per_step / peak,
        "step_temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }
    limit = next((v for name, v in PEAKS.items() if name in jax.devices()[0].device_kind), None)
    if limit is not None:
        out["utilisation_scoring"] = flops["scoring"] / alone / limit
        out["utilisation_step"] = sum(flops.values()) / per_step / limit
    memory = jax.devices()[0].memory_stats()
    return out | ({"device_peak_gib": memory["peak_bytes_in_use"] / 2**30} if memory else {})


def measure_gcg(config: ModelConfig, params: Params, contexts: int, steps: int) -> dict[str, Any]:
    """A step of GCG against a target of random tokens."""
    objective = TargetLogProb()
    task = task_of(params, config, objective, slots_of(contexts, config.vocab_size, target=TARGET))
    search = gcg(GcgConfig(search_width=POPULATION * CHILDREN))
    problem = make_problem(objective, 1, seed=2)
    state = jax.jit(search.init)(params, task, problem)
    step = jax.jit(search.step)

    def one() -> Any:
        nonlocal state
        state, summary = step(params, task, problem, state)
        return summary

    seconds = seconds_of(one, steps)
    per_step = statistics.median(seconds)
    return {
        "candidates_per_s": POPULATION * CHILDREN / per_step,
        "seconds_per_step": per_step,
        "seconds_per_step_all": seconds,
    }


def here(*modules: str) -> bool:
    """Whether a peer's packages are installed."""
    return all(importlib.util.find_spec(module) for module in modules)


def best(rates: list[dict[str, Any]], key: str = "candidates_per_s") -> dict[str, Any] | None:
    """The fastest of several settings of a peer."""
    return max(rates, key=lambda rate: rate[key], default=None)


def compare_steps(
    name: str, config: ModelConfig, params: Params, theirs: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the part "steps": ours, and the published loop at its own batch of 2 and at larger ones."""
    rows = []
    for contexts in (0, CONTEXTS):
        heavy = config.d_model >= 512 and contexts > 0
        ours = measure_step(config, params, contexts, 1 if heavy else args.steps, args.dtype)
        peers = []
        if theirs is not None:
            import torch_peer

            slots = slots_of(contexts, config.vocab_size)
            around = torch_peer.contexts_of(slots.before, slots.closing) if contexts else ()
            # A candidate of the large model in a context takes seconds at batch 2: only the larger batch is run.
            for batch in (64,) if heavy else (2, 64, 512):
                steps = 1 if batch == 2 or contexts else min(args.steps, 3)
                peers.append(
                    torch_peer.measure(
                        config,
                        model=theirs,
                        prompt_length=LENGTH,
                        population=POPULATION,
                        children=CHILDREN,
                        contexts=around,
                        steps=steps,
                        batch=batch,
                    )
                )
        fastest = best(peers)
        at_two = next((p["candidates_per_s"] for p in peers if p["batch"] == 2), None)
        ratio = fastest and ours["candidate_contexts_per_s"] / fastest["candidates_per_s"]
        rows.append({"model": name, "contexts": contexts, "jaxsteer": ours, "torch": peers, "ratio": ratio})
        print(
            f"{name:12} {contexts:8} {ours['candidates_per_s']:9,.0f} {ours['candidate_contexts_per_s']:12,.0f} "
            f"{ours['share_of_matmul_peak']:8.0%} {ours['share_of_matmul_peak_scoring']:8.0%} "
            f"{ours['plain_share_of_matmul_peak']:8.0%} {shown(at_two)} "
            f"{shown(fastest and fastest['candidates_per_s'])} {shown(ratio, 1)}",
            flush=True,
        )
    return rows


def compare_gcg(
    name: str, config: ModelConfig, params: Params, theirs: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the part "gcg": ours, and nanoGCG with its prefix cache."""
    rows = []
    # A step of nanoGCG on the large model takes a minute or so: one setting and one step of it.
    heavy = config.d_model >= 512
    settings = [(128, True)] if heavy else [(None, True), (128, True), (None, False)]
    for contexts in (0, 1):
        ours = measure_gcg(config, params, contexts, 1 if heavy else min(args.steps, 3))
        peers = []
        if theirs is not None and here("nanogcg"):
            import nanogcg_peer

            peers = [
                nanogcg_peer.measure(
                    theirs,
                    prompt_length=LENGTH,
                    context_length=CONTEXT_LENGTH * contexts,
                    target_length=TARGET,
                    search_width=POPULATION * CHILDREN,
                    steps=1 if heavy else min(args.steps, 2),
                    batch=batch,
                    collect=collect,
                )
                for batch, collect in settings
            ]
        fastest = best([p for p in peers if p["collects"]])
        ratio = fastest and ours["candidates_per_s"] / fastest["candidates_per_s"]
        rows.append({"model": name, "contexts": contexts, "jaxsteer": ours, "nanogcg": peers, "ratio": ratio})
        silent = best([p for p in peers if not p["collects"]])
        print(
            f"{name:12} {contexts:8} {ours['candidates_per_s']:9,.0f} {shown(fastest and fastest['candidates_per_s'])} "
            f"{shown(silent and silent['candidates_per_s'])} {shown(ratio, 1)}",
            flush=True,
        )
    return rows


def shown(value: float | None, digits: int = 0) -> str:
    """A number in a column, or a dash."""
    return f"{'-':>9}" if value is None else f"{value:9,.{digits}f}"


def peer_model(config: ModelConfig, params: Params | None, dtype: str) -> Any:
    """The model for the peers (with our weights, or random ones where ``params`` is ``None``), or nothing."""
    if not here("torch"):
        return None
    import torch
    import torch_peer

    if params is not None:
        return torch_peer.build(config, params)
    return torch_peer.build_random(config, dtype, "cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the organism's shape, fewer steps and problems")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", help="of the part real: GGUF file, directory or hub id of a Llama-like chat model")
    parser.add_argument("--shape", choices=("tiny", *NAMES), help="random weights of this shape on the device")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, help="with --shape: this many layers of it")
    parser.add_argument("--json", nargs="?", type=Path, const=Path("runs/benchmarks/search_speed.json"))
    args = parser.parse_args(argv)
    args.steps = min(args.steps, 2) if args.quick else args.steps
    names = args.models or (["organism"] if args.quick else ["organism", "15m", "125m"])
    parts = args.parts or (PARTS[:2] if args.shape else PARTS[:-1])
    if ("real" in parts) != bool(args.model):
        parser.error("--parts real and --model belong together")
    if {"problems", "restarts"} & set(parts) and "JAX_NUM_CPU_DEVICES" not in os.environ:  # as ``jaxsteer search`` does
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    import search_parts

    found: dict[str, Any] = {part: [] for part in parts}
    for part in [p for p in ("steps", "gcg") if p in parts]:
        print(HEADS[part])
        for name in [args.shape] if args.shape else names:
            config = (SHAPES[name] if name in SHAPES else lambda: published_config(name))()  # noqa: B023
            if args.layers:
                config = cut(config, args.layers)
            params = jax.jit(init_params, static_argnums=(0, 2))(config, jax.random.key(0), args.dtype)
            theirs = peer_model(config, None if args.shape else params, args.dtype)
            found[part] += (compare_steps if part == "steps" else compare_gcg)(name, config, params, theirs, args)
    for part in [p for p in parts if p in ("target", "compile", "problems")]:
        found[part] = getattr(search_parts, part)(args.quick)
    if "real" in parts:
        found["real"] = search_parts.real(args.model, args.steps)
    if "restarts" in parts:
        print(HEADS["restarts"])
        found["restarts"] = [
            search_parts.restarts(name, SHAPES[name](), 1 if name == "125m" else args.steps) for name in names
        ]
    machine = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(machine)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, **found}, indent=2, default=float) + "\n")
        print(args.json)
    return 0


HEADS = {
    "steps": f"{'model':12} {'contexts':>8} {'cand/s':>9} {'cand x ctx/s':>12} {'of peak':>8} {'scoring':>8} "
    f"{'plain':>8} {'torch b2':>9} {'best':>9} {'ratio':>9}",
    "gcg": f"{'model':12} {'contexts':>8} {'cand/s':>9} {'nanoGCG':>9} {'no gc':>9} {'ratio':>9}",
    "restarts": f"{'model':12} {'searches':>8} {'cand/s':>9} {'torch':>9} {'ratio':>9} {'per core':>9} {'ratio':>9}",
}


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The first layers of a shape."""
    return dataclasses.replace(
        config, n_layers=layers, windows=config.windows[:layers], rope_index=config.rope_index[:layers]
    )


if __name__ == "__main__":
    sys.exit(main())
