"""How fast is conversion beside ``cp``, and how much memory do conversion and loading take?

python experiments/benchmarks/convert.py [--gib 4] [--repeat 3] [--dir DIR] [--json FILE]

A random checkpoint of Llama shape (bfloat16, in shards of about 1 GiB) is made in a new directory under ``--dir`` and
removed at the end. Then, in turn, ``--repeat`` times: ``cp -r`` of it, with every file of the copy fsync'ed; and
``python -m checkpoints_convert`` in a fresh process, which fsyncs every file itself before it renames its directory.
Before each of the two, what it is to read is dropped from the page cache (fsync, then POSIX_FADV_DONTNEED, of every
file), and the last result is removed. Seconds are wall time of the whole process, start of Python included; the ratio
is that of the medians. Then the last result is verified and loaded, each in a fresh process and from a cold page cache.

Peak memory is the process's ru_maxrss. The bound for conversion is the size of two layer groups plus 1 GiB, a layer
group being all leaves of one layer as they are stored. For loading the peak is given over the size of the weights,
without what the process had before it loaded: 2 would be a second full copy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 1 << 30
SHARD = GIB
ROOT = Path(__file__).resolve().parents[2]

LOAD = """
import json, resource, sys, time
import jax
devices = int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
import jaxsteer
import tensorstore
from jaxsteer.models.restoring import restore
mesh = jaxsteer.make_mesh(model=devices) if devices > 1 else None
jax.block_until_ready(jax.numpy.zeros(3))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
started = time.perf_counter()
model = jaxsteer.load(sys.argv[1], dtype=sys.argv[3], mesh=mesh)
jax.block_until_ready(model.params)
seconds = time.perf_counter() - started
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print(json.dumps({"seconds": seconds, "before": before, "peak": peak(), "weights": size}))
"""


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4, help="size of the checkpoint")
    parser.add_argument("--repeat", type=int, default=3, help="how often cp and the conversion run")
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's place for temporary files)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="jaxsteer-convert-", dir=options.dir) as work:
        free = shutil.disk_usage(work).free
        if free < 2.2 * options.gib * GIB:
            sys.exit(f"{work} has {free / GIB:.1f} GiB free; {2.2 * options.gib:.1f} are needed. Give --dir or --gib.")
        result = measure(Path(work), options.gib, options.repeat)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(work: Path, gib: float, repeat: int) -> dict[str, Any]:
    """Everything that the table shows."""
    from checkpoints_convert import streaming

    source, copy, out = work / "source", work / "copy", work / "out"
    make_source(source, gib)
    size = sum(file.stat().st_size for file in source.iterdir())
    job = streaming.plan_conversion(source, None)
    group = max(job.size(name) for name, leaves in job.groups.items() if len(leaves) > 1)
    largest = max(job.size(name) for name in job.groups)
    runs: dict[str, list[dict[str, float]]] = {"cp": [], "convert": []}
    for turn in range(repeat):
        evict(source)
        runs["cp"].append(copied(source, copy))
        shutil.rmtree(copy)
        evict(source)
        runs["convert"].append(process("-m", "checkpoints_convert", source, out, "--quiet"))
        if turn < repeat - 1:
            shutil.rmtree(out)
        print(f"run {turn + 1}: cp {runs['cp'][-1]['seconds']:.2f} s, "
              f"conversion {runs['convert'][-1]['seconds']:.2f} s", file=sys.stderr)  # fmt: skip
    evict(source, out)
    verified = process("-m", "checkpoints_convert", "--verify", source, out, "--quiet")
    loads = {}
    for name, devices, dtype in (("1 device", 1, "bfloat16"), ("8 devices", 8, "bfloat16"), ("float32", 1, "float32")):
        evict(out)
        loads[name] = loaded(out, devices, dtype)
    cp, ours = (statistics.median(run["seconds"] for run in runs[name]) for name in ("cp", "convert"))
    return {
        "bytes": size,
        "runs": runs,
        "cp_seconds": cp,
        "convert_seconds": ours,
        "throughput_over_cp": cp / ours,
        "peak_bytes": max(run["peak"] for run in runs["convert"]),
        "layer_group_bytes": group,
        "largest_group_bytes": largest,
        "bound_bytes": 2 * group + GIB,
        "verify": verified,
        "load": loads,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    size = result["bytes"]
    print(f"{size / GIB:.2f} GiB of bfloat16 weights; medians of {len(result['runs']['cp'])} runs\n")
    print(f"{'':24}{'seconds':>9}{'GB/s':>8}{'peak GiB':>10}")
    peak = max(run["peak"] for run in result["runs"]["cp"])
    rows = [
        ("cp -r, fsync", result["cp_seconds"], peak),
        ("conversion", result["convert_seconds"], result["peak_bytes"]),
        ("verification", result["verify"]["seconds"], result["verify"]["peak"]),
        *((f"loading, {name}", load["seconds"], load["peak"]) for name, load in result["load"].items()),
    ]
    for name, seconds, peak in rows:
        print(f"{name:24}{seconds:9.2f}{size / seconds / 1e9:8.2f}{peak / GIB:10.2f}")
    print(
        f"\nconversion: {result['throughput_over_cp']:.2f} of the throughput of cp; peak "
        f"{result['peak_bytes'] / GIB:.2f} GiB, bound {result['bound_bytes'] / GIB:.2f} GiB (two layers of "
        f"{result['layer_group_bytes'] / GIB:.2f} GiB as stored, and 1 GiB; the largest leaf, an embedding, is "
        f"{result['largest_group_bytes'] / GIB:.2f} GiB)"
    )
    for name, load in result["load"].items():
        ratio = (load["peak"] - load["before"]) / load["weights"]
        extra = (load["peak"] - load["before"] - load["weights"]) / GIB
        print(
            f"loading, {name}: peak {ratio:.2f} of the weights' {load['weights'] / GIB:.2f} GiB, {extra:.2f} GiB more"
        )


# What is measured


def process(*command: object) -> dict[str, float]:
    """Seconds and peak memory (ru_maxrss) of a fresh Python process, which must end well."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    return waited(child, started)


