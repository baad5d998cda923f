"""Chips and slices: published peaks, and devices to compile for that need not be there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from jaxsteer.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published peaks of one device. A figure that nobody published is None: nothing is estimated from it."""

    name: str
    flops: float | None
    """bfloat16 FLOP/s."""
    hbm_bytes: int
    hbm_bandwidth: float | None
    """Bytes per second."""
    link_bandwidth: float | None
    """Bytes per second that the device can send, over all of its links."""
    source: str


def _tpu(name: str, tflops: float, hbm_gib: int, hbm_gb_s: float, ici_gb_s: float, page: str) -> Chip:
    return Chip(
        name=name,
        flops=tflops * 1e12,
        hbm_bytes=hbm_gib * GIB,
        hbm_bandwidth=hbm_gb_s * 1e9,
        link_bandwidth=ici_gb_s * 1e9,
        source=f"Google Cloud documentation, {page}",
    )


# Google publishes links in both directions together; a device sends at half of that.
CHIPS = {
    "v4": _tpu("TPU v4", 275, 32, 1200, 300, "TPU v4"),
    "v5e": _tpu("TPU v5e", 197, 16, 819, 200, "TPU v5e"),
    "v5p": _tpu("TPU v5p", 459, 95, 2765, 600, "TPU v5p"),
    "v6e": _tpu("TPU v6e", 918, 32, 1600, 400, "TPU v6e (Trillium)"),
}


def _gpu(name: str, tflops: float, gb: int, gb_s: float, link_gb_s: float, page: str) -> Chip:
    return Chip(
        name=f"NVIDIA {name}",
        flops=tflops * 1e12,
        hbm_bytes=gb * 10**9,
        hbm_bandwidth=gb_s * 1e9,
        link_bandwidth=link_gb_s * 1e9,
        source=f"NVIDIA data sheet, {page}",
    )


# Dense bfloat16; data sheets with sparsity print twice that. Sending is in one direction: NVLink, else PCIe 4 x16.
GPUS = {
    "A100-40G": _gpu("A100", 312, 40, 1555, 300, "A100 40GB SXM"),
    "A100-80G": _gpu("A100", 312, 80, 2039, 300, "A100 80GB SXM"),
    "H100-80G": _gpu("H100", 989, 80, 3350, 450, "H100 SXM"),
    "H200-141G": _gpu("H200", 989, 141, 4800, 450, "H200 SXM"),
    "L4-24G": _gpu("L4", 121, 24, 300, 32, "L4"),
    "L40S-48G": _gpu("L40S", 362, 48, 864, 32, "L40S"),
    "RTX4090-24G": _gpu("RTX 4090", 165, 24, 1008, 32, "Ada architecture, GeForce RTX 4090"),
}

SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
"""Usual slices of 4 to 256 chips, smallest first."""

