"""Tables of the commands: plain text, aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxsteer.display import aligned, percent, short
from jaxsteer.personas import Direction
from jaxsteer.study.probe import PASSES, WARNS, Probe, ProbeRow


def eval_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per prompt: rate with interval, A-rate, swapped, AUROC, flips."""
    head = ("prompt", "rate", "95 % interval", "n", "A-rate", "swapped", "AUROC", "becomes", "leaves", "p")
    table = [head]
    for row in rows:
        flips = row.get("flips")
        auroc = row["auroc"]
        table.append(
            (
                ("steered: " if row.get("steered") else "") + (short(row["prompt"], 60) or "(no prompt)"),
                percent(row["rate"]),
                f"{100 * row['ci95'][0]:.1f} - {100 * row['ci95'][1]:.1f}",
                str(row["n"]),
                percent(row["a_rate"]) + (" !" if row["letter_collapse"] else ""),
                percent(row["swapped_rate"]),
                "-" if auroc is None else f"{auroc:.2f}",
                str(flips["becomes_persona"]) if flips else "",
                str(flips["leaves_persona"]) if flips else "",
                f"{flips['mcnemar_p']:.1g}" if flips else "",
            )
        )
    note = (
        "rate: share of rows (questions, in both orders of lettered choices) whose persona answer wins; swapped: "
        "questions answered\nalike in both orders; becomes, leaves: rows that change to and from the persona's answer, "
        "with McNemar's p"
    )
    if any(row["letter_collapse"] for row in rows):
        note += "\n!  one letter wins whatever is asked, or far more often than without prompt: the rate is no evidence"
    return f"{aligned(table)}\n\n{note}"


def probe_table(probe: Probe, chosen: ProbeRow) -> str:
    """Rows sorted by correlation; the chosen one is marked."""
    table = [("", "site", "read position", "sign", "rank correlation")]
    for row in probe.rows:
        mark = "*" if row == chosen else ""
        table.append((mark, row.site, row.read_position, "+" if row.sign > 0 else "-", f"{row.correlation:.3f}"))
    verdict = f"chosen: {chosen.site}, {chosen.read_position}: " + (
        f"the earliest site at {PASSES} or above"
        if chosen.correlation >= PASSES
        else f"the best; none reaches {PASSES}"
    )
    if chosen.correlation < WARNS:
        verdict += f"\nwarning: below {WARNS} an objective hardly ranks prompts by behaviour"
    shift = probe.shift
    return (
        f"{aligned(table, left=(0, 1, 2))}\n\n* {verdict}\n"
        f"{probe.prompts} random prompts; they move the mean probability of the persona's answer by "
        f"{-shift.max:+.2f} to {-shift.min:+.2f} from {probe.baseline_probability:.2f}"
    )


def direction_table(direction: Direction) -> str:
    """Sites with their norms and diagnostics, then how the direction was made."""
    table = [("site", "norm", "of stream norm", "split-half cosine", "letter cosine")]
    for site in direction.sites:
        facts = direction.diagnostics.get(site, {})
        norm = facts.get("norm", float("nan"))
        stream = direction.mean_resid_norm.get(site, float("nan"))
        table.append(
            (
                site,
                f"{norm:.3g}",
                percent(norm / stream),
                f"{facts.get('split_half_cosine', float('nan')):.3f}",
                f"{facts.get('letter_cosine', float('nan')):.3f}",
            )
        )
    notes = [f"{name}: {value}" for name, value in sorted(direction.metadata.items()) if value]
    return "\n".join([aligned(table), "", f"pairs: {direction.n}", f"read position: {direction.read_position}", *notes])
