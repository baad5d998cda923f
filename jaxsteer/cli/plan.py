"""``jaxsteer plan``: memory, collectives and an estimate of the speed, on machines that need not be there."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from jaxsteer.display import aligned, listed, wrapped
from jaxsteer.errors import UserError
from jaxsteer.planning.programs import Workload
from jaxsteer.runs.files import document

if TYPE_CHECKING:
    from jaxsteer.models.config import ModelConfig
    from jaxsteer.planning import Plan as Found

_GIB = 2**30
TWO = {"axis": "generate or --what states", "circuits": "attribution or --what patching"}
"""Work that takes two programs, and which they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile a search (or other work) for a topology and tell memory, FLOPs, collectives and an estimate of its speed.
    No weights and no accelerator are needed; a TPU topology needs libtpu: pip install libtpu."""

    model: str
    """A built-in configuration (llama-3.1-8b, qwen2.5-7b, gemma-3-27b ...), a config.json, a Hugging Face directory, a
    converted checkpoint, a hub id, or organism:NAME."""
    topology: str
    """v4:AxBxC, v5p:AxBxC, v5e:AxB or v6e:AxB (a TPU slice of that many chips), cpu:N, gpu (those that are here), or
    gpu:CARD or gpu:CARD:N (N cards that need not be here: A100-40G, A100-80G, H100-80G, H200-141G, L4-24G, L40S-48G,
    RTX4090-24G)."""
    mesh: str | None = None
    """Devices along "prompts" x along "model", such as 64x4 (default: the best of a few, each of which is compiled)."""
    micro_batch: int | None = None
    """Candidates scored at once (default: the largest power of two that fits, which takes more compilations)."""
    scaling: bool = False
    """The same on smaller slices too, from 8 chips up: what prompt-parallel efficiency the compiled programs allow."""
    json: bool = False
    """Print JSON instead of text."""
    work: Annotated[Workload, arg(name="")] = Workload()

    def run(self) -> int:
        """Plan and print; 1 when it does not fit."""
        import jax

        from jaxsteer.planning.chips import host_devices

        if count := host_devices(self.topology):
            with contextlib.suppress(RuntimeError):  # devices are in use already: those must do
                jax.config.update("jax_num_cpu_devices", count)
        if self.topology != "gpu":  # planning touches no accelerator, not even where there is one
            jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # programs for other machines are of no use again
        from jaxsteer.planning import make_plan, topology
        from jaxsteer.planning.axis_plan import AxisPlan, make_axis_plan
        from jaxsteer.planning.circuits_plan import CircuitsPlan, make_circuits_plan
        from jaxsteer.runs.bars import progress_bar

        config = _config(self.model)
        work = self.work
        mesh = _mesh(self.mesh)
        if self.scaling and work.what in TWO:
            raise UserError(f"--scaling is of one program, and {work.what} takes two: give --what {TWO[work.what]}")
        if self.scaling:
            return self._scaling(config, work, mesh)
        target = topology(self.topology)
        if work.what in TWO:
            make: Callable[..., AxisPlan | CircuitsPlan] = make_axis_plan if work.what == "axis" else make_circuits_plan
            with progress_bar("plan"):
                found = make(self.model, config, target, work, mesh=mesh, say=_say)
            print(document(found.to_json()) if self.json else found.text())
            return 0 if found.fits else 1
        with progress_bar("plan"):
            plan = make_plan(self.model, config, target, work, mesh=mesh, micro_batch=self.micro_batch, say=_say)
        print(document(plan.to_json()) if self.json else text(plan, config))
        return 0 if plan.fits else 1

    def _scaling(self, config: ModelConfig, work: Workload, mesh: tuple[int, int] | None) -> int:
        from jaxsteer.planning import efficiency, scaling, topology
        from jaxsteer.planning.chips import slices_up_to
        from jaxsteer.planning.plan import mesh_shapes
        from jaxsteer.runs.bars import progress_bar

        targets = [topology(name) for name in slices_up_to(self.topology)]
        model = mesh[1] if mesh else next(mesh_shapes(config, targets[0], work))[1]
        fitting = [target for target in targets if len(target.devices) % model == 0]
        if not fitting:
            raise UserError(f"no slice up to {self.topology} can be divided into groups of {model} devices")
        with progress_bar("plan"):
            plans = scaling(self.model, config, fitting, work, model=model, micro_batch=self.micro_batch, say=_say)
        bounds = efficiency(plans)
        if self.json:
            print(document([p.to_json() | {"efficiency_bound": e} for p, e in zip(plans, bounds)]))
        else:
            print(scaling_text(plans, bounds))
        return 0 if all(plan.fits for plan in plans) else 1


def _say(message: str) -> None:
    from jaxsteer.runs.bars import say

    say(message, file=sys.stderr)


def _config(name: str) -> ModelConfig:
    """Of a built-in name, or of any source that ``inspect`` describes."""
    from jaxsteer.checkpoints.inspect import describe
    from jaxsteer.checkpoints.published import NAMES, published_config

    return published_config(name) if name.lower() in NAMES else describe(name).config


def _mesh(asked: str | None) -> tuple[int, int] | None:
    if asked is None:
        return None
    if not (found := re.fullmatch(r"(\d+)x(\d+)", asked)):
        raise UserError(f"--mesh {asked!r} is not PROMPTSxMODEL: two numbers such as 64x4")
    return int(found[1]), int(found[2])


def text(plan: Found, config: ModelConfig) -> str:
    """The plan for people."""
    from jaxsteer.planning.plan import conversion_host_bytes

    work, chips = plan.work, plan.mesh["prompts"] * plan.mesh["model"]
    lines = [
        f"{plan.model} on {plan.topology} ({chips} x {plan.chip.name}), mesh prompts {plan.mesh['prompts']} x model "
        f"{plan.mesh['model']}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        _what(work),
        "",
        "bytes on each device",
        *_rows(
            ("weights", _gib(plan.weights)),
            ("caches", _gib(plan.caches)),
            ("temporaries", "the compiler refused" if plan.temporaries is None else _gib(plan.temporaries)),
            ("total, with program and padding", f"{_gib(plan.total)} of {_gib(plan.chip.hbm_bytes)}"),
        ),
    ]
    if plan.micro_batch is not None:
        rows = plan.micro_batch * work.contexts
        lines += _rows(("micro-batch", f"{plan.micro_batch} candidates, {rows:,} rows"))
    if work.what == "convert":
        host = conversion_host_bytes(config, work.dtype)
        lines += [
            "",
            "converting, on any machine",
            *_rows(("memory", _gib(host["memory"])), ("disk", _gib(host["disk"]))),
        ]
    if plan.costs is not None:
        lines += ["", f"one {'token of every row' if work.what == 'generate' else 'step'}, each device"]
        lines += _rows(
            ("FLOPs (matrix products)", f"{plan.costs.flops:.3g}"),
            ("memory read and written", f"{plan.costs.bytes_accessed / 1e9:,.2f} GB"),
            *_collectives(plan),
        )
        lines += ["", *_estimate(plan)]
    return "\n".join(line if line.startswith(" ") else wrapped(line) for line in lines)


def _what(work: Workload) -> str:
    if work.what == "search":
        return (
            f"search with {work.algorithm}: {work.problems:,} problems, population {work.population} x children "
            f"{work.children}, {work.prompt_length} tokens, {work.contexts} contexts of {work.context_length} tokens, "
            f"{work.dtype}"
        )
    rows = f"{work.problems:,} rows of {work.context_length} tokens"
    return {
        "sae": f"encoding {rows} into {work.latents:,} latents, {work.dtype}",
        "explain": f"{work.words:,} words for {work.latents:,} latents by mutual information, float32 beside a "
        f"{work.dtype} model",
        "states": f"reading mean states of {rows} at every block, {work.dtype}",
        "generate": f"steered decoding of {work.problems:,} rows, prompts of {work.context_length} tokens, up to "
        f"{work.new_tokens} new ones, {work.dtype}",
        "attribution": f"scores of the edges above a push on {rows}, 10 gradients, {work.dtype}",
        "patching": f"{rows}, each with a head patched, through half of the blocks above a push, {work.dtype}",
        "convert": f"loading a converted checkpoint, {work.dtype}",
    }[work.what]


def _collectives(plan: Found) -> list[tuple[str, str]]:
    assert plan.costs is not None
    lines = [
        (f"{kind} over {axis}", f"{count:,.0f}, {given / 1e9:,.2f} GB")
        for (kind, axis), (count, given, _) in sorted(plan.costs.collectives.items(), key=lambda item: item[0][::-1])
    ]
    if not any("prompts" in axis for _, axis in plan.costs.collectives):
        lines.append(("collectives over prompts", "none"))
    return lines


def _estimate(plan: Found) -> list[str]:
    found, rate = plan.seconds, plan.to_json()
    if found is None or plan.roofline is None:
        return [f"no estimate of time: no published peaks for {plan.chip.name}"]
    per_second = rate[f"{plan.unit}_per_second_estimate"] or 0.0
    return [
        f"estimate, as if everything ran at its published peak ({plan.chip.source})",
        *_rows(
            ("computing", f"{found['compute']:.3g} s"),
            ("memory", f"{found['memory']:.3g} s"),
            ("network, beside products", f"{found['ring']:.3g} s"),
            ("network, waited for", f"{found['network']:.3g} s"),
            ("one step, estimated", f"{plan.roofline:.3g} s"),
            (f"{plan.unit} per second, estimated", f"{per_second:,.0f}"),
        ),
    ]


def scaling_text(plans: list[Found], bounds: list[float | None]) -> str:
    """One line per slice."""
    table: list[tuple[str, ...]] = [
        ("topology", "chips", "mesh", "problems each", "fits", "over prompts", "s/step", "per second", "efficiency")
    ]
    for plan, bound in zip(plans, bounds, strict=True):
        crossing = sum(
            n for (_, axis), (n, *_) in (plan.costs.collectives if plan.costs else {}).items() if "prompts" in axis
        )
        rate = plan.per_step / plan.roofline if plan.roofline and plan.fits else None
        table.append(
            (
                plan.topology,
                str(plan.mesh["prompts"] * plan.mesh["model"]),
                f"{plan.mesh['prompts']}x{plan.mesh['model']}",
                str(-(-plan.work.problems // plan.mesh["prompts"])),
                "yes" if plan.fits else "NO",
                f"{crossing:.0f}",
                "-" if plan.roofline is None else f"{plan.roofline:.3g}",
                "-" if rate is None else f"{rate:,.0f}",
                "-" if bound is None else f"{bound:.3f}",
            )
        )
    note = (
        f"{plans[0].model}, {_what(plans[0].work)}\n"
        f"over prompts: collectives that cross that axis; s/step and {plans[0].unit} per second are estimates from "
        "published peaks; efficiency: speed per chip over that of the first line, a bound from the compiled programs"
    )
    return aligned(table, note=note)


def _rows(*pairs: tuple[str, Any]) -> list[str]:
    return listed((f"{name:<30}", value) for name, value in pairs)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