MOST_CPUS = 1024
KINDS = (
    "v4:AxBxC, v5p:AxBxC, v5e:AxB or v6e:AxB (a TPU slice of that many chips), cpu:N, gpu (those that are here), or "
    f"gpu:CARD or gpu:CARD:N (N cards that need not be here: {', '.join(GPUS)})"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def platform(self) -> str:
        """Of the compiler: "tpu", "cpu" or "gpu"."""
        return {"tpu": "tpu", "cpu": "cpu"}.get(self.devices[0].platform, "gpu")


def topology(name: str) -> Topology:
    """The devices of ``name``: a TPU slice such as "v5e:16x16", "cpu:N", "gpu", or cards such as "gpu:H100-80G:8".

    Described TPUs are as good as real ones to the compiler, libtpu, which must be installed; no TPU is needed. There is
    no such compiler for GPUs: of cards that are not here memory and peaks are those published, and the program is the
    one that CPUs would run. Raises ``UserError`` for a name that means nothing, when libtpu is missing, for too few CPU
    devices, and without a GPU.
    """
    kind, _, shape = name.partition(":")
    if kind in CHIPS and re.fullmatch(r"\d+(x\d+)*", shape):
        return Topology(name, CHIPS[kind], _describe_slice(name))
    if kind == "cpu" and re.fullmatch(r"\d{1,4}", shape) and 0 < int(shape) <= MOST_CPUS:
        return _cpus(name, int(shape))
    if name == "gpu":
        return _gpus()
    if count := host_devices(name):
        card = GPUS[shape.partition(":")[0]]
        of = "its program is compiled for CPUs, which differs: memory and time are rough"
        return Topology(name, dataclasses.replace(card, source=f"{card.source}; {of}"), _cpus(name, count).devices)
    raise UserError(f"--topology {name!r} is none of: {KINDS}. N is at most {MOST_CPUS}.")


def host_devices(name: str) -> int:
    """CPU devices that ``name`` is compiled for: N of "cpu:N" and of "gpu:CARD:N", 1 of "gpu:CARD"; else 0."""
    found = re.fullmatch(r"(?:cpu|gpu:([^:]+)):(\d{1,4})|gpu:([^:]+)", name)
    if not found or not {found[1], found[3]} <= {None, *GPUS}:
        return 0
    return int(found[2] or 1) if int(found[2] or 1) <= MOST_CPUS else 0


def chips_in(name: str) -> int:
    """Number of chips of a TPU slice, from its name alone."""
    return math.prod(int(n) for n in name.partition(":")[2].split("x"))


def slices_up_to(name: str) -> list[str]:
    """``name`` and the usual smaller slices of its kind with at least 8 chips (cpu: powers of two), smallest first."""
    kind, _, shape = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"\d{1,4}", shape):
        return [f"cpu:{2**i}" for i in range(int(shape).bit_length()) if 2**i < int(shape)] + [name]
    if kind not in SLICES:
        raise UserError(f"--scaling compares slices of a TPU, or cpu:N; {name!r} has none.")
    smaller = [f"{kind}:{one}" for one in SLICES[kind]]
    return [one for one in smaller if 8 <= chips_in(one) < chips_in(name)] + [name]


def _describe_slice(name: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {name} needs the TPU compiler (libtpu), which runs on any Linux machine: "
            "pip install libtpu. Without it: --topology cpu:N, or gpu."
        )
    # What libtpu would otherwise ask the network for, or warn about, on a machine that is no TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a lock meant for real TPUs: compiling uses none
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name.partition(':')[0]}-{chips_in(name)}")
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # jaxlib gives many types; all mean that the slice cannot be described
        usual = ", ".join(SLICES[name.partition(":")[0]])
        raise UserError(f"libtpu cannot describe {name}: {error}. Usual slices of this TPU: {usual}.") from error


def _cpus(name: str, count: int) -> Topology:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"{name} needs {count} CPU devices and JAX was started with {len(devices)}: set "
            f"JAX_NUM_CPU_DEVICES={count} (the command does it before anything has used a device)."
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    peaks = Chip(
        name="CPU", flops=None, hbm_bytes=memory, hbm_bandwidth=None, link_bandwidth=None,
        source="this machine's memory divided by the devices",
    )  # fmt: skip
    return Topology(name, peaks, tuple(devices[:count]))


def _gpus() -> Topology:
    try:
        devices = tuple(jax.devices("gpu"))
    except RuntimeError:
        raise UserError("--topology gpu plans for the GPUs of this machine, and JAX sees none here.") from None
    kind = devices[0].device_kind
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:
        raise UserError(f"{kind} does not tell its memory, so that nobody can say what fits.")
    unknown = Chip(
        name=kind, flops=None, hbm_bytes=memory, hbm_bandwidth=None, link_bandwidth=None,
        source="no published peaks are known here",
    )  # fmt: skip
    words = set(re.split(r"[\s-]+", kind))
    alike = [card for card in GPUS.values() if set(card.name.split()) <= words and "PCIe" not in words]
    nearest = min(alike, key=lambda card: abs(card.hbm_bytes - memory), default=unknown)
    return Topology("gpu", dataclasses.replace(nearest, name=kind, hbm_bytes=memory), devices)
