"""How fast are tokens generated? Beside transformers' generate, on the same machine, with the same weights.

python experiments/benchmarks/generate.py [--batches 32 1] [--runs 5] [--json FILE]

A random 15M-parameter Llama (width 288, 6 layers, 6 heads, 32000 tokens, tied embeddings), float32, prompts of 32
random tokens, 128 new ones, greedy, no stop token. Each side has a process of its own, which stays while the other one
is measured: runs alternate, and one of them computes at a time. Before that each side is warmed up (what that takes is
reported apart), and transformers gets the number of threads that suits it best, tried at the start. Rates are from the
median run. Both must give the same tokens, but for ties. Needs torch: ``make parity`` makes such an environment.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW, VOCAB = 32, 128, 32_000


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(3, VOCAB, (batch, PROMPT)).astype(np.int32)


def write_model(directory: Path) -> None:
    """The random model in Hugging Face format."""
    import jax

    from checkpoints_convert import write_hf
    from jaxsteer.models.config import llama_config
    from jaxsteer.models.params import init_params

    sizes = dict(vocab_size=VOCAB, d_model=288, n_layers=6, n_heads=6, d_mlp=768, max_positions=256)
    config = llama_config(**sizes, tied_embeddings=True)
    write_hf(init_params(config, jax.random.key(0)), config, directory)


def serve_jaxsteer(pipe: Connection, directory: str) -> None:
    """Answers every batch size with (seconds, tokens)."""
    os.environ["JAXSTEER_CACHE"] = str(Path(directory).parent / "cache")
    import jaxsteer

    model = jaxsteer.load(directory)
    pipe.send({"threads": len(os.sched_getaffinity(0))})
    while batch := pipe.recv():
        ids = list(prompts(batch))
        started = time.perf_counter()
        made = jaxsteer.generate(model, ids, max_new_tokens=NEW, temperature=0)
        pipe.send((time.perf_counter() - started, made.tokens))


def serve_transformers(pipe: Connection, directory: str) -> None:
    """The same with transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)

    def run(batch: int, new: int) -> tuple[float, np.ndarray]:
        ids = torch.tensor(prompts(batch).astype(np.int64))
        started = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        return time.perf_counter() - started, out[:, PROMPT:].numpy()

    available, seconds = len(os.sched_getaffinity(0)), {}
    for threads in sorted({1, available // 2 or 1, available}):
        torch.set_num_threads(threads)
        run(32, 8)
        seconds[threads] = min(run(32, 32)[0] for _ in range(3))
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    pipe.send({"threads": best, "seconds_by_threads": seconds})
    while batch := pipe.recv():
        pipe.send(run(batch, NEW))


def measure(batches: list[int], runs: int) -> dict[str, Any]:
    """Everything that is printed."""
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    result: dict[str, Any] = {"batches": {}, "sides": {}}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_model(directory)
        for name, serve in (("transformers", serve_transformers), ("jaxsteer", serve_jaxsteer)):
            sides[name], theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, str(directory)), daemon=True).start()
            result["sides"][name] = sides[name].recv()

        def ask(name: str, batch: int) -> tuple[float, np.ndarray]:
            sides[name].send(batch)
            return sides[name].recv()

        for batch in batches:
            first = {name: ask(name, batch) for name in sides}
            same = float((first["jaxsteer"][1] == first["transformers"][1]).all(-1).mean())
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(runs):
                for name in sides:
                    seconds[name].append(ask(name, batch)[0])
            result["batches"][batch] = {
                "first_call_seconds": {name: value[0] for name, value in first.items()},
                "seconds": seconds,
                "tokens_per_second": {name: batch * NEW / statistics.median(s) for name, s in seconds.items()},
                "rows_with_equal_tokens": same,
            }
        for pipe in sides.values():
            pipe.send(0)
    return result


def machine() -> dict[str, Any]:
    import jax
    import torch
    import transformers

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'batch':>5}  {'jaxsteer':>10}  {'transformers':>12}  {'ratio':>6}  {'equal rows':>10}  first call of each"
    ]
    for batch, found in result["batches"].items():
        ours, theirs = (found["tokens_per_second"][name] for name in ("jaxsteer", "transformers"))
        first = found["first_call_seconds"]
        rates = f"{batch:>5}  {ours:>10.0f}  {theirs:>12.0f}  {ours / theirs:>6.2f}"
        equal = f"{found['rows_with_equal_tokens']:>10.0%}"
        lines.append(f"{rates}  {equal}  {first['jaxsteer']:.1f} s, {first['transformers']:.1f} s")
    threads = {name: side["threads"] for name, side in result["sides"].items()}
    note = f"tokens per second, {PROMPT} + {NEW} tokens, float32, greedy; threads: {threads}; {result['machine']}"
    return "\n".join([*lines, note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    result = {"machine": machine()} | measure(options.batches, options.runs)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
