"""The picture at the top of the README, drawn from the runs of ``make demo``.

python experiments/plot_demo.py [runs/demo] [docs/images/demo.png]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.evals.rates import Rate
from jaxsteer.report import read_run
from jaxsteer.study.results import SearchRun

INK, MUTED, ACCENT, PALE = "#1c2330", "#5d6675", "#c2571a", "#9aa4b2"


def runs_of(directory: Path) -> list[SearchRun]:
    """Every run below ``directory``. Raises ``UserError`` when there is none."""
    found = [read_run(path.parent).result for path in sorted(directory.glob("*/metrics.json"))]
    if not found:
        raise UserError(f"{directory} holds no runs: `make demo` writes some")
    order = {"sycophancy": 0, "hallucination": 1, "myopic": 2}
    return sorted(found, key=lambda run: (order.get(run.persona, 9), run.persona))


def bars(run: SearchRun) -> list[tuple[str, Rate, str]]:
    """(label, test rate, colour) from top to bottom."""
    rows = [
        ("no prompt", run.baseline, INK),
        ("random prompt", run.controls.get("random"), PALE),
        ("discovered prompt", run.best, ACCENT),
        ("generator's strongest cue", run.controls.get("oracle"), PALE),
    ]
    return [(label, prompt.test, colour) for label, prompt, colour in rows if prompt is not None and prompt.test]


def draw(runs: list[SearchRun], out: Path) -> Path:
    """One panel per persona: persona rates on test questions with 95 % intervals, the prompt as title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.edgecolor": PALE, "text.color": INK, "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(1, len(runs), figsize=(3.9 * len(runs) + 1.2, 3.2), sharey=True, squeeze=False)
    for axis, run in zip(panels[0], runs, strict=True):
        rows = bars(run)
        for place, (_, rate, colour) in enumerate(rows):
            share, (low, high) = 100 * rate.rate, (100 * end for end in rate.ci95)
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
        chosen = "–" if run.best is None else run.best.text.strip()
        axis.set_title(run.persona, loc="left", fontweight="bold", pad=36)
        quoted = textwrap.fill(f"“{chosen}”", 36, max_lines=2, placeholder="…")
        axis.text(
            0, 1.05, quoted, transform=axis.transAxes, va="bottom", color=ACCENT, fontsize=8.5, family="monospace"
        )
    counts = sorted({rate.n for run in runs for _, rate, _ in bars(run)})
    n = " to ".join(map(str, counts if len(counts) < 3 else (counts[0], counts[-1])))
    figure.supxlabel(f"answers that match the persona on {n} held-out questions (%), 95 % intervals", fontsize=9)
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
