"""The page of ``jaxsteer lens read``: maps of tokens and places that answer to the mouse without a script, differences
between two runs, and figures of attention and probes where such lie beside the result."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from jaxsteer.display import Plot, short, visible
from jaxsteer.lens import LensComparison, LensReading
from jaxsteer.lens.lens_files import KIND, read_result
from jaxsteer.report.axis_files import kind_of_run
from jaxsteer.report.run_files import read_object
from jaxsteer.report.templates import embedded, flat, template
from jaxsteer.runs.files import CONFIG

TEXTS, TOKENS, LETTERS = 4, 192, 11
"""Texts with a map of their own, the last tokens of each that are in it, and letters of a token in a cell. The whole of
a longer text is an image above it."""
BESIDE = {"attention": "Attention", "probe": "Probes"}
"""Stems of PNG files beside the result that are shown, by their heading: what other commands' --plot wrote."""


def is_lens(directory: str | Path) -> bool:
    """Whether the directory is that of ``jaxsteer lens read``."""
    return kind_of_run(Path(directory)) == KIND


def lens_plots(directory: str | Path) -> dict[str, Plot]:
    """A map of every text that has one, and of the differences, by name."""
    return {plot.name: plot for plot in _plots(read_result(Path(directory)))}


def _plots(found: LensReading | LensComparison) -> list[Plot]:
    run = found.run if isinstance(found, LensComparison) else found
    count = min(TEXTS, len(run.texts))
    plots = [run.plot(text) for text in range(count)]
    return plots + ([found.plot(text) for text in range(count)] if isinstance(found, LensComparison) else [])


def render_lens(directory: str | Path) -> str:
    """The whole page as text. Everything that comes from the files is escaped by the template."""
    path = Path(directory)
    found = read_result(path)
    compared = found if isinstance(found, LensComparison) else None
    run = found if isinstance(found, LensReading) else found.run
    plots = {plot.name: Markup(plot.svg(themed=True)) for plot in _plots(found)}
    shown = min(TEXTS, len(run.texts))
    return template("lens").render(
        title=visible(f"What {run.model} has in its stream: {run.lens}"),
        run=run,
        compared=compared,
        maps=[_map(run, compared, text, plots) for text in range(shown)],
        shown=shown,
        tokens=sum(len(text.tokens) for text in run.texts),
        beside=[(title, _image(path / f"{stem}.png")) for stem, title in BESIDE.items()],
        settings=flat(read_object(path / CONFIG) or {}),
        environment=[],
        numbers=[],
        command=None,
        data=embedded({}),
    )


def _image(path: Path) -> str | None:
    """A PNG file as a data URL; None where there is none."""
    if not path.is_file() or not (data := path.read_bytes()).startswith(b"\x89PNG"):
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _map(run: LensReading, compared: LensComparison | None, text: int, plots: dict[str, Markup]) -> dict[str, Any]:
    """Rows of the map of a text, the output first: a place, and for every token its cell."""
    cells, tokens = run.at(text), run.texts[text].tokens
    first = max(0, len(tokens) - TOKENS)
    kl, chance = cells.kl[:, first:], np.exp(cells.top_log_probs[:, first:, 0])
    most = float(np.nanmax(kl, initial=0.0)) or 1.0
    apart = None if compared is None else compared.shift.kl[:, compared.shift.text == text][:, first:]
    widest = 1.0 if apart is None else float(np.nanmax(apart, initial=0.0)) or 1.0
    rows = []
    for s in reversed(range(len(run.places))):
        line = []
        for i in range(kl.shape[1]):
            far = 0.0 if apart is None else float(np.nan_to_num(apart[s, i])) / widest
            line.append({
                "word": short(run.word(cells.top_ids[s, first + i, 0]), LETTERS),
                "kl": round(100 * float(kl[s, i]) / most), "chance": round(100 * float(chance[s, i])),
                "apart": round(100 * far), "tip": _tip(run, compared, text, s, first + i),
            })  # fmt: skip
        rows.append((run.places[s], line))
    whole = f"lens-{text}-kl"
    return {
        "text": text, "head": [(first + i, short(token, LETTERS)) for i, token in enumerate(tokens[first:])],
        "rows": rows, "cut": first, "kl": most, "apart": widest,
        "images": [plots[name] for name in (whole, f"lens-{text}-difference") if name in plots],
    }  # fmt: skip


def _tip(run: LensReading, compared: LensComparison | None, text: int, s: int, i: int) -> str:
    """What a cell says when it is pointed at: the top tokens, KL and entropy; of two runs what is gained."""
    at = int(np.flatnonzero(run.cells.text == text)[i])
    c = run.cells
    lines = [f"{run.places[s]}, token {i} {visible(run.texts[text].tokens[i])}"]
    lines += [
        f"{100 * np.exp(value):5.1f} %  {visible(run.word(token))}"
        for token, value in zip(c.top_ids[s, at, :10], c.top_log_probs[s, at, :10], strict=True)
    ]
    lines.append(f"KL to the output {c.kl[s, at]:.2f}, entropy {c.entropy[s, at]:.2f} nats")
    if compared is not None and compared.shift.at[at] >= 0:
        shift = compared.shift
        lines.append(f"KL({compared.run_name} || {compared.base_name}) {shift.kl[s, at]:.3f}")
        for ids, values in ((shift.gained_ids, shift.gained), (shift.lost_ids, shift.lost)):
            lines += [
                f"{100 * value:+5.1f} %  {visible(compared.words.get(str(int(token)), ''))}"
                for token, value in zip(ids[s, at, :3], values[s, at, :3], strict=True)
            ]
    return "\n".join(lines)
