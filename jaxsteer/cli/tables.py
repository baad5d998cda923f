"""Tables of the commands: plain text, aligned."""

from __future__ import annotations

import math

from jaxsteer.display import aligned, decimals, percent
from jaxsteer.personas import Direction
from jaxsteer.study.probe import PASSES, WARNS, Probe, ProbeRow


def probe_table(probe: Probe, chosen: ProbeRow) -> str:
    """Rows sorted by correlation; the chosen one is marked."""
    table = [("", "site", "read position", "sign", "rank correlation", "95 % interval")]
    for row in probe.rows:
        mark = "*" if row == chosen else ""
        sign, between = "+" if row.sign > 0 else "-", "{:.2f} to {:.2f}".format(*row.ci95 or (-1, 1))
        table.append((mark, row.site, row.read_position, sign, f"{row.correlation:.3f}", between))
    verdict = f"chosen: {chosen.site}, {chosen.read_position}: " + (
        f"the earliest site at {PASSES} or above"
        if chosen.correlation >= PASSES
        else f"the best; none reaches {PASSES}"
    )
    if chosen.correlation < WARNS:
        verdict += f"\nwarning: below {WARNS} an objective hardly ranks prompts by behaviour"
    shift = probe.shift
    note = (
        f"* {verdict}\n{probe.prompts} random prompts; they move the mean probability of the persona's answer by "
        f"{-shift.max:+.2f} to {-shift.min:+.2f} from {probe.baseline_probability:.2f}"
    )
    return aligned(table, left=(0, 1, 2), note=note)


def direction_table(direction: Direction) -> str:
    """Sites with their norms and diagnostics, then how the direction was made."""
    facts = ("split_half_cosine", "letter_cosine", "agreement", "separability", "auroc")
    some = [name for name in facts if any(name in direction.diagnostics.get(site, {}) for site in direction.sites)]
    named = {"split_half_cosine": "split-half cosine", "letter_cosine": "letter cosine", "separability": "d'"}
    table = [("site", "norm", "of stream norm", *(named.get(name, name) for name in some))]
    for site in direction.sites:
        found = direction.diagnostics.get(site, {})
        norm, stream = found.get("norm", math.nan), direction.mean_resid_norm.get(site, math.nan)
        table.append(
            (
                site,
                "–" if math.isnan(norm) else f"{norm:.3g}",
                percent(norm / stream),
                *(decimals(found.get(name), 3) for name in some),
            )
        )
    notes = [f"{name}: {value}" for name, value in sorted(direction.metadata.items()) if value]
    if "auroc" in some:
        notes.append("agreement, d' and auroc: on validation questions (docs/steering.md)")
    note = "\n".join([f"pairs: {direction.n}", f"read position: {direction.read_position}", *notes])
    return aligned(table, note=note)
