"""How fast does the engine of `jaxsteer serve` decode, plain and with settings of their own in every row, beside peers?

python experiments/benchmarks/serving.py [--model MODEL] [--rows 1 8 32] [--settings 1 8 64] [--new 64] [--seconds 420]
python experiments/benchmarks/serving.py --soak SECONDS

The model is a random 15M-parameter Llama (width 288, 6 layers, 32000 tokens), unless ``--model`` names one.
Prompts are 32 random tokens. For R rows 2 R requests are decoded; request i is steered by vector i mod K at a layer of
its own, with a strength that computes all and moves nothing (1e-6), so that all sides decode the same number of tokens:
no token ends a row. Beside it, on the same prompts and weights, R rows at a time:

- ``jaxsteer.generate``, whose rows begin together,
- transformers' generate in float32, in an environment with torch,
- llama.cpp's server with R slots, in an environment with xllamacpp, where the model is a GGUF file. It computes with
  the quantised weights as they are; the others with what these stand for in float32.

All sides take turns, and each round visits all: rates are medians over rounds, and what is compared with plain is
compared within a round, so that a machine that others use too, or that slows down, disturbs all sides alike. Rounds go
on until their part of ``--seconds`` is over (two at least). The processor time per token says more than the rate where
others work beside.

``--soak`` starts the HTTP server on organism:llama and lets 8 clients ask, go away in the middle, and send nonsense.
Answers are compared with what the same request gave alone; resident memory is read after a fifth of the time and at the
end. It exits with 1 where an answer was wrong, a refusal had another form, or memory grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, VOCAB, STRENGTH = 32, 32_000, 1e-6
CORES = len(os.sched_getaffinity(0))

Side = Callable[[list[np.ndarray]], int]
"""Continues prompts; how many tokens it made."""


def random_model(folder: Path) -> Any:
    """The 15M Llama, with a tokenizer that is not used."""
    import jax

    import jaxsteer
    from checkpoints_convert import write_hf
    from jaxsteer.models.config import llama_config
    from jaxsteer.models.params import init_params

    sizes = dict(vocab_size=VOCAB, d_model=288, n_layers=6, n_heads=6, d_mlp=768, max_positions=512)
    config = llama_config(**sizes, tied_embeddings=True)
    write_hf(init_params(config, jax.random.key(0)), config, folder)
    model = jaxsteer.load(str(folder))
    return dataclasses.replace(model, tokenizer=jaxsteer.load("organism:llama").tokenizer)


def endless(model: Any) -> Any:
    """The model, whose rows no token ends."""
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.eos_token = None
    return dataclasses.replace(model, tokenizer=tokenizer, stop_tokens=())


# Sides


@contextlib.contextmanager
def ours(model: Any, rows: int, settings: list[int], new: int, context: int) -> Iterator[dict[str, Side]]:
    """The engine, plain and with K settings, and ``generate``."""
    import jaxsteer
    from jaxsteer import steer
    from jaxsteer.engine import Engine, EngineOptions, Request
    from jaxsteer.models.roles import unlabelled
    from jaxsteer.models.sampling import Decoding

    decoding = Decoding(temperature=0, max_new_tokens=new)
    vectors = np.random.default_rng(0).standard_normal((max(settings, default=1), model.config.d_model))

    def request(i: int, ids: np.ndarray, k: int) -> Any:
        site = f"blocks.{i % k % model.config.n_layers}.hook_resid_post" if k else ""
        edits = steer.add(site, vectors[i % k], STRENGTH) if k else None
        return Request(prompt=unlabelled(ids), decoding=decoding, edits=edits)

    def generated(prompts: list[np.ndarray]) -> int:
        return int(jaxsteer.generate(model, prompts, decoding, batch=rows).lengths.sum())

    with Engine(model, EngineOptions(rows=rows, context=context, prefix_mib=0), warm=False) as engine:

        def side(k: int) -> Side:
            return lambda prompts: sum(
                len(row.tokens) for row in engine.run([request(i, ids, k) for i, ids in enumerate(prompts)])
            )

        yield {"plain": side(0), **{f"K = {k}": side(k) for k in settings}, "generate": generated}


def transformers_side(source: Path, rows: int, new: int) -> Side | None:
    """Of transformers' generate; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(CORES)
    how: dict[str, Any] = {"gguf_file": source.name} if source.is_file() else {}
    folder = source.parent if source.is_file() else source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)

    def run(prompts: list[np.ndarray]) -> int:
        made = 0
        for begin in range(0, len(prompts), rows):
            ids = torch.tensor(np.stack(prompts[begin : begin + rows]), dtype=torch.long)
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
            made += out.shape[0] * (out.shape[1] - ids.shape[1])
        return made

    return run


