"""What the rollouts of many characters take: writing them a token at a time, and reading their states."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxsteer.display import duration, listed, wrapped
from jaxsteer.models.config import ModelConfig
from jaxsteer.planning.chips import Topology
from jaxsteer.planning.plan import Plan, Say, make_plan
from jaxsteer.planning.programs import Workload

_GIB = 2**30
_HALVINGS = 6
"""Of the rows that are read at once, until they fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisPlan:
    """Two programs, and how often they run. Times are estimates from published peaks, as those of ``Plan``."""

    write: Plan
    """One more token of ``problems`` rows."""
    read: Plan
    """Mean states of rows of prompt and reply."""
    work: Workload
    states: int
    """Bytes of all states, float32, on disk."""

    @property
    def rollouts(self) -> int:
        """Of all characters and the Assistant."""
        return (self.work.roles + 1) * self.work.rollouts

    @property
    def fits(self) -> bool:
        """Whether both programs fit."""
        return self.write.fits and self.read.fits

    @property
    def hours(self) -> dict[str, float] | None:
        """Of prompts ("prefill": counted as reading them), replies ("write") and states ("read"); None where the chip's
        peaks are not published."""
        write, read, work = self.write.roofline, self.read.roofline, self.work
        if write is None or read is None:
            return None
        reading = read * self.rollouts / self.read.work.problems
        whole = work.context_length + work.new_tokens
        return {
            "prefill": reading * work.context_length / whole / 3600,
            "write": write * work.new_tokens * self.rollouts / work.problems / 3600,
            "read": reading / 3600,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as numbers."""
        hours = self.hours
        return {
            "what": "axis",
            "fits": self.fits,
            "rollouts": self.rollouts,
            "states_bytes": self.states,
            "hours_estimate": hours and hours | {"total": sum(hours.values())},
            "write": self.write.to_json(),
            "read": self.read.to_json(),
        }

    def text(self) -> str:
        """The plan for people."""
        work, shape = self.work, self.write.mesh
        over = [
            (count, given)
            for plan in (self.write, self.read)
            for (_, axis), (count, given, _) in (plan.costs.collectives if plan.costs else {}).items()
            if "prompts" in axis
        ]
        crossing = f"{sum(n for n, _ in over):,.0f} for each token, of {sum(b for _, b in over):,.0f} bytes in all"
        lines = [
            f"{self.write.model} on {self.write.topology}, mesh prompts {shape['prompts']} x model {shape['model']}: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}",
            f"{work.roles} roles and the Assistant x {work.rollouts:,} rollouts = {self.rollouts:,}; prompts of "
            f"{work.context_length} tokens, up to {work.new_tokens} new ones; {work.problems:,} rows at once, "
            f"{self.read.work.problems:,} when their states are read, {work.dtype}",
            "",
            *_rows(
                ("weights on each device", _gib(self.write.weights)),
                ("writing: caches, in all", f"{_gib(self.write.caches)}, {_gib(self.write.total)}"),
                ("reading, in all", f"{_gib(self.read.total)} of {_gib(self.read.chip.hbm_bytes)}"),
                ("states on disk, every block", _gib(self.states)),
                ("collectives over prompts", crossing if over else "none"),
            ),
        ]
        if (hours := self.hours) is None:
            lines += ["", f"no estimate of time: no published peaks for {self.write.chip.name}"]
        else:
            lines += [
                "",
                f"estimate, as if everything ran at its published peak ({self.write.chip.source})",
                *_rows(
                    ("prompts", duration(hours["prefill"])),
                    ("replies, all of full length", duration(hours["write"])),
                    ("states", duration(hours["read"])),
                    ("together", duration(sum(hours.values()))),
                ),
            ]
        return "\n".join(line if line.startswith(" ") else wrapped(line) for line in lines)


def make_axis_plan(
    name: str, config: ModelConfig, target: Topology, work: Workload, *, mesh: tuple[int, int] | None, say: Say
) -> AxisPlan:
    """The plan of ``work`` (of ``what`` "axis"): the mesh is that of writing unless it is given.

    Raises ``UserError`` as ``make_plan`` does.
    """
    write = make_plan(name, config, target, dataclasses.replace(work, what="generate"), mesh=mesh, say=say)
    shape = write.mesh["prompts"], write.mesh["model"]
    reading = dataclasses.replace(work, what="states", context_length=work.context_length + work.new_tokens)
    for _ in range(_HALVINGS):
        read = make_plan(name, config, target, reading, mesh=shape, say=say)
        if read.fits or reading.problems <= shape[0]:
            break
        reading = dataclasses.replace(reading, problems=max(reading.problems // 2, shape[0]))
    states = (work.roles + 1) * work.rollouts * config.n_layers * config.d_model * 4
    return AxisPlan(write=write, read=read, work=work, states=states)


def _rows(*pairs: tuple[str, Any]) -> list[str]:
    return listed((f"{name:<30}", value) for name, value in pairs)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
