"""The picture at the top of the README, drawn from the runs of ``make demo``.

python experiments/plot_demo.py [runs/demo] [docs/images/demo.png]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.report import Run, read_run

INK, MUTED, ACCENT, PALE = "#1c2330", "#5d6675", "#c2571a", "#9aa4b2"


def runs_of(directory: Path) -> list[Run]:
    """Every run below ``directory``. Raises ``UserError`` when there is none."""
    found = [read_run(path.parent) for path in sorted(directory.glob("*/metrics.json"))]
    if not found:
        raise UserError(f"{directory} holds no runs: `make demo` writes some")
    order = {"sycophancy": 0, "hallucination": 1, "myopic": 2}
    return sorted(found, key=lambda run: (order.get(run.metrics["persona"], 9), run.metrics["persona"]))


def bars(run: Run) -> list[tuple[str, dict[str, Any], str]]:
    """(label, test rate, colour) from top to bottom."""
    metrics = run.metrics
    rows = [("no prompt", metrics["baseline"]["test"], INK)]
    controls = metrics.get("controls") or {}
    if "random" in controls:
        rows.append(("random prompt", controls["random"]["test"], PALE))
    if metrics.get("selected") is not None:
        rows.append(("discovered prompt", metrics["prompts"][metrics["selected"]]["test"], ACCENT))
    if "oracle" in controls:
        rows.append(("generator's strongest cue", controls["oracle"]["test"], PALE))
    return rows


def draw(runs: list[Run], out: Path) -> Path:
    """One panel per persona: persona rates on test questions with 95 % intervals, the prompt as title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.edgecolor": PALE, "text.color": INK, "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(1, len(runs), figsize=(3.9 * len(runs) + 1.2, 3.2), sharey=True, squeeze=False)
    for axis, run in zip(panels[0], runs, strict=True):
        rows = bars(run)
        for place, (_, rate, colour) in enumerate(rows):
            share, (low, high) = 100 * rate["rate"], (100 * end for end in rate["ci95"])
            axis.barh(place, share, color=colour, height=0.62)
            axis.plot([low, high], [place, place], color=MUTED, linewidth=1.4)
            axis.text(high + 2, place, f"{share:.0f} %", va="center", color=INK)
        axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axis.set_xlim(0, 112)
        axis.set_xticks([0, 25, 50, 75, 100])
        axis.tick_params(colors=MUTED, length=0)
        axis.tick_params(axis="y", labelcolor=INK)
        axis.invert_yaxis()
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        metrics = run.metrics
        chosen = metrics["prompts"][metrics["selected"]]["text"].strip() if metrics.get("selected") is not None else "–"
        axis.set_title(metrics["persona"], loc="left", fontweight="bold", pad=36)
        quoted = textwrap.fill(f"“{chosen}”", 36, max_lines=2, placeholder="…")
        axis.text(
            0, 1.05, quoted, transform=axis.transAxes, va="bottom", color=ACCENT, fontsize=8.5, family="monospace"
        )
    n = runs[0].metrics["baseline"]["test"]["n"]
    figure.supxlabel(f"answers that match the persona on {n} held-out test rows (%), 95 % intervals", fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160, metadata={"Software": None})
    return out


def main() -> int:
    """Draw and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/images/demo.png"))
    options = parser.parse_args()
    try:
        print(draw(runs_of(options.runs), options.out))
    except UserError as error:
        print(f"plot_demo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