def llama_cpp_side(source: Path, rows: int, new: int, context: int) -> Side | None:
    """llama.cpp's server in this process, asked by threads; None without xllamacpp or a GGUF file."""
    if importlib.util.find_spec("xllamacpp") is None or source.suffix != ".gguf":
        return None
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(source)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = rows * context, rows, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = CORES
    server = xllamacpp.Server(params)

    def one(ids: np.ndarray) -> int:
        asked = {"prompt": ids.tolist(), "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return int(server.handle_completions(asked)["usage"]["completion_tokens"])

    def run(prompts: list[np.ndarray]) -> int:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(one, prompts))

    return run


# Rounds


def measure(model: Any, source: Path, rows: int, options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """A dict for every side at so many rows."""
    began, new, context = time.monotonic(), options.new, options.context
    rng, vocab = np.random.default_rng(rows), min(len(model.tokenizer), model.config.vocab_size)
    prompts = [rng.integers(3, vocab, PROMPT).astype(np.int32) for _ in range(2 * rows)]
    settings = sorted({min(k, len(prompts)) for k in options.settings})
    rates: dict[str, list[float]] = {}
    work: dict[str, list[float]] = {}
    with ours(model, rows, settings, new, context) as sides:
        peers = {
            "transformers": transformers_side(source, rows, new),
            "llama.cpp": llama_cpp_side(source, rows, new, context),
        }
        sides |= {name: side for name, side in peers.items() if side is not None}
        for name in sides:  # programs are compiled, files read
            said(f"{rows} rows: {name} for the first time")
            some = prompts[:rows] if peers.get(name) else prompts
            assert (made := sides[name](some)) == len(some) * new, (name, made)
        count = 0
        while count < 2 or (time.monotonic() - began) * (count + 2) / (count + 1) <= seconds:
            count += 1
            for name, side in sides.items():
                said(f"{rows} rows, round {count}: {name}")
                started, worked = time.perf_counter(), time.process_time()
                made = side(prompts)
                rates.setdefault(name, []).append(made / (time.perf_counter() - started))
                work.setdefault(name, []).append(1000 * (time.process_time() - worked) / made)
    return [
        {
            "rows": rows, "side": name, "tokens_per_second": statistics.median(own), "runs": own,
            "cpu_ms": statistics.median(work[name]), "cpu_ms_runs": work[name],
            "to_plain": statistics.median(a / b for a, b in zip(own, rates["plain"], strict=True)),
            "cpu_to_plain": statistics.median(a / b for a, b in zip(work[name], work["plain"], strict=True)),
        }
        for name, own in rates.items()
    ]  # fmt: skip


def said(text: str) -> None:
    """What happens, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def table(found: list[dict[str, Any]], new: int) -> str:
    lines = [
        f"{'rows':>5} {'':<13}{'tokens/s':>9} {'least':>7} {'most':>7} {'to plain':>9}"
        f" {'ms of processor time per token':>31} {'to plain':>9}"
    ]
    for one in found:
        rates = f"{one['tokens_per_second']:>9.1f} {min(one['runs']):>7.1f} {max(one['runs']):>7.1f}"
        work = f"{one['cpu_ms']:>31.2f} {one['cpu_to_plain']:>9.2f}"
        lines.append(f"{one['rows']:>5} {one['side']:<13}{rates} {one['to_plain']:>9.2f} {work}")
    rounds = ", ".join(f"{n} of {r} rows" for r, n in {one["rows"]: len(one["runs"]) for one in found}.items())
    return "\n".join(
        [*lines, f"{PROMPT} + {new} tokens; rounds: {rounds}; {CORES} cores, load {os.getloadavg()[0]:.1f}"]
    )


# Soak


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server on organism:llama."""
    import jaxsteer
    from jaxsteer.engine import Engine, EngineOptions
    from jaxsteer.serve.app import make_app, make_server
    from jaxsteer.serve.library import Library

    model = jaxsteer.load("organism:llama")
    with Engine(model, EngineOptions(rows=8, timeout=60)) as engine:
        engine.wait_ready()
        server = make_server(make_app(engine, Library(model=model)), host="127.0.0.1", port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


def soak(seconds: float) -> dict[str, Any]:
    """What 8 clients saw, and how memory grew."""
    counts: Counter[str] = Counter()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((16, 128)).round(4).tolist()

    def body(i: int) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": f"The radio in house {i}", "max_tokens": 8 + i, "temperature": 0}
        edit = {"operation": "add", "site": f"blocks.{i % 4}.hook_resid_post", "values": vectors[i], "coefficient": 0.7}
        return asked | ({"steering": {"edits": [edit]}} if i % 2 else {})

    nonsense = [
        b"", b"{", b"[1]", b'{"prompt": 1}', b'{"prompt": "a", "steering": {"edits": [{"vector": "../x"}]}}',
        b'{"prompt": "a", "temperature": "NaN"}', b"\xff" * 100, b'{"prompt": "a", "unknown": 1}',
    ]  # fmt: skip

    with served() as address:

        def ask(data: bytes) -> tuple[int, Any]:
            request = urllib.request.Request(f"http://{address}/v1/completions", data=data)
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.status, json.loads(answer.read())
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())

        alone = {i: ask(json.dumps(body(i)).encode())[1]["choices"][0]["text"] for i in range(16)}
        started = time.monotonic()

        def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() - started < seconds:
                i, what = draw.randrange(16), draw.random()
                if what < 0.2:
                    status, found = ask(draw.choice(nonsense))
                    good = status >= 400 and set(found["error"]) == {"message", "type", "param", "code"}
                    counts["refused" if good else "WRONG REFUSAL"] += 1
                elif what < 0.4:
                    data = json.dumps(body(i) | {"max_tokens": 300, "temperature": 1, "stream": True}).encode()
                    host, port = address.split(":")
                    with socket.create_connection((host, int(port)), 30) as s:
                        head = (
                            f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(data)}\r\n\r\n"
                        )
                        s.sendall(head.encode() + data)
                        s.recv(draw.randrange(1, 2000))
                    counts["gone"] += 1
                else:
                    status, found = ask(json.dumps(body(i)).encode())
                    good = status == 200 and found["choices"][0]["text"] == alone[i]
                    counts["answered" if good else "WRONG ANSWER"] += 1

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        held = []
        while time.monotonic() - started < seconds:
            time.sleep(min(seconds / 20, 15))
            held.append(resident() >> 20)
        for thread in threads:
            thread.join()
        first, last = held[len(held) // 5], resident() >> 20
    wrong = sum(counts[name] for name in counts if name.startswith("WRONG"))
    return {
        "seconds": seconds, **counts, "resident_mib": held, "first_mib": first, "last_mib": last,
        "grown": last / first - 1, "good": not wrong and last / first <= 1.05,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--settings", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--context", type=int, default=256, help="room of a row in tokens")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--soak", type=float, help="seconds")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    good = True
    if options.soak:
        result: Any = soak(options.soak)
        print(json.dumps(result))
        good = result["good"]
    else:
        import jaxsteer

        with tempfile.TemporaryDirectory() as name:
            source = Path(options.model) if options.model else Path(name) / "model"
            model = endless(jaxsteer.load(options.model) if options.model else random_model(source))
            result, began = [], time.monotonic()
            for i, rows in enumerate(options.rows):
                left = options.seconds - (time.monotonic() - began)
                result += measure(model, source, rows, options, left / (len(options.rows) - i))
        said("")
        print(table(result, options.new))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
