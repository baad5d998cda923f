"""What a study of circuits takes: the edges of a push by EAP-IG, and every head patched exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxsteer.circuits.graph import Graph
from jaxsteer.display import duration, listed, wrapped
from jaxsteer.models.config import ModelConfig
from jaxsteer.planning.chips import Topology
from jaxsteer.planning.plan import Plan, Say, make_plan
from jaxsteer.planning.programs import Workload

_GIB = 2**30
_HALVINGS = 8
"""Of the rows of one pass, until they fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitsPlan:
    """Two programs, and how often they run. Times are estimates from published peaks, as those of ``Plan``."""

    attribute: Plan
    """Scores of all edges, 10 gradients, of as many rows as fit."""
    patch: Plan
    """One walk of patched rows through half of the blocks above the push, as in the mean over layers."""
    work: Workload
    edges: int
    patches: int
    """Heads and MLPs above the push."""

    @property
    def fits(self) -> bool:
        """Whether both programs fit, with at least a row for each group of devices."""
        return self.attribute.fits and self.patch.fits

    @property
    def calls(self) -> dict[str, int]:
        """How often each program runs for all rows."""
        rows = self.work.problems
        return {
            "attribution": math.ceil(rows / self.attribute.work.problems),
            "patching": math.ceil(rows * (self.patches + 1) / self.patch.work.problems),
        }

    @property
    def hours(self) -> dict[str, float] | None:
        """Of both; None where the chip's peaks are not published."""
        times = {"attribution": self.attribute.roofline, "patching": self.patch.roofline}
        if any(seconds is None for seconds in times.values()):
            return None
        return {name: (seconds or 0.0) * self.calls[name] / 3600 for name, seconds in times.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, as numbers."""
        hours = self.hours
        return {
            "what": "circuits",
            "fits": self.fits,
            "edges": self.edges,
            "patches": self.patches,
            "calls": self.calls,
            "hours_estimate": hours and hours | {"total": sum(hours.values())},
            "attribution": self.attribute.to_json(),
            "patching": self.patch.to_json(),
        }

    def text(self) -> str:
        """The plan for people."""
        work, shape = self.work, self.attribute.mesh
        lines = [
            f"{self.attribute.model} on {self.attribute.topology}, mesh prompts {shape['prompts']} x model "
            f"{shape['model']}: {'fits' if self.fits else 'DOES NOT FIT'}",
            f"{work.problems} rows of {work.context_length} tokens, {self.edges:,} edges and {self.patches:,} heads "
            f"and MLPs above the push; {self.attribute.work.problems} rows at once in attribution, "
            f"{self.patch.work.problems} in patching, {work.dtype}",
            "",
            *_rows(
                ("weights on each device", _gib(self.attribute.weights)),
                ("attribution, in all", f"{_gib(self.attribute.total)} of {_gib(self.attribute.chip.hbm_bytes)}"),
                ("patching, in all", _gib(self.patch.total)),
                ("passes", f"{self.calls['attribution']:,} and {self.calls['patching']:,}"),
            ),
        ]
        if (hours := self.hours) is None:
            lines += ["", f"no estimate of time: no published peaks for {self.attribute.chip.name}"]
        else:
            lines += [
                "",
                f"estimate, as if everything ran at its published peak ({self.attribute.chip.source})",
                *_rows(
                    ("all edges", duration(hours["attribution"])),
                    ("every head and MLP", duration(hours["patching"])),
                    ("together", duration(sum(hours.values()))),
                ),
            ]
        return "\n".join(line if line.startswith(" ") else wrapped(line) for line in lines)


def make_circuits_plan(
    name: str, config: ModelConfig, target: Topology, work: Workload, *, mesh: tuple[int, int] | None, say: Say
) -> CircuitsPlan:
    """The plan of ``work`` (of ``what`` "circuits"): the mesh is that of patching unless it is given.

    Rows of one pass are halved until they fit. Raises ``UserError`` as ``make_plan`` does.
    """

    def fitting(what: Any, shape: tuple[int, int] | None) -> Plan:
        wanted = dataclasses.replace(work, what=what)
        for _ in range(_HALVINGS):
            found = make_plan(name, config, target, wanted, mesh=shape, say=say)
            if found.fits or wanted.problems <= found.mesh["prompts"]:
                break
            wanted = dataclasses.replace(wanted, problems=max(wanted.problems // 2, found.mesh["prompts"]))
        return found

    patch = fitting("patching", mesh)
    attribute = fitting("attribution", (patch.mesh["prompts"], patch.mesh["model"]))
    start = min(config.n_layers - 1, work.depth(config))
    patches = (config.n_layers - start) * (config.n_heads + 1)
    edges = Graph.of(config, start=start).n_edges
    return CircuitsPlan(attribute=attribute, patch=patch, work=work, edges=edges, patches=patches)


def _rows(*pairs: tuple[str, Any]) -> list[str]:
    return listed((f"{name:<30}", value) for name, value in pairs)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
