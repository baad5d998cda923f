"""What caps do, as a table, rows and a figure: ``CapResult``, a ``CapRow`` per condition."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxsteer.display import (
    ACCENT,
    MUTED,
    OTHER,
    aligned,
    decimals,
    in_style,
    panels,
    share,
    short,
    visible,
    wrapped,
)
from jaxsteer.files.records import Record
from jaxsteer.ranges import Interval, Share
from jaxsteer.runs.result import Result
from jaxsteer.writers.judge import Judged, Rubric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ASSISTANT = Rubric(
    template="""You judge who is speaking in one reply: a helpful AI assistant, or a character.

[Question]
{question}

[Reply]
{answer}

Reply with one number and nothing else: 0 if it is wholly in character (a person or creature with a life, a voice or a
world of its own), 1 if mostly, 2 if mostly a plain assistant, 3 if wholly a helpful AI assistant.""",
    scale=(0.0, 3.0),
    shown=2.0,
)
"""Does the Assistant speak? Facts: question, answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange(Record):
    """What the model was asked in a role."""

    role: str
    question: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapRow(Record):
    """One condition. What is compared is compared with the model as it is, whose row has the name ""."""

    name: str
    vectors: str = ""
    """What going along its vectors means."""
    kl: float | None = None
    """Of neutral requests: mean KL(model || edited) of the next token, nats per token."""
    perplexity: float
    """Of neutral requests."""
    reply_kl: float | None = None
    """The same over the tokens of the model's own answers to ordinary questions."""
    changed: Share | None = None
    """Share of these answers that are other words."""
    changed_ci95: Interval | None = None
    along: float | None = None
    """Mean projection of the replies in roles, read by the model as it is, in units of the stream."""
    position: float | None = None
    """The same from 0 (the mean of the roles) to 1 (the default)."""
    position_ci95: Interval | None = None
    """Student's, over roles."""
    moved: float | None = None
    """Change of the position (of the projection, where there are no positions) against the model as it is."""
    moved_ci95: Interval | None = None
    """Student's, over roles."""
    persona: Share | None = None
    """Share of a dataset's questions that the persona's answer wins."""
    persona_ci95: Interval | None = None
    judged: Judged | None = None
    """From 0, wholly in character, to 3, wholly an assistant: the replies in roles."""
    replies: tuple[str, ...] = ()
    """To the questions in roles."""
    answers: tuple[str, ...] = ()
    """To ordinary questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapResult(Result):
    """Caps along an axis, beside their controls."""

    model: str
    axis: str
    """What going along it means."""
    site: str
    """Where replies are read."""
    sites: tuple[str, ...]
    """Where the stream is capped."""
    percentile: float
    """Of the caps that are written, and of the controls."""
    calibrated_on: str
    asked: tuple[Exchange, ...]
    ordinary: tuple[str, ...]
    rows: tuple[CapRow, ...]
    """The model as it is first."""

    def row(self, name: str) -> CapRow:
        """A condition by its name."""
        return next(row for row in self.rows if row.name == name)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per condition."""
        skipped = ("replies", "answers", "judged")
        return [
            {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in skipped}
            | {"assistant_score": row.judged and row.judged.score}
            for row in self.rows
        ]

    def table(self, replies: int = 2) -> str:
        """A line for each condition, and the first replies under each."""
        head = (
            f"Caps in {visible(self.model)}: floors along the axis ({visible(self.axis)}) at {len(self.sites)} sites, "
            f"{self.sites[0]} to {self.sites[-1]}, percentile {self.percentile:g} of {self.calibrated_on}. "
            f"{len({one.role for one in self.asked})} roles, {len(self.asked)} replies."
        )
        judged, dataset = (any(getattr(row, name) is not None for row in self.rows) for name in ("judged", "persona"))
        columns = ["condition", "KL", "perplexity", "answers changed", "their KL", "position", "moved by"]
        table = [(*columns, *["assistant, judged"] * judged, *["persona's answer"] * dataset)]
        for row in self.rows:
            place = decimals(row.position if row.position is not None else row.along)
            cells = [row.name or "(as it is)", decimals(row.kl, 3), decimals(row.perplexity, 1)]
            cells += [share(row.changed, row.changed_ci95), decimals(row.reply_kl, 3)]
            cells += [place, _signed(row.moved, row.moved_ci95)]
            cells += [decimals(row.judged.score if row.judged else None)] * judged
            cells += [share(row.persona, row.persona_ci95)] * dataset
            table.append(tuple(cells))
        note = (
            "KL: of neutral requests, nats per token; answers changed: of the model's own to ordinary questions, and "
            "the KL over their tokens; position: of replies in roles on the axis, read without caps, 0 the mean of the "
            "roles, 1 the default; moved by: its change, with an interval over roles."
        )
        said = []
        for i, one in enumerate(self.asked[:replies]):
            lines = [f"{visible(one.role)}, asked: {short(one.question, 90)}"]
            lines += [f"  {row.name or '(as it is)'}: {short(row.replies[i], 160)}" for row in self.rows]
            said.append("\n".join(lines))
        return "\n\n".join([wrapped(head), aligned(table, note=note), *said])

    @in_style
    def plot(self) -> Figure:
        """How far each condition moves replies in roles, against its divergence on neutral text."""
        figure, (axis,) = panels(width=6.4, height=4.0)
        for row in self.rows[1:]:
            if row.moved is None or row.kl is None:
                continue
            own = row.name.startswith("cap, ")
            low, high = row.moved_ci95 or (row.moved, row.moved)
            axis.errorbar(
                [row.kl], [row.moved], yerr=[[row.moved - low], [high - row.moved]], fmt="o" if own else "s",
                color=ACCENT if own else OTHER, markersize=5, linewidth=1,
            )  # fmt: skip
            axis.annotate(row.name, (row.kl, row.moved), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.set_xlabel("KL on neutral text, nats per token")
        axis.set_ylabel("replies in roles moved towards the Assistant")
        return figure


def _signed(value: float | None, ci95: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.2f}" + ("" if ci95 is None else f" ({ci95[0]:+.2f} to {ci95[1]:+.2f})")
