"""What the page of an axis run shows of the work that was done with the axis: conversations that drift, caps, and
what holds the Assistant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxsteer.axis.cap_result import CapResult, CapRow
from jaxsteer.axis.drift import Drift
from jaxsteer.axis.hold_result import EDIT, PROMPT, HoldResult, HoldRow
from jaxsteer.display import Plot, decimals, percent, share
from jaxsteer.ranges import Interval
from jaxsteer.report.axis_files import cut

STYLES = {PROMPT: "other", EDIT: "persona"}
"""Of replies, by the kind of the method."""
ASKED = 8
"""Questions whose replies are shown under every condition."""


def drift_plot(name: str, drift: Drift) -> Plot:
    """The curves of conversations, by domain."""
    title = f"Conversations along the axis, turn by turn: {name}"
    return Plot(name=f"drift-{name}", title=title, figure=drift.plot(), rows=tuple(drift.to_rows()))


def caps_plot(name: str, found: CapResult) -> Plot:
    """How far each condition moves replies in roles against what it does to neutral text."""
    title = f"What caps and their controls move, against KL on neutral text: {name}"
    return Plot(name=f"caps-{name}", title=title, figure=found.plot(), rows=tuple(found.to_rows()))


def drift_part(name: str, drift: Drift) -> dict[str, Any]:
    """What the page shows of conversations along the axis."""
    unit = "units of the stream"
    if drift.roles is not None and drift.default is not None:
        unit = "positions (0 the mean of the roles, 1 the default)"

    def place(value: float) -> str:
        return f"{value:.4g}" if unit == "units of the stream" else decimals(drift.position(value))

    rows = [
        (
            one.name, str(one.conversations), place(one.first), place(one.last),
            "–" if one.slope is None else _change(one.slope.value, one.slope.ci95),
            f"±{max(map(abs, one.random_slopes)):.2g}" if one.random_slopes else "–", decimals(one.shuffled_p, 3),
            f"{percent(one.below)} ({100 * one.below_ci95[0]:.0f}–{100 * one.below_ci95[1]:.0f})", percent(one.drifted),
        )
        for one in drift.domains
    ]  # fmt: skip
    contrasts = [
        (f"{c.first} − {c.second}", _change(c.level, c.level_ci95), _change(c.slope, c.slope_ci95))
        for c in drift.contrasts
    ]
    moved = () if drift.movers is None else (*drift.movers.away, *drift.movers.towards[::-1])
    return {"name": name, "drift": drift, "unit": unit, "rows": rows, "contrasts": contrasts, "place": place} | {
        "moved": moved
    }


def _change(value: float | None, ci95: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:+.2g}" + ("" if ci95 is None else f" ({ci95[0]:+.2g} to {ci95[1]:+.2g})")


def caps_part(name: str, found: CapResult) -> dict[str, Any]:
    """What the page shows of caps and their controls."""
    judged, dataset = (any(getattr(row, part) is not None for row in found.rows) for part in ("judged", "persona"))
    head = ["KL", "perplexity", "answers changed", "their KL", "position", "moved by"]
    return {
        "name": name,
        "found": found,
        "head": [*head, *["assistant, judged"] * judged, *["persona’s answer"] * dataset],
        "rows": [(row, _cap_cells(row, judged, dataset)) for row in found.rows],
        "asked": _side_by_side(
            [f"{one.role}, asked: {one.question}" for one in found.asked],
            _cap_names(found),
            [row.replies for row in found.rows],
        ),
        "ordinary": _side_by_side(list(found.ordinary), _cap_names(found), [row.answers for row in found.rows]),
    }


def _cap_names(found: CapResult) -> list[tuple[str, str]]:
    """Conditions with their style: caps along the axis stand out."""
    return [(row.name or "as it is", "other" if row.name.startswith("cap, ") else "") for row in found.rows]


def _cap_cells(row: CapRow, judged: bool, dataset: bool) -> list[str]:
    place = decimals(row.position if row.position is not None else row.along)
    cells = [decimals(row.kl, 3), decimals(row.perplexity, 1), share(row.changed, row.changed_ci95)]
    cells += [decimals(row.reply_kl, 3), place, _change(row.moved, row.moved_ci95)]
    cells += [decimals(row.judged.score if row.judged else None)] * judged
    return cells + [share(row.persona, row.persona_ci95)] * dataset


def _side_by_side(
    questions: Sequence[str], names: Sequence[tuple[str, str]], texts: Sequence[Sequence[str]]
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(question, [(condition, style, reply)]) of the first questions; ``names`` are conditions with their style."""
    return [
        (
            question,
            [(*name, cut(said[at])) for name, said in zip(names, texts, strict=True) if at < len(said)],
        )
        for at, question in enumerate(questions[:ASKED])
    ]


def hold_plot(name: str, found: HoldResult) -> Plot:
    """Positions of replies in roles under every method, beside its disturbance."""
    title = f"What holds the Assistant at equal disturbance: {name}"
    return Plot(name=f"hold-{name}", title=title, figure=found.plot(), rows=tuple(found.to_rows()))


def hold_part(name: str, found: HoldResult) -> dict[str, Any]:
    """What the page shows of prompts, caps and vectors that hold the Assistant against a role."""
    attacked = any(row.attacked is not None for row in found.rows)
    return {
        "name": name,
        "found": found,
        "head": ["KL", "position", "moved by", *["attacked", "moved by"] * attacked, "answers", "distinct"],
        "rows": [(row, _hold_cells(row, attacked)) for row in found.rows],
        "asked": _side_by_side(
            [f"{one.role}{' (attack)' if one.attack else ''}, asked: {one.question}" for one in found.asked],
            [(row.name, STYLES.get(row.kind, "")) for row in found.rows],
            [row.replies for row in found.rows],
        ),
    }


def _hold_cells(row: HoldRow, attacked: bool) -> list[str]:
    cells = [decimals(row.kl), decimals(row.position), _change(row.moved, row.moved_ci95)]
    cells += [decimals(row.attacked), _change(row.attacked_moved, row.attacked_ci95)] * attacked
    return [*cells, share(row.relevant, row.relevant_ci95), percent(row.distinct)]
