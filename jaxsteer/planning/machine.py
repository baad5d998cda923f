"""What the machine is that this runs on, and what would go better: versions, devices, memory, disk, extras."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import jax

from jaxsteer.checkpoints.inspect import inspection
from jaxsteer.checkpoints.loading import cache_dir
from jaxsteer.display import listed, wrapped
from jaxsteer.files.records import Record
from jaxsteer.models.sharding import free_memory, size_text

PACKAGES = ("jaxsteer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
EXTRAS = {"serve": "starlette", "plan": "libtpu", "parquet": "pyarrow", "parity": "torch"}
"""Extra of the package -> the module that tells whether it is there."""
LITTLE_DISK = 10 * 2**30
"""Bytes below which little room for checkpoints is worth a word."""
NVIDIA = Path("/dev/nvidiactl")
"""Is there where a driver for NVIDIA devices is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs(Record):
    """What a model takes here."""

    name: str
    parameters: int
    dtype: str
    weights: int
    """Bytes on each device, with the weights split over all of them where there are several."""
    cache_per_token: int
    """Bytes of keys and values of one token of one row."""
    room: int
    """Bytes that a device has free, or the machine where devices say nothing."""

    @property
    def rows(self) -> int:
        """Rows of 512 tokens whose keys and values fit beside the weights; 0 where these do not fit."""
        return max(0, self.room - self.weights) // (512 * self.cache_per_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine(Record):
    """The machine of this process. Secrets are told to be there, never shown."""

    python: str
    system: str
    packages: dict[str, str]
    backend: str
    devices: tuple[str, ...]
    """Kinds, one for each device that this process sees."""
    device_memory: int | None
    """Bytes of one device; None where it says nothing, as CPUs."""
    cores: int
    memory: int
    memory_free: int
    cache: str
    """Where converted checkpoints and compiled programs lie."""
    cache_bytes: int
    disk_free: int
    token: bool
    """Whether a token for the hub is found."""
    extras: tuple[str, ...]
    """Of the optional parts, those that are installed."""
    advice: tuple[str, ...]
    needs: Needs | None = None

    def text(self) -> str:
        """For people."""
        kinds = {kind: self.devices.count(kind) for kind in self.devices}
        shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        each = f", {size_text(self.device_memory)} each" if self.device_memory else ""
        pairs = [
            ("system", f"{self.system}, Python {self.python}"),
            ("packages", ", ".join(f"{name} {version}" for name, version in self.packages.items())),
            ("devices", f"{self.backend}: {shown}{each}"),
            ("processor", f"{self.cores} cores"),
            ("memory", f"{size_text(self.memory_free)} free of {size_text(self.memory)}"),
            ("cache", f"{self.cache}: {size_text(self.cache_bytes)}; {size_text(self.disk_free)} free on its disk"),
            ("hub token", "found" if self.token else "none: gated models need one (hf auth login, or HF_TOKEN)"),
            ("extras", ", ".join(self.extras) or "none"),
        ]
        lines = listed(pairs, indent=0)
        if (needs := self.needs) is not None:
            lines += ["", wrapped(_fit(needs, len(self.devices)))]
        return "\n".join([*lines, "", *(wrapped(f"! {text}") for text in self.advice or ("All is well.",))])


def examine(model: str | None = None) -> Machine:
    """The machine that this runs on and, of ``model`` (any source that ``inspect`` describes), what it needs here.

    Looks at devices, files' sizes and the environment; loads no weights and opens no connection but for a hub id's
    configuration. Raises ``UserError`` for a model that cannot be described.
    """
    devices, cache = jax.local_devices(), cache_dir()
    stats = [device.memory_stats() or {} for device in devices]
    limits = [int(found["bytes_limit"]) for found in stats if found.get("bytes_limit")]
    free = [
        int(found["bytes_limit"]) - int(found.get("bytes_in_use", 0)) for found in stats if found.get("bytes_limit")
    ]
    room = min(free) if free else free_memory() // len(devices)
    disk = shutil.disk_usage(_existing(cache)).free
    found = Machine(
        python=platform.python_version(),
        system=platform.platform(terse=True),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        backend=jax.default_backend(),
        devices=tuple(device.device_kind for device in devices),
        device_memory=min(limits) if limits else None,
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_free=free_memory(),
        cache=str(cache),
        cache_bytes=sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
        disk_free=disk,
        token=_token(),
        extras=tuple(name for name, module in EXTRAS.items() if importlib.util.find_spec(module)),
        advice=(),
        needs=None if model is None else _needs(model, len(devices), room),
    )
    return dataclasses.replace(found, advice=tuple(_advice(found)))


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _needs(model: str, devices: int, room: int) -> Needs:
    described = inspection(model, mesh={"model": devices, "prompts": 1})
    use = described["memory"]
    return Needs(
        name=described["name"],
        parameters=described["parameters"]["total"],
        dtype=use["dtype"],
        weights=use["weights"],
        cache_per_token=use["cache_per_token"],
        room=room,
    )


def _fit(needs: Needs, devices: int) -> str:
    split = f", split over {devices} devices (--mesh-model {devices})" if devices > 1 else ""
    start = f"{needs.name}: {needs.parameters:,} parameters take {size_text(needs.weights)} in {needs.dtype}{split}, "
    if not needs.rows:
        return f"{start}and {size_text(needs.room)} are free: it does not fit."
    return (
        f"{start}and {size_text(needs.room)} are free: beside them fit the keys and values of about {needs.rows:,} "
        "rows of 512 tokens. jaxsteer plan --model ... --topology ... compiles a search and gives its memory and an "
        "estimate of its time."
    )


def _advice(found: Machine) -> list[str]:
    advice = []
    if found.backend == "cpu" and NVIDIA.exists():
        advice.append(
            "This machine has an NVIDIA driver, but JAX computes on the CPU: install JAX for it (pip install "
            "'jax[cuda13]'), then look again."
        )
    if found.backend == "cpu" and "plan" in found.extras and not Path("/dev/accel0").exists():
        advice.append(
            "libtpu is installed and there is no TPU: JAX says so at every start. Set JAX_PLATFORMS=cpu, or keep "
            "libtpu in an environment of its own."
        )
    if found.disk_free < LITTLE_DISK:
        advice.append(
            f"Only {size_text(found.disk_free)} are free where converted checkpoints go ({found.cache}): an 8B model "
            "takes 16 GB. Set JAXSTEER_CACHE to a larger disk."
        )
    if found.needs is not None and not found.needs.rows:
        advice.append("Take more devices, a smaller dtype (convert --dtype bfloat16) or a smaller model.")
    return advice
