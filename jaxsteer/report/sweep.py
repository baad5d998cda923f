"""A sweep as a table for the terminal and as heat maps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.files import write_bytes
from jaxsteer.report.run_files import percent


def sweep_table(metrics: Mapping[str, Any]) -> str:
    """Persona rates and KL by layer and coefficient, then the chosen setting on test questions."""
    rows = [row for row in metrics["rows"] if row["direction"] == "persona"]
    coefficients = list(dict.fromkeys(row["coefficient"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    cells = {(row["layer"], row["coefficient"]): row for row in rows}
    head = f"{'layer':>5}  " + "".join(f"{c:>+16g}" for c in coefficients)
    lines = ["persona rate (KL on neutral text, nats per token) by coefficient, in mean norms of the stream", head]
    lines.append("-" * len(head))
    for layer in layers:
        row = [cells[layer, c] for c in coefficients]
        marked = [
            f"{100 * r['rate']:.1f} % ({r['kl']:.2f}){'!' if r['letter_collapse'] else ' '}".rjust(16) for r in row
        ]
        lines.append(f"{layer:>5}  " + "".join(marked))
    if any(row["letter_collapse"] for row in rows):
        lines.append("! one letter wins whatever is asked: the rate is no evidence")
    base = metrics["baseline"]
    lines.append(
        f"\nunsteered: rate {percent(base['validation']['rate'])}, perplexity of neutral text {base['perplexity']:.2f}"
    )
    chosen = metrics["chosen"]
    if chosen is None:
        return "\n".join([*lines, f"no setting keeps KL below {metrics['max_kl']:g} without a letter collapse"])
    lines.append(
        f"chosen on validation questions: layer {chosen['layer']}, coefficient {chosen['coefficient']:+g} (KL "
        f"{chosen['kl']:.3f}, perplexity {chosen['perplexity']:.2f}, A-rate {percent(chosen['a_rate'])})"
    )
    test, before = chosen["test"], chosen["test_baseline"]
    controls = "; ".join(f"{name} {percent(found['rate'])}" for name, found in chosen["test_controls"].items())
    lines.append(
        f"test questions: {percent(before['rate'])} -> {percent(test['rate'])} (95 %: {percent(test['ci95'][0])} to "
        f"{percent(test['ci95'][1])}, n = {test['n']})" + (f"; controls of equal norm: {controls}" if controls else "")
    )
    return "\n".join(lines)


def write_heat_maps(metrics: Mapping[str, Any], out: Path) -> Path:
    """``heatmap.png`` in ``out``: rate, KL and perplexity by layer and coefficient, one row per direction.

    "!" marks rates at which one letter wins whatever is asked.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = metrics["rows"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    coefficients = sorted({row["coefficient"] for row in rows})
    layers = sorted({row["layer"] for row in rows})
    collapsed = {(row["direction"], row["layer"], row["coefficient"]) for row in rows if row["letter_collapse"]}
    panels = (
        ("rate", "persona rate", "%"),
        ("kl", "KL on neutral text", "nats per token"),
        ("perplexity", "perplexity of neutral text", ""),
    )
    size = (2.4 + 0.42 * len(coefficients), 1.5 + 0.28 * len(layers))
    figure = Figure(figsize=(3 * size[0], len(directions) * size[1]), layout="constrained")
    axes = figure.subplots(len(directions), 3, squeeze=False)
    for column, (key, title, unit) in enumerate(panels):
        everything = np.asarray([row[key] for row in rows], float)
        scale = Normalize(0, 1) if key == "rate" else Normalize(0, max(float(np.nanmax(everything)), 1e-6))
        if key == "perplexity" and everything.min() > 0:
            scale = LogNorm(float(everything.min()), max(float(everything.max()), float(everything.min()) * 1.01))
        for line, direction in enumerate(directions):
            grid = np.full((len(layers), len(coefficients)), math.nan)
            for row in rows:
                if row["direction"] == direction:
                    grid[layers.index(row["layer"]), coefficients.index(row["coefficient"])] = row[key]
            axis = axes[line, column]
            image = axis.imshow(grid, aspect="auto", norm=scale, cmap="viridis_r")
            for (y, x), value in np.ndenumerate(grid):
                text = f"{100 * value:.0f}" if key == "rate" else f"{value:.{2 if value < 10 else 0}f}"
                if key == "rate" and (direction, layers[y], coefficients[x]) in collapsed:
                    text += "!"
                dark = scale(value) > 0.5
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            axis.set_xticks(range(len(coefficients)), [f"{c:+g}" for c in coefficients])
            axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axis.set_title(f"{direction}: {title}" + (f" ({unit})" if unit else ""), fontsize=9)
            axis.set_xlabel("coefficient (mean norms of the stream)", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
            axis.tick_params(labelsize=7)
            shown = PercentFormatter(1, symbol="") if key == "rate" else None
            figure.colorbar(image, ax=axis, fraction=0.05, format=shown)
    figure.suptitle(f"{metrics['persona']} on {metrics['model']}", fontsize=10)
    path = out / "heatmap.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    write_bytes(path, drawn.getvalue())
    return path
