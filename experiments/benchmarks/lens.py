"""How fast is a lens over many texts? Beside TransformerLens: keep everything, then loop over the layers.

python experiments/benchmarks/lens.py [--texts 1000] [--rounds 3] [--json FILE]

A random Llama of 15M parameters (that of circuits.py) and texts of 64 random tokens, float32, the same weights, as many
threads on both sides as there are cores. Both read the embedding and the stream after every block, and keep entropy,
KL to the output, the five likeliest tokens, and the loss of the token that follows; the figures are compared. Rounds
alternate and one side computes at a time; compiling (a first batch) stands apart.

Theirs, in batches of 32: ``run_with_cache`` of the streams, then final norm and unembedding of one layer after the
other, all in ``torch.inference_mode``. Needs torch and transformer_lens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.circuits import make_model, timed
from experiments.benchmarks.generate import VOCAB, machine
from jaxsteer import lens
from jaxsteer.models.model import Model

LENGTH, TOP, BATCH = 64, 5, 32


def ours(model: Model, texts: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics [places, texts, tokens] by ``lens.read``."""
    cells = lens.read(model, list(texts), top=TOP).cells
    shape = (cells.kl.shape[0], *texts.shape)
    return {
        "kl": cells.kl.reshape(shape),
        "entropy": cells.entropy.reshape(shape),
        "loss": -cells.next_log_prob.reshape(shape),
    }


def cache_then_loop(model: Model) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The same by TransformerLens."""
    import torch

    from experiments.benchmarks.transformer_lens_peer import build_hooked

    c, net = model.config, build_hooked(model)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(c.n_layers))]

    def batch(ids: Any) -> list[Any]:
        logits, cache = net.run_with_cache(ids, names_filter=lambda name: name in names)
        output, found = logits.log_softmax(-1), []
        for name in names:
            log_p = net.unembed(net.ln_final(cache[name])).log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            kl = (output.exp() * (output - log_p)).sum(-1)
            log_p.topk(TOP)
            following = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            found.append((kl, entropy, -torch.nn.functional.pad(following, (0, 1), value=torch.nan)))
        return [torch.stack(each) for each in zip(*found, strict=True)]

    def run(texts: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            ids = torch.tensor(texts.astype(np.int64))
            parts = [batch(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)]
        return dict(zip(("kl", "entropy", "loss"), (torch.cat(each, 1).numpy() for each in zip(*parts)), strict=True))

    return run


def measure(count: int, rounds: int) -> dict[str, Any]:
    """Seconds of both sides, and the largest difference of their figures."""
    model = make_model()
    texts = np.random.default_rng(0).integers(3, VOCAB, (count, LENGTH)).astype(np.int32)
    sides: dict[str, Callable[[], dict[str, np.ndarray]]] = {"jaxsteer": lambda: ours(model, texts)}
    compiling, _ = timed(lambda: ours(model, texts[:BATCH]))
    if importlib.util.find_spec("transformer_lens"):
        theirs = cache_then_loop(model)
        sides["TransformerLens"] = lambda: theirs(texts)
        theirs(texts[:BATCH])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, dict[str, np.ndarray]] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            spent, found[name] = timed(side)
            seconds[name].append(spent)
    result = {"texts": count, "tokens": texts.size, "compiling": compiling, "seconds": seconds}
    if len(found) == 2:
        first, second = found.values()
        result["largest_difference"] = {name: float(np.nanmax(np.abs(first[name] - second[name]))) for name in first}
    return result


def table(result: dict[str, Any]) -> str:
    """The figures in words."""
    lines = [f"lens of {result['texts']} texts of {LENGTH} tokens; compiling {result['compiling']:.1f} s"]
    for name, spent in result["seconds"].items():
        middle = statistics.median(spent)
        lines.append(f"  {name}: {middle:.1f} s, {result['tokens'] / middle:,.0f} tokens/s (rounds: "
                     f"{', '.join(f'{each:.1f}' for each in spent)})")  # fmt: skip
    if len(result["seconds"]) == 2:
        ratios = [b / a for a, b in zip(*result["seconds"].values(), strict=True)]
        lines.append(f"  ratio {statistics.median(ratios):.2f}; largest differences {result['largest_difference']}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    result = {"machine": machine(), "lens": measure(options.texts, options.rounds)}
    print(table(result["lens"]))
    print(json.dumps(result["machine"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
