"""Plans: compile the program of a piece of work for a topology, and tell what it needs and what it could do.

Memory is the compiler's own account. Everything about time is an estimate: published peaks divided into what the
compiled program computes, moves and sends, as if every operation ran at its peak.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from checkpoints_convert.streaming import THREADS
from jaxsteer.checkpoints.inspect import memory, parameters
from jaxsteer.checkpoints.restoring import BATCH_BYTES
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import layer_shapes, top_shapes
from jaxsteer.models.sharding import AXES, stored_chunks
from jaxsteer.planning.chips import Chip, Topology
from jaxsteer.planning.hlo import Costs, program_costs
from jaxsteer.planning.programs import Program, Workload, build
from jaxsteer.prompt_search.contexts import ROWS

_TRIES = 5
"""Micro-batches that are compiled at most."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Say = Callable[[str], None]


def _silent(_: str) -> None:
    """Say nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a piece of work takes on each device of a mesh, and an estimate of its speed."""

    model: str
    work: Workload
    topology: str
    chip: Chip
    mesh: dict[str, int]
    micro_batch: int | None
    """Candidates scored at once; None where there are none."""
    weights: int
    """Bytes on each device, as are those below."""
    caches: int
    temporaries: int | None
    """None where the compiler refused the program."""
    total: int
    fits: bool
    costs: Costs | None
    """None where nothing was compiled."""
    per_step: int
    """Candidates (or tokens) of one step, on all devices together."""
    unit: str

    @property
    def seconds(self) -> dict[str, float] | None:
        """Of one step at published peaks, each alone: "compute", "memory", "ring" (what is sent beside products) and
        "network" (collectives that are waited for)."""
        costs, chip = self.costs, self.chip
        if costs is None or chip.flops is None or chip.hbm_bandwidth is None or chip.link_bandwidth is None:
            return None
        return {
            "compute": costs.flops / chip.flops,
            "memory": costs.bytes_accessed / chip.hbm_bandwidth,
            "ring": costs.sent_in_rings / chip.link_bandwidth,
            "network": costs.sent / chip.link_bandwidth,
        }

    @property
    def roofline(self) -> float | None:
        """Estimated seconds of one step: the largest of computing, moving and rings, and then the network."""
        found = self.seconds
        return None if found is None else max(found["compute"], found["memory"], found["ring"]) + found["network"]

    def to_json(self) -> dict[str, Any]:
        """Everything, as numbers. Figures of time are estimates."""
        rate = None if not self.roofline or not self.fits else self.per_step / self.roofline
        collectives: dict[str, dict[str, float]] = {}
        for (_, axis), (count, given, _sent) in (self.costs.collectives if self.costs else {}).items():
            entry = collectives.setdefault(axis, {"count": 0, "bytes": 0})
            entry["count"] += count
            entry["bytes"] += given
        return {
            "model": self.model,
            "what": self.work.what,
            "topology": self.topology,
            "chip": self.chip.name,
            "mesh": self.mesh,
            "fits": self.fits,
            "hbm_bytes": self.chip.hbm_bytes,
            "bytes_per_device": {
                "weights": self.weights,
                "caches": self.caches,
                "temporaries": self.temporaries,
                "total": self.total,
            },
            "flops_per_device": self.costs.flops if self.costs else None,
            "bytes_accessed_per_device": self.costs.bytes_accessed if self.costs else None,
            "collectives": collectives,
            "estimated_seconds": self.seconds,
            "roofline_seconds_per_step": self.roofline,
            "candidates_per_second_estimate": rate if self.unit == "candidates" else None,
            "tokens_per_second_estimate": rate if self.unit == "tokens" else None,
            "latents_per_second_estimate": rate if self.unit == "latents" else None,
            "micro_batch": self.micro_batch,
            "work": dataclasses.asdict(self.work),
        }


