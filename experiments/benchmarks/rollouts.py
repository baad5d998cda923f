"""How fast are rollouts: replies in roles, and the mean of their states at every block? Beside transformers.

python experiments/benchmarks/rollouts.py [--model GGUF] [--rollouts 64] [--new 32] [--rounds 3] [--batches 16 32 64]

With ``--model`` the roles and questions that ship, in the model's own chat template; without it a random Llama of 15M
parameters (that of generate.py) and prompts of 32 to 96 random tokens. Float32, the same weights, as many threads on
both sides as there are cores. Every reply has ``--new`` tokens: nothing stops it.

Ours is ``generate`` and ``read_rows``, as ``axis run`` calls them. Theirs is ``model.generate`` (left padding, its KV
cache, prompts in order of length) and a pass of the model without its head, in the same batches, with a hook on every
block that keeps the mean over the reply. Which of ``--batches`` suits it best is tried first. Each side has a process
of its own, which stays while the other one is measured: rounds alternate, and one of them computes at a time. The first
pass of each is greedy and warms up; of it the tokens and the means are compared. What is timed is drawn at temperature
0.7 and top-p 0.9. Needs torch: ``make parity`` makes such an environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.generate import VOCAB, machine, write_model

SAMPLED = {"temperature": 0.7, "top_p": 0.9}


@dataclasses.dataclass(frozen=True)
class Pass:
    """All rollouts once."""

    writing: float
    """Seconds."""
    reading: float
    tokens: np.ndarray
    """[rollouts, new]"""
    means: np.ndarray
    """[blocks, rollouts, width]"""

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.writing + self.reading


def make_prompts(model: str, count: int) -> list[np.ndarray]:
    """Token ids: of ``count`` rollouts of ``axis run``, evenly from its plan, or random ones."""
    if not model:
        rng = np.random.default_rng(0)
        return [rng.integers(3, VOCAB, rng.integers(32, 97)).astype(np.int32) for _ in range(count)]
    import jaxsteer
    from jaxsteer.axis.role_files import load_roles
    from jaxsteer.axis.rollouts import WritingOptions, plan
    from jaxsteer.prompts.generate import encode_prompts

    loaded, roles = jaxsteer.load(model), load_roles()
    asked = plan(roles, WritingOptions(), loaded.name)
    some = [asked[i] for i in np.linspace(0, len(asked) - 1, count).astype(int)]
    chats = [one.transcript([roles.questions[one.question]]).messages for one in some]
    return [row.ids for row in encode_prompts(loaded, chats)]


def write_weights(model: str, directory: Path) -> None:
    """The model as transformers and jaxsteer read it, without tokenizer and stop tokens."""
    if not model:
        return write_model(directory)
    import jaxsteer
    from checkpoints_convert import write_hf

    loaded = jaxsteer.load(model, dtype="float32")
    write_hf(loaded.params, loaded.config, directory)
    return None


def serve_jaxsteer(pipe: Connection, directory: str, prompts: list[np.ndarray], new: int) -> None:
    """Answers every (batch, sampled?) with a pass."""
    os.environ["JAXSTEER_CACHE"] = str(Path(directory).parent / "cache")
    import jaxsteer
    from jaxsteer.models.reading import direction_sites, read_rows
    from jaxsteer.models.sites import resid_site

    model = dataclasses.replace(jaxsteer.load(directory, dtype="float32"), stop_tokens=())
    sites = direction_sites(model, [resid_site(layer) for layer in range(model.config.n_layers)])
    pipe.send({"threads": len(os.sched_getaffinity(0))})
    while asked := pipe.recv():
        batch, sampled = asked
        started = time.perf_counter()
        how = SAMPLED if sampled else {"temperature": 0.0}
        made = jaxsteer.generate(model, prompts, max_new_tokens=new, batch=batch, **how)
        written = time.perf_counter()
        rows = [np.concatenate(pair) for pair in zip(prompts, made.tokens, strict=True)]
        masks = [np.arange(len(row)) >= len(row) - new for row in rows]
        means = np.empty((len(sites), len(rows), model.config.d_model), np.float32)
        for numbers, values in read_rows(model, rows, masks, sites):
            means[:, numbers] = values
        pipe.send(Pass(written - started, time.perf_counter() - written, made.tokens, means))


def serve_transformers(pipe: Connection, directory: str, prompts: list[np.ndarray], new: int) -> None:
    """The same with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from jaxsteer.models.padding import pad_rows

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    order, kept = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), []

    def keep(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden[:, -new:].float().mean(1))

    def write(ids: Any, mask: Any, sampled: bool) -> Any:
        how = SAMPLED | {"top_k": 0} if sampled else {}
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=sampled, **how)

    def read(ids: Any, mask: Any) -> np.ndarray:
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        kept.clear()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return torch.stack(kept).numpy()

    pipe.send({"threads": torch.get_num_threads()})
    while asked := pipe.recv():
        batch, sampled = asked
        started = time.perf_counter()
        parts = [order[i : i + batch] for i in range(0, len(order), batch)]
        inputs = []
        for part in parts:
            ids, mask = pad_rows([prompts[i] for i in part], left=True)
            inputs.append((torch.tensor(ids.astype(np.int64)), torch.tensor(mask.astype(np.int64))))
        with torch.inference_mode():
            made = [write(ids, mask, sampled) for ids, mask in inputs]
            written = time.perf_counter()
            hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
            found = [read(ids, mask) for ids, (_, mask) in zip(made, inputs, strict=True)]
        for hook in hooks:
            hook.remove()
        ended = time.perf_counter()
        back = np.argsort(order)
        tokens = np.concatenate([ids[:, -new:].numpy() for ids in made])[back]
        pipe.send(Pass(written - started, ended - written, tokens, np.concatenate(found, 1)[:, back]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed."""
    context = multiprocessing.get_context("spawn")
    prompts = make_prompts(options.model, options.rollouts)
    sides: dict[str, Connection] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_weights(options.model, directory)
        threads = {}
        for name, serve in (("transformers", serve_transformers), ("jaxsteer", serve_jaxsteer)):
            sides[name], theirs = context.Pipe()
            given = (theirs, str(directory), prompts, options.new)
            context.Process(target=serve, args=given, daemon=True).start()
            threads[name] = sides[name].recv()["threads"]

        def ask(name: str, batch: int, sampled: bool) -> Pass:
            sides[name].send((batch, sampled))
            found: Pass = sides[name].recv()
            return found

        tried = {batch: ask("transformers", batch, False) for batch in options.batches}
        best = min(tried, key=lambda batch: tried[batch].seconds)
        batches, first = {"transformers": best, "jaxsteer": options.batch}, ask("jaxsteer", options.batch, False)
        rounds: dict[str, list[Pass]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name in sides:
                rounds[name].append(ask(name, batches[name], True))
        for pipe in sides.values():
            pipe.send(None)
    equal = (first.tokens == tried[best].tokens).all(-1)
    apart = np.abs(first.means[:, equal] - tried[best].means[:, equal]).max() if equal.any() else np.nan
    return {
        "model": options.model or "15m",
        "rollouts": len(prompts),
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "new_tokens": options.new,
        "threads": threads,
        "batches": batches,
        "tried_seconds": {batch: found.seconds for batch, found in tried.items()},
        "first_pass_seconds": first.seconds,
        "rows_with_equal_tokens": float(equal.mean()),
        "largest_difference_of_means": float(apart),
        "largest_mean": float(np.abs(first.means).max()),
        "seconds": {
            name: [{"writing": one.writing, "reading": one.reading} for one in every] for name, every in rounds.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Medians over the rounds."""
    lines = [f"{'':>13}  {'rollouts/s':>10}  {'writing s':>9}  {'reading s':>9}  {'batch':>5}"]
    rates = {}
    for name, every in result["seconds"].items():
        rates[name] = [result["rollouts"] / (one["writing"] + one["reading"]) for one in every]
        writing, reading = (statistics.median(one[part] for one in every) for part in ("writing", "reading"))
        rate, batch = statistics.median(rates[name]), result["batches"][name]
        lines.append(f"{name:>13}  {rate:>10.2f}  {writing:>9.2f}  {reading:>9.2f}  {batch:>5}")
    ratios = [ours / theirs for ours, theirs in zip(rates["jaxsteer"], rates["transformers"], strict=True)]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    lines.append(f"ratio {statistics.median(ratios):.2f} (rounds: {each})")
    shown = {key: value for key, value in result.items() if key != "seconds"}
    return "\n".join([*lines, json.dumps(shown)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a GGUF file (default: the random model)")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64], help="tried with transformers")
    parser.add_argument("--batch", type=int, default=64, help="replies that jaxsteer writes at the same time")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    result = {"machine": machine()} | measure(options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
