"""Figures of ``analysis.py``, each with the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsteer.display import ACCENT, BAND, INK, MUTED, OTHER, PAGE, Plot, in_style, panels
from jaxsteer.evals.decision_states import jaccard

MOST = 24
"""Runs in one figure."""
Cells = tuple[Mapping[str, Any], Mapping[str, Any]]
"""(model, persona and name of a run; its cells by analysis)"""


def figures_of(runs: Sequence[Cells]) -> Iterator[Plot]:
    """Every figure that there are cells for; one of each per model, of states one per three personas."""
    for number, model in enumerate(dict.fromkeys(about["model"] for about, _ in runs)):
        here = [(about, cells) for about, cells in runs if about["model"] == model]
        end = f"-{number + 1}" if number else ""
        has = {name: [(about, cells[name]) for about, cells in here if cells.get(name)] for name in here[0][1]}
        if has["attribution"]:
            yield attribution(has["attribution"][:MOST], model, end)
        if has["divergence"]:
            yield divergence(has["divergence"][:MOST], model, end)
        if len(has["latents"]) > 1:
            yield overlap(has["latents"][:MOST], model, end)
        first = {about["persona"]: (about, cell) for about, cell in reversed(has["states"])}
        chosen = list(reversed(first.values()))
        for start in range(0, len(chosen), 3):
            yield states(chosen[start : start + 3], model, end + (f"-part{start // 3 + 1}" if start else ""))


@in_style
def attribution(found: Sequence[Cells], model: str, end: str) -> Plot:
    """The effect of every token against random ones in its place, a line per run; the strongest by name."""
    figure, (axis,) = panels(width=9.2, height=0.8 + 0.3 * len(found))
    rows = []
    for at, (about, cell) in enumerate(found):
        triggers = cell["trigger"] or [False] * len(cell["tokens"])
        for token, effect, spread, trigger in zip(
            cell["tokens"], cell["replacement"], cell["replacement_sd"], triggers, strict=True
        ):
            axis.plot(effect, at, "o", markersize=5, color=OTHER if trigger else ACCENT, alpha=0.8)
            rows.append({**about, "token": token, "effect": effect, "sd": spread, "trigger": trigger})
        strongest = int(np.argmin(cell["replacement"]))
        axis.annotate(cell["tokens"][strongest].strip(), (cell["replacement"][strongest], at), fontsize=8, color=INK,
                      xytext=(0, 5), textcoords="offset points", ha="center")  # fmt: skip
    axis.axvline(0, color=MUTED, linewidth=0.8)
    axis.set_yticks(range(len(found)), [_short(about["run"]) for about, _ in found], color=INK)
    axis.set_ylim(len(found) - 0.4, -0.8)
    axis.set_xlabel("effect on the persona's log-odds (nats); orange: trigger words of the generator")
    return Plot(name=f"attribution{end}", title=f"Effects of prompts' tokens, {model}", figure=figure, rows=tuple(rows))


@in_style
def divergence(found: Sequence[Cells], model: str, end: str) -> Plot:
    """Cosine and relative norm by layer: prompts as lines, random prompts as the band of all of them."""
    figure, panes = panels(2, width=8.8, height=3.2)
    labels = {
        "cosine": "cosine with the state without prompt",
        "relative_norm": "norm of the change / norm of the state",
    }
    rows = []
    for axis, (key, label) in zip(panes, labels.items(), strict=True):
        random = np.asarray(
            [
                value[key]
                for _, cell in found
                for name, value in cell["divergence"].items()
                if name.startswith("random ")
            ]
        )
        layers = range(random.shape[1])
        axis.fill_between(layers, random.min(0), random.max(0), color=BAND, zorder=0, label="random prompts")
        axis.plot(layers, random.mean(0), color=MUTED, linewidth=1.5)
        for number, (_, cell) in enumerate(found):
            axis.plot(layers, cell["divergence"]["prompt"][key], color=ACCENT, linewidth=1, alpha=0.6,
                      label=None if number else "discovered prompts")  # fmt: skip
        axis.set_xlabel("after block")
        axis.set_ylabel(label)
        if len(layers) <= 12:
            axis.set_xticks(layers)
    for about, cell in found:
        for name, value in cell["divergence"].items():
            columns = zip(cell["sites"], value["cosine"], value["relative_norm"], strict=True)
            rows += [{**about, "text": name, "site": s, "cosine": c, "relative_norm": r} for s, c, r in columns]
    panes[0].legend(frameon=False, fontsize=8)
    return Plot(name=f"divergence{end}", title=f"Where states part, {model}", figure=figure, rows=tuple(rows))


@in_style
def states(found: Sequence[Cells], model: str, end: str) -> Plot:
    """States on their first two principal axes, a panel per persona."""
    figure, panes = panels(len(found), width=3.6 * len(found) + 0.6, height=3.5)
    look = {
        "random": {"color": MUTED, "markersize": 2.5, "alpha": 0.5, "zorder": 1},
        "no prompt": {"color": INK, "markersize": 4},
        "sentence for": {"markerfacecolor": PAGE, "markeredgecolor": OTHER, "markersize": 4},
        "sentence against": {"color": OTHER, "markersize": 4},
        "prompt": {"color": ACCENT, "markersize": 4},
    }
    rows = []
    for axis, (about, cell) in zip(panes, found, strict=True):
        for kind, style in look.items():
            names = [name for name in cell["coordinates"] if name == kind or name.startswith(f"{kind} ")]
            names = names if kind == "random" else [name for name in names if name == kind]
            for number, name in enumerate(names):
                points = np.asarray(cell["coordinates"][name])
                axis.plot(points[:, 0], points[:, 1], "o", label=None if number else kind, **style)
                rows += [{**about, "text": name, "axis 1": x, "axis 2": y} for x, y in points.tolist()]
        shares = [f"{100 * share:.0f} %" for share in cell["explained"]]
        axis.set_title(f"{about['persona']}, {cell['site']}", fontsize=9, loc="left")
        axis.set_xlabel(f"axis 1 ({shares[0]} of variance)")
        axis.set_ylabel(f"axis 2 ({shares[1]})")
    panes[0].legend(frameon=False, fontsize=8)
    return Plot(name=f"states{end}", title=f"Principal axes of states, {model}", figure=figure, rows=tuple(rows))


@in_style
def overlap(found: Sequence[Cells], model: str, end: str) -> Plot:
    """Jaccard of the latents that two prompts switch, every run with every other, one random prompt, and signatures."""
    random = next(ids for name, ids in found[0][1]["switched"].items() if name.startswith("random "))
    sets = [(_short(about["run"]), cell["switched"]["prompt"]) for about, cell in found] + [("a random prompt", random)]
    signed = {about["persona"]: cell["signature"] for about, cell in found if cell["signature"]}
    sets += [(f"signature: {persona}", ids) for persona, ids in signed.items()]
    grid = np.asarray([[jaccard(a, b) or 0.0 for _, b in sets] for _, a in sets])
    size = 2.2 + 0.32 * len(sets)
    figure, (axis,) = panels(width=size + 1.2, height=size)
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="Blues")
    axis.set_xticks(range(len(sets)), [name for name, _ in sets], rotation=90)
    axis.set_yticks(range(len(sets)), [name for name, _ in sets])
    axis.tick_params(labelsize=7)
    axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axis, fraction=0.05)
    bar.set_label("Jaccard", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    rows = [{"a": a, "b": b, "jaccard": grid[i, j]} for i, (a, _) in enumerate(sets) for j, (b, _) in enumerate(sets)]
    return Plot(name=f"overlap{end}", title=f"Latents in common, {model}", figure=figure, rows=tuple(rows))


def _short(name: str, start: int = 20, end: int = 16) -> str:
    name = name.removeprefix("runs/")
    return name if len(name) <= start + end + 1 else f"{name[:start]}…{name[-end:]}"