def waited(child: subprocess.Popen[bytes], started: float) -> dict[str, float]:
    """Wait for a process as ``process`` does."""
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{child.args} ended with {child.returncode}")
    return {"seconds": seconds, "peak": usage.ru_maxrss * 1024, "cpu": usage.ru_utime + usage.ru_stime}


def copied(source: Path, copy: Path) -> dict[str, float]:
    """``cp -r`` and an fsync of every file and of the directory."""
    started = time.perf_counter()
    result = waited(subprocess.Popen(["cp", "-r", str(source), str(copy)]), started)
    for path in [*copy.iterdir(), copy]:
        with descriptor(path) as handle:
            os.fsync(handle)
    return result | {"seconds": time.perf_counter() - started}


def loaded(out: Path, devices: int, dtype: str) -> dict[str, float]:
    """What LOAD prints, in a fresh process."""
    command = [sys.executable, "-c", LOAD, str(out), str(devices), dtype]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def evict(*directories: Path) -> None:
    """Drop the files from the page cache, after they have reached the disk."""
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file():
                with descriptor(path) as handle:
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


class descriptor:
    """A file descriptor for reading, closed at the end of the block."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)

    def __enter__(self) -> int:
        return self.handle

    def __exit__(self, *exception: object) -> None:
        os.close(self.handle)


# The checkpoint


def make_source(path: Path, gib: float) -> None:
    """A Hugging Face directory of Llama 3 8B's widths, with as many layers and rows of vocabulary as ``gib`` takes."""
    from checkpoints_convert.hf import config_to_hf
    from jaxsteer.models.config import llama_config
    from jaxsteer.models.params import layer_shapes, top_shapes

    def config(layers: int, vocab: int) -> Any:
        return llama_config(
            vocab_size=vocab, d_model=4096, n_layers=layers, n_heads=32, n_kv_heads=8, d_mlp=14336, max_positions=8192
        )

    vocab = 128_256 if gib >= 3 else 16_384
    top = 2 * sum(map(math.prod, top_shapes(config(1, vocab)).values()))
    layer = 2 * sum(map(math.prod, layer_shapes(config(1, vocab)).values()))
    made = config(max(1, round((gib * GIB - top) / layer)), vocab)
    path.mkdir(parents=True)
    write_shards(path, list(tensors(made)))
    (path / "config.json").write_text(json.dumps(config_to_hf(made, "bfloat16")))


def tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the files."""
    from checkpoints_convert.names import expected_leaves, hf_shape

    for name, source, shape in expected_leaves(config).values():
        yield name, hf_shape(shape, source)


def write_shards(path: Path, wanted: list[tuple[str, tuple[int, ...]]]) -> None:
    """The tensors as safetensors shards with an index, of random bits, streaming."""
    import numpy as np

    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in wanted:
        if shards[-1] and size + 2 * math.prod(shape) > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * math.prod(shape)
    weight_map = {}
    rng = np.random.default_rng(0)
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in shard:
            end = at + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            weight_map[name], at = file, end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        with open(path / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            while at > 0:
                # Sign and mantissa are random; the exponent is that of numbers below one.
                block = rng.integers(0, 1 << 16, min(at, 32 << 20) // 2, np.uint16) & 0x80FF | 0x3E00
                stream.write(block.tobytes())
                at -= block.nbytes
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