def make_plan(
    name: str,
    config: ModelConfig,
    target: Topology,
    work: Workload,
    *,
    mesh: tuple[int, int] | None = None,
    micro_batch: int | None = None,
    say: Say = _silent,
) -> Plan:
    """The plan of ``work`` with the model ``name`` of ``config`` on ``target``.

    ``mesh`` is (prompts, model); without it several are compiled and the fastest that fits is told. Without
    ``micro_batch`` a search gets the largest that fits, in powers of two. ``say`` is told what is being compiled, which
    takes a minute or so for each program. Raises ``UserError`` for a mesh that does not have the topology's devices.
    """
    if mesh is not None and mesh[0] * mesh[1] != len(target.devices):
        raise UserError(
            f"the mesh {mesh[0]}x{mesh[1]} has {mesh[0] * mesh[1]} devices and {target.name} has "
            f"{len(target.devices)}: give prompts x model whose product is that"
        )
    shapes = [mesh] if mesh is not None else list(mesh_shapes(config, target, work))
    plans: list[Plan] = []
    for shape in shapes:  # what fitted one mesh is the first guess for the next
        guess = plans[-1].micro_batch if plans and plans[-1].fits else None
        plans.append(_plan_mesh(name, config, target, work, shape, micro_batch, guess, say))
    return max(plans, key=lambda plan: (plan.fits, plan.per_step / (plan.roofline or 1), -plan.total))


