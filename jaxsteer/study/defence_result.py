"""What defences by latents did, beside their controls."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxsteer.display import aligned, decimals, interval, points, short, visible, wrapped
from jaxsteer.errors import UserError
from jaxsteer.evals.refusal import KindRefusal, RefusalRate
from jaxsteer.files.records import Record
from jaxsteer.runs.result import Result

NONE, DEFENCE, CONTROL = "none", "defence", "control"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefenceRow(Record):
    """One defence on test requests."""

    name: str
    kind: str
    """none, defence or control."""
    latents: tuple[int, ...] = ()
    strength: float | None = None
    """Chosen on validation requests; None where there is nothing to choose."""
    within: bool = True
    """Whether some strength kept the limits on validation requests; else the least disturbing one is shown."""
    kl: float | None = None
    """On the model's own replies to ordinary requests, nats per token."""
    kinds: tuple[KindRefusal, ...]
    problem: str = ""

    def refused(self, kind: str) -> RefusalRate | None:
        """Of a kind of request, by the best way that was measured."""
        found = next((one for one in self.kinds if one.kind == kind), None)
        return None if found is None else found.phrases or found.openings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefenceResult(Result):
    """Defences beside their controls."""

    model: str
    sae: str
    requests: str
    threshold: float
    """Of the gate, on the mean of those latents of attacks that are active."""
    opens: tuple[float, float]
    """Share of train requests for which the gate opens: attacks, and those that are to be answered."""
    max_kl: float
    over: float
    rows: tuple[DefenceRow, ...]

    def row(self, name: str) -> DefenceRow:
        """One row. Raises ``UserError`` for a name that there is not."""
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(f"there is no defence {name!r}: {', '.join(row.name for row in self.rows)}")

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for each row and kind of request."""
        return [
            {
                "name": row.name, "kind": row.kind, "strength": row.strength, "within": row.within, "kl": row.kl,
                "requests": one.kind, "n": one.n, "refused": one.best,
            }
            for row in self.rows
            for one in row.kinds
        ]  # fmt: skip

    def table(self) -> str:
        """The rates as text."""
        kinds = [one.kind for one in self.rows[0].kinds]
        n = ", ".join(f"{one.n} {one.kind.replace('harmful', 'attacks')}" for one in self.rows[0].kinds)
        head = ["defence", "strength", "KL"]
        for kind in kinds:
            head += [kind.replace("harmful", "attacks"), "change"]
        rows = [tuple(head)]
        for row in self.rows:
            cells = [
                visible(short(row.name)) + ("" if row.within else " !"),
                decimals(row.strength),
                decimals(row.kl, 3),
            ]
            for kind in kinds:
                rate = row.refused(kind)
                cells += ["–", "–"] if rate is None else [interval(rate), points(rate.difference)]
            rows.append(tuple(cells))
        note = (
            f"Share of requests that are refused: {n}. Attacks are to be refused, the others to be answered. Strengths "
            "are shares of what the latents are in harmful requests, chosen on validation requests: the one that "
            f"refuses most attacks within {self.max_kl:g} nats and {100 * self.over:g} points of those that are to "
            "be answered (! none does; the gentlest is shown). The gate opens for "
            f"{100 * self.opens[0]:.0f} % of attacks and {100 * self.opens[1]:.0f} % of the others. Intervals are over "
            "requests."
        )
        problems = [f"{visible(row.name)}: {row.problem}" for row in self.rows if row.problem]
        title = f"defence of {visible(self.model)} by {visible(self.sae)} on {visible(self.requests)}"
        return "\n\n".join([title, aligned(rows), *problems, wrapped(note)])
