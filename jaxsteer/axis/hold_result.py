"""What holds the Assistant against a role: ``HoldResult``, a ``HoldRow`` for each method at equal disturbance."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxsteer.display import (
    ACCENT,
    INK,
    MUTED,
    OTHER,
    aligned,
    decimals,
    in_style,
    panels,
    percent,
    share,
    short,
    visible,
)
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.runs.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AS_IS, NO_ROLE = "as it is", "no role"
PROMPT, CONTROL, EDIT = "prompt", "control", "edit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(Record):
    """A conversation of the test: a role's system message or an attack, and a question."""

    role: str
    """Name of the role, or of the attack."""
    attack: bool = False
    question: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldRow(Record):
    """One method. Positions are of its replies, read by the model as it is and without the prompt."""

    name: str
    kind: str
    """"prompt", "edit", or "control"."""
    text: str = ""
    """Of a prompt."""
    strength: str = ""
    """Of an edit, in words."""
    kl: float | None = None
    """KL(model || with it) over the model's own replies to ordinary requests, nats per token."""
    target: float | None = None
    """Of a searched prompt, its objective in standard deviations over random prompts."""
    cross_entropy: float | None = None
    """Of a searched prompt, nats per token."""
    position: float
    """Mean over roles: 0 is the mean of the roles of the axis, 1 the Assistant."""
    position_ci95: Interval | None = None
    """Over roles."""
    moved: float | None = None
    """Change against the model as it is, role by role."""
    moved_ci95: Interval | None = None
    attacked: float | None = None
    """Mean position of replies under attacks, and its change."""
    attacked_moved: float | None = None
    attacked_ci95: Interval | None = None
    relevant: Share
    """Share of all replies, attacked ones too, whose own question is the likeliest of eight after them."""
    relevant_ci95: Interval | None = None
    """Over roles and attacks."""
    distinct: Share
    """Share of the replies' three-word sequences that are not a repetition within the reply."""
    replies: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldResult(Result):
    """Prompts, caps and vectors that hold the Assistant while a role stands in the system message."""

    model: str
    site: str
    """Where replies are read, and where searches read the prompt."""
    cosine: float
    """Of the axis read in replies with the one read where the reply begins, along which prompts are searched."""
    kl: float
    """The disturbance of the discovered prompt, at which edits are compared."""
    train_roles: tuple[str, ...]
    asked: tuple[Asked, ...]
    rows: tuple[HoldRow, ...]
    """The model as it is first."""
    seed: CountFrom0 = 0

    def row(self, name: str) -> HoldRow:
        """A method by its name."""
        return next(row for row in self.rows if row.name == name)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per method."""
        return [
            {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "replies"} for row in self.rows
        ]

    def table(self, replies: int = 2) -> str:
        """A line for each method, and the first replies under each."""
        roles = [one for one in self.asked if not one.attack]
        head = (
            f"Holding the Assistant in {visible(self.model)}: {len({one.role for one in roles})} roles that no search "
            f"saw, {len(roles)} replies; axis at {self.site}, searched where the reply begins (cosine of the two axes "
            f"{self.cosine:.2f}); edits at the prompt's own disturbance, {self.kl:.2f} nats"
        )
        attacked = any(row.attacked is not None for row in self.rows)
        table = [("method", "KL", "position", "moved by", *["attacked", "moved by"] * attacked, "answers", "distinct")]
        for row in self.rows:
            cells = [row.name, decimals(row.kl), decimals(row.position), _signed(row.moved, row.moved_ci95)]
            cells += [decimals(row.attacked), _signed(row.attacked_moved, row.attacked_ci95)] * attacked
            table.append((*cells, share(row.relevant, row.relevant_ci95), percent(row.distinct)))
        note = (
            "position: of replies in roles on the axis, read by the model as it is and without the prompt, 0 the mean "
            "of the roles, 1 the Assistant; moved by: against the model as it is, 95 % interval over roles (attacks); "
            "answers: share of all replies, attacked ones too, whose own question is the likeliest of eight after them "
            "(chance: 12.5 %), with its interval; distinct: three-word sequences that do not repeat; KL: over the "
            "model's own replies to ordinary requests, nats per token."
        )
        parts = [head, aligned(table, note=note)]
        texts = [f"  {row.name}: {visible(row.text)!r}" for row in self.rows if row.text]
        parts += ["\n".join(["Prompts:", *texts])] if texts else []
        for i, one in enumerate(self.asked[:replies]):
            lines = [f"{visible(one.role)}, asked: {short(one.question, 90)}"]
            lines += [f"  {row.name}: {short(row.replies[i], 150)}" for row in self.rows]
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    @in_style
    def plot(self) -> Figure:
        """Positions of the methods with intervals, beside their disturbance."""
        figure, (left, right) = panels(2, width=10.5, height=0.9 + 0.34 * len(self.rows), share_y=True)
        colours = {PROMPT: ACCENT, EDIT: OTHER, CONTROL: MUTED}
        for at, row in enumerate(self.rows):
            colour = colours.get(row.kind, INK)
            low, high = row.position_ci95 or (row.position, row.position)
            left.plot([low, high], [at, at], color=colour, linewidth=2, solid_capstyle="butt")
            left.plot(row.position, at, "o", markersize=5, color=colour)
            right.plot(row.kl or 0.0, at, "o", markersize=5, color=colour)
        left.set_yticks(range(len(self.rows)), [short(row.name, 44) for row in self.rows])
        left.set_ylim(len(self.rows) - 0.4, -0.6)
        left.set_xlabel("position of replies in roles (1: the Assistant)")
        right.set_xlabel("KL on replies to ordinary requests (nats per token)")
        return figure


def _signed(value: float | None, ci95: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.2f}" + ("" if ci95 is None else f" ({ci95[0]:+.2f} to {ci95[1]:+.2f})")