def scaling(
    name: str,
    config: ModelConfig,
    targets: Iterable[Topology],
    work: Workload,
    *,
    model: int,
    micro_batch: int | None = None,
    say: Say = _silent,
) -> list[Plan]:
    """The same work on several topologies, smallest first, with weights split over ``model`` devices in each."""
    return [
        make_plan(name, config, t, work, mesh=(len(t.devices) // model, model), micro_batch=micro_batch, say=say)
        for t in targets
    ]


def efficiency(plans: Sequence[Plan]) -> list[float | None]:
    """Estimated speed per device of each plan over that of the first: what the compiled programs allow at most.

    Where no collective crosses "prompts", only problems that do not divide evenly among devices are lost.
    """

    def per_device(plan: Plan) -> float | None:
        effort = plan.roofline or (plan.costs.flops if plan.costs else None)
        return None if not effort else plan.per_step / effort / math.prod(plan.mesh.values())

    first = per_device(plans[0])
    rates = [per_device(plan) for plan in plans]
    return [None if rate is None or first is None else rate / first for rate in rates]


def mesh_shapes(config: ModelConfig, target: Topology, work: Workload) -> Iterator[tuple[int, int]]:
    """(prompts, model) worth compiling: the least "model" whose weights leave room, and twice and four times it."""
    devices = len(target.devices)
    sizes = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    room = [m for m in sizes if memory(config, work.dtype, model=m)["weights"] < 0.8 * target.chip.hbm_bytes]
    if not room:
        yield devices // sizes[-1], sizes[-1]
        return
    # More shards than problems would be idle; of those that have work, the fewest model devices send least.
    busy = [m for m in room if devices // m <= work.problems] or room[-1:]
    for model in busy[:3]:
        yield devices // model, model


def device_mesh(target: Topology, shape: tuple[int, int]) -> Mesh:
    """A ("prompts", "model") mesh of the topology's devices, neighbours along "model"."""
    return Mesh(np.asarray(target.devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def _plan_mesh(
    name: str,
    config: ModelConfig,
    target: Topology,
    work: Workload,
    shape: tuple[int, int],
    micro_batch: int | None,
    guess: int | None,
    say: Say,
) -> Plan:
    if work.what == "convert":
        return _plan_conversion(name, config, target, work, shape)
    mesh = device_mesh(target, shape)
    largest = work.population * work.children
    batch = micro_batch or guess or _power_of_two(min(largest, max(1, ROWS // work.contexts)))
    best: Plan | None = None
    too_large = largest + 1
    for _ in range(_TRIES):
        of = f", micro-batch {batch}" if work.what == "search" else ""
        say(f"compiling for {target.name}, mesh prompts {shape[0]} x model {shape[1]}{of} ...")
        plan = _compile_plan(name, build(work, config, mesh, batch=batch), target, work, shape, batch)
        if work.what != "search" or micro_batch:
            return plan
        fixed, room = plan.weights + plan.caches, plan.chip.hbm_bytes * 0.95
        wanted = batch * max(0.0, room - fixed) / max(1.0, plan.total - fixed)
        if plan.fits:
            best = plan
            larger = _power_of_two(min(wanted, largest, too_large - 1))
            if larger <= batch:
                return plan
            batch = larger
        else:
            too_large = batch
            if batch == 1 or (best is not None and best.micro_batch == batch // 2):
                return best or plan
            batch = max(1, min(_power_of_two(wanted), batch // 2, 2 ** (batch.bit_length() - 2)))
            if best is not None and best.micro_batch is not None:
                batch = max(batch, 2 * best.micro_batch)
    return best or plan


def _power_of_two(size: float) -> int:
    """The largest power of two that is not above ``size``, at least 1."""
    return 1 << max(0, int(size).bit_length() - 1)


def _compile_plan(
    name: str, program: Program, target: Topology, work: Workload, shape: tuple[int, int], batch: int
) -> Plan:
    mesh, hbm = dict(zip(AXES, shape, strict=True)), target.chip.hbm_bytes
    known: dict[str, Any] = dict(
        model=name, work=work, topology=target.name, chip=target.chip, mesh=mesh, weights=program.weights,
        micro_batch=batch if work.what == "search" else None, caches=program.caches, per_step=program.per_step,
        unit=program.unit,
    )  # fmt: skip
    fixed = program.weights + program.caches
    if fixed > hbm:
        return Plan(**known, temporaries=None, total=fixed, fits=False, costs=None)
    try:
        compiled = program.compile()
    except Exception as error:  # of jaxlib; what is not about memory goes on
        needed = _bytes_needed(str(error))
        if needed is None:
            raise
        total = needed + fixed if "temporaries" in str(error) else max(needed, fixed)
        return Plan(**known, temporaries=None, total=total, fits=False, costs=None)
    stats = compiled.memory_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    costs = program_costs(compiled.as_text(), mesh, program.trips)
    return Plan(**known, temporaries=stats.temp_size_in_bytes, total=total, fits=total <= hbm, costs=costs)


def _bytes_needed(message: str) -> int | None:
    """Bytes that a program would have needed, from the compiler's refusal; None if it refused for another reason."""
    if not re.search(r"RESOURCE_EXHAUSTED|HbmOom|out of memory", message, re.IGNORECASE):
        return None
    found = re.search(r"([\d.]+)([KMGT]?)\)?(?: of [\d.]+[KMGT]? hbm| exceeds)", message, re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else 1 << 62


def _plan_conversion(name: str, config: ModelConfig, target: Topology, work: Workload, shape: tuple[int, int]) -> Plan:
    """Loading a converted checkpoint, from its layout alone: the weights, and what exists twice while leaves turn."""
    prompts, model = shape
    weights = memory(config, work.dtype, model=model, prompts=prompts)["weights"]
    count, width = parameters(config), {"float32": 4}.get(work.dtype, 2)
    leaf = max((count["unembedding"] or count["embedding"]) * width // model, 1)
    twice = max(leaf, min(BATCH_BYTES, count["per_layer"] * width // model))
    return Plan(
        model=name, work=work, topology=target.name, chip=target.chip, mesh=dict(zip(AXES, shape, strict=True)),
        micro_batch=None, weights=weights, caches=0, temporaries=twice, total=weights + twice,
        fits=weights + twice <= target.chip.hbm_bytes, costs=None, per_step=count["total"], unit="parameters",
    )  # fmt: skip


def conversion_host_bytes(config: ModelConfig, dtype: str) -> dict[str, int]:
    """Bytes on the converting machine: "memory", blocks of all threads as read and as written, and "disk"."""
    width = {"float32": 4}.get(dtype, 2)
    shapes = layer_shapes(config) | top_shapes(config)
    block = max(int(np.prod(stored_chunks(name, shape, width))) * width for name, shape in shapes.items())
    return {"memory": 2 * THREADS * block, "disk": parameters(config)["total"] * width}
