"""How fast does the engine of `jaxsteer serve` decode, plain and with settings of their own in every row?

python experiments/benchmarks/serving.py [--model MODEL] [--rows 1 8 32] [--settings 1 8 64] [--new 128] [--runs 3]
python experiments/benchmarks/serving.py --soak SECONDS

The model is a random 15M-parameter Llama (width 288, 6 layers, 32000 tokens), unless ``--model`` names one.
Prompts are 32 random tokens. For R rows 2 R requests are decoded (4 for one row); request i is steered by vector
i mod K at a layer of its own, with a strength that computes all and moves nothing (1e-6), so that all runs decode the
same number of tokens. Plain and steered runs alternate; rates are from median runs. On a machine that others use, the
processor time per token says more than the rate: the last column compares it with plain. Beside it
transformers' generate on the same weights and prompts, R rows in one batch, where torch is installed.

``--soak`` starts the HTTP server on organism:llama and lets 8 clients ask, go away in the middle, and send nonsense.
Answers are compared with what the same request gave alone; resident memory is read after a fifth of the time and at the
end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import socket
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, VOCAB, STRENGTH = 32, 32_000, 1e-6


def random_model(folder: Path) -> Any:
    """The 15M Llama, with a tokenizer that is not used."""
    import dataclasses

    import jax

    import jaxsteer
    from checkpoints_convert import write_hf
    from jaxsteer.models.config import llama_config
    from jaxsteer.models.params import init_params

    sizes = dict(vocab_size=VOCAB, d_model=288, n_layers=6, n_heads=6, d_mlp=768, max_positions=512)
    config = llama_config(**sizes, tied_embeddings=True)
    write_hf(init_params(config, jax.random.key(0)), config, folder / "model")
    model = jaxsteer.load(str(folder / "model"))
    return dataclasses.replace(model, tokenizer=jaxsteer.load("organism:llama").tokenizer)


def measure(model: Any, rows: list[int], settings: list[int], new: int, runs: int) -> list[dict[str, Any]]:
    """A dict for every number of rows and of settings (0: plain)."""
    from jaxsteer import steer
    from jaxsteer.engine import Engine, EngineOptions, Request
    from jaxsteer.models.roles import unlabelled
    from jaxsteer.models.sampling import Decoding

    vocab, width = min(len(model.tokenizer), model.config.vocab_size), model.config.d_model
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((max(settings), width))
    decoding = Decoding(temperature=0, max_new_tokens=new)

    def requests(count: int, k: int) -> list[Any]:
        made = []
        for i in range(count):
            site = f"blocks.{i % k % model.config.n_layers}.hook_resid_post" if k else ""
            edits = steer.add(site, vectors[i % k], STRENGTH) if k else None
            ids = rng.integers(3, vocab, PROMPT).astype(np.int32)
            made.append(Request(prompt=unlabelled(ids), decoding=decoding, edits=edits))
        return made

    found = []
    for r in rows:
        count = max(2 * r, 4)
        seconds: dict[int, list[float]] = {k: [] for k in (0, *settings)}
        worked: dict[int, list[float]] = {k: [] for k in seconds}
        tokens: dict[int, int] = {}
        with Engine(model, EngineOptions(rows=r, context=256, prefix_mib=0), warm=False) as engine:
            engine.run(requests(count, settings[0]))
            for _ in range(runs):
                for k, times in seconds.items():
                    asked = requests(count, min(k, count))
                    started, work = time.perf_counter(), time.process_time()
                    made = engine.run(asked)
                    times.append(time.perf_counter() - started)
                    worked[k].append(time.process_time() - work)
                    tokens[k] = sum(len(row.tokens) for row in made)
        for k, times in seconds.items():
            rate = [tokens[k] / t for t in times]
            work = 1000 * statistics.median(worked[k]) / tokens[k]
            found.append(
                {"rows": r, "settings": k, "tokens_per_second": statistics.median(rate), "runs": rate, "cpu_ms": work}
            )
    return found


def transformers_rates(folder: Path, rows: list[int], new: int, runs: int) -> dict[int, float]:
    """Tokens per second of transformers' generate; empty without torch or the model's files."""
    if importlib.util.find_spec("torch") is None or not (folder / "model").is_dir():
        return {}
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    found = {}
    for r in rows:
        ids = torch.tensor(np.random.default_rng(r).integers(3, VOCAB, (r, PROMPT)))
        seconds = []
        for run in range(runs + 1):
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
            seconds += [time.perf_counter() - started] if run else []
        found[r] = r * new / statistics.median(seconds)
    return found


def table(found: list[dict[str, Any]], peers: dict[int, float], new: int) -> str:
    plain = {one["rows"]: one["cpu_ms"] for one in found if not one["settings"]}
    lines = [f"{'rows':>5} {'settings':>9} {'tokens/s':>9} {'ms of processor time per token':>31} {'to plain':>9}"]
    for one in found:
        cells = f"{one['rows']:>5} {one['settings'] or 'plain':>9} {one['tokens_per_second']:>9.0f}"
        lines.append(f"{cells} {one['cpu_ms']:>31.2f} {one['cpu_ms'] / plain[one['rows']]:>9.2f}")
    lines += [f"{r:>5} {'transformers':>9} {rate:>6.0f}" for r, rate in peers.items()]
    cores = len(os.sched_getaffinity(0))
    return "\n".join([*lines, f"{PROMPT} + {new} tokens, {cores} cores, load {os.getloadavg()[0]:.1f}"])


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
        started, first = time.monotonic(), 0

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
        time.sleep(seconds / 5)
        first = resident()
        for thread in threads:
            thread.join()
        grown = resident() / first - 1
    return {"seconds": seconds, **counts, "resident_mib": first >> 20, "grown": f"{grown:.1%}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--settings", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--soak", type=float)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    if options.soak:
        result: Any = soak(options.soak)
        print(json.dumps(result))
    else:
        import jaxsteer

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = jaxsteer.load(options.model) if options.model else random_model(folder)
            result = measure(model, options.rows, options.settings, options.new, options.runs)
            print(table(result, transformers_rates(folder, options.rows, options.new, options.runs), options.new))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
