"""How fast are words for all latents? As a share of what matrix products reach on the same machine, in the same run.

python -m experiments.benchmarks.explain [--latents 4096] [--words 5000] [--width 4096] [--rounds 3] [--again]

Random vectors, float32. The share is that of the one product of latents and words, 2 C V D, which any way has to make,
in the best plain matrix product of the run. With ``--again`` logits are computed twice, as where they are too large to
keep (``words.KEPT``): the share is then at most a half.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.search_speed import matmul_rate, seconds_of
from jaxsteer.explain import words


def measure(latents: int, count: int, width: int, rounds: int) -> dict[str, Any]:
    """Seconds of ``mutual_words``, compiling left out, and its share of the matmul peak."""
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(rng.standard_normal((latents, width)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((count, width)) / np.sqrt(width), jnp.float32)
    peak = matmul_rate("float32")
    seconds = seconds_of(lambda: words.mutual_words(vectors, targets, top=min(50, count)), rounds)
    peak = max(peak, matmul_rate("float32"))
    best = min(seconds)
    return {
        "latents": latents,
        "words": count,
        "width": width,
        "seconds": seconds,
        "latents_times_words_per_s": latents * count / best,
        "matmul_gflops": peak / 1e9,
        "share_of_matmul_peak": 2.0 * latents * count * width / best / peak,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("latents", 4096), ("words", 5000), ("width", 4096), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--again", action="store_true", help="compute logits again, as where they are not kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.again:
        words.KEPT = 0
    found = measure(args.latents, args.words, args.width, args.rounds)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{jax.default_backend()}, {cores} cores, load {load:.1f}, jax {jax.__version__}")
    print(
        f"{found['latents']:,} latents x {found['words']:,} words at width {found['width']:,}: best "
        f"{min(found['seconds']):.2f} s of {args.rounds}, {found['latents_times_words_per_s']:.3g} latents x words per "
        f"second; {found['share_of_matmul_peak']:.0%} of the {found['matmul_gflops']:.1f} GFLOP/s of matrix products"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
