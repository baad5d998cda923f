"""How fast does an SAE train? Activations per second, beside a measured ceiling and SAELens' trainer.

python experiments/benchmarks/sae_training.py [--sizes 128x1024 512x8192] [--batch 2048] [--steps 8] [--out FILE.json]

Timed is the call that ``jaxsteer sae train`` makes: a scan over steps that draw batches from a pool of activations. The
ceiling is a 2048 x 2048 float32 matrix product, timed before and after in the same process; the share counts the
five products that a step needs (x W_enc, f W_dec, and the gradients of W_enc, W_dec and f: 10 b D F operations) and
nothing else. Beside it, where ``sae_lens`` can be imported, the step of its trainer on the same batches in as many
threads. ``harvest`` is the rate at which a model's activations come into the pool, texts included (organism:llama).
Figures are ratios of one run on one machine: run it quietly.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from search_speed import matmul_rate

from jaxsteer.sae.recipe import Recipe, initial_state, trainer

K = 32
ARCHS = ("topk", "batchtopk", "jumprelu")


def activations(n: int, width: int) -> np.ndarray:
    """Sums of a few of 4 D random directions: something that can be learned."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4 * width, width)).astype(np.float32)
    out = 0.3 * rng.standard_normal((n, width)).astype(np.float32)
    for _ in range(8):
        out += rows[rng.integers(len(rows), size=n)] * rng.uniform(0.2, 1, (n, 1)).astype(np.float32)
    return out


def ours(arch: Any, width: int, latents: int, batch: int, steps: int, x: np.ndarray) -> dict[str, Any]:
    """The compiled call over ``steps`` steps, the median of three."""
    recipe = Recipe(site="none", latents=latents, arch=arch, k=K, batch=batch, pool=2 * batch * steps)
    pool = jnp.asarray(x)
    state, advance = initial_state(recipe, pool), trainer(recipe, width, None)
    before, seconds = matmul_rate(), []
    for number in range(4):
        started = time.perf_counter()
        state, metrics, _ = advance(state, pool, jnp.int32(number))
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - started) / steps)
    peak = max(before, matmul_rate())
    per_step = statistics.median(seconds[1:])
    return {
        "seconds_per_step": per_step,
        "activations_per_s": batch / per_step,
        "matmul_gflops": peak / 1e9,
        "share_of_matmul_peak": 10 * batch * width * latents / per_step / peak,
        "fvu": float(metrics.fvu[-1]),
    }


def peer(width: int, latents: int, batch: int, steps: int, x: np.ndarray) -> dict[str, Any] | None:
    """SAELens' BatchTopK trainer on the same batches, or ``None`` without it."""
    if importlib.util.find_spec("sae_lens") is None:
        return None
    import sae_lens
    import torch
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=width, d_sae=latents, k=K, device="cpu"))
    total = batch * (steps + 2)
    config = SAETrainerConfig(total_training_samples=total, train_batch_size_samples=batch, lr=3e-4, lr_end=3e-5)
    batches = [torch.from_numpy(x[i * batch : (i + 1) * batch]) for i in range(len(x) // batch)]
    fit = SAETrainer(config, sae, iter(batches))
    seconds = []
    for number in range(steps):
        started = time.perf_counter()
        fit.step(batches[number % len(batches)])
        fit.n_training_steps += 1
        seconds.append(time.perf_counter() - started)
    per_step = statistics.median(seconds[2:])
    return {
        "version": sae_lens.__version__,
        "torch": torch.__version__,
        "seconds_per_step": per_step,
        "activations_per_s": batch / per_step,
    }


def harvest_rate(rounds: int = 3) -> float:
    """Activations per second from the organism's texts into the pool, the median of a few fills."""
    from jaxsteer import load
    from jaxsteer.sae.harvest import batches_of, bos_of, empty_pool, fill
    from jaxsteer.sae.texts import Rows, documents_of

    model, capacity = load("organism:llama"), 1 << 15
    batches = batches_of(Rows(documents_of(model), rows=64, length=80, bos=bos_of(model)))
    pool = empty_pool(None, capacity, model.config.d_model, jnp.dtype("float32"))
    slots, seconds = jnp.arange(capacity), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        pool, _ = fill(pool, slots, model, "blocks.2.hook_resid_post", batches)
        jax.block_until_ready(pool)
        seconds.append(time.perf_counter() - started)
    return capacity / statistics.median(seconds[1:])


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x1024", "512x8192"], help="width x latents")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sae_training.json"))
    args = parser.parse_args(argv)
    rows = []
    print(f"{'size':>10} {'arch':>10} {'act/s':>9} {'of peak':>8} {'SAELens act/s':>14} {'ratio':>6}")
    for size in args.sizes:
        width, latents = (int(n) for n in size.split("x"))
        x = activations(2 * args.batch * args.steps, width)
        for arch in ARCHS:
            mine = ours(arch, width, latents, args.batch, args.steps, x)
            theirs = peer(width, latents, args.batch, args.steps, x) if arch == "batchtopk" else None
            ratio = theirs and mine["activations_per_s"] / theirs["activations_per_s"]
            rows.append({"size": size, "arch": arch, "batch": args.batch, "jaxsteer": mine, "sae_lens": theirs})
            beside = f"{theirs['activations_per_s']:14,.0f} {ratio:6.2f}" if theirs else ""
            print(
                f"{size:>10} {arch:>10} {mine['activations_per_s']:9,.0f} {mine['share_of_matmul_peak']:8.0%} {beside}",
                flush=True,
            )
    harvested = harvest_rate()
    print(f"harvest (organism:llama, blocks.2): {harvested:,.0f} activations/s")
    machine = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "rows": rows, "harvest_per_s": harvested}
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{args.out}: {machine}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
