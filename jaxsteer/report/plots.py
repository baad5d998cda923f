"""Plots as SVG inside the page: no images, no scripts, colours from the page's style sheet (light and dark)."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.report.reading import controls, interval, named, number, split_rate, visible

WIDTH, HEIGHT = 680, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 44


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that lie in [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """A rectangle of the page with linear scales: ``x`` and ``y`` are the (low, high) of the data shown."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    width: int = WIDTH
    height: int = HEIGHT

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], **labels: Any) -> Axes:
        """Axes that hold all points with a little room."""
        return cls(x=_padded(xs), y=_padded(ys), **labels)

    def px(self, x: float) -> float:
        """Data to pixels, horizontally."""
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def py(self, y: float) -> float:
        """Data to pixels, vertically."""
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)

    def draw(self, body: Sequence[str], title: str) -> str:
        """The finished figure: grid, tick labels, axis labels and ``body`` on top."""
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for value in ticks(*self.x, count=7):
            at = self.px(value)
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{at}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y):
            at = self.py(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{value:g}</text>')
        middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
        parts.append(
            f'<text class="label" x="{middle_x}" y="{self.height - 6}" text-anchor="middle">'
            f"{html.escape(self.x_label)}</text>"
        )
        parts.append(
            f'<text class="label" x="14" y="{middle_y}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle_y})">{html.escape(self.y_label)}</text>'
        )
        return _svg(self.width, self.height, [*parts, *body], title)


def pareto_plot(metrics: Mapping[str, Any], pareto: Sequence[Mapping[str, Any]]) -> str | None:
    """Target against cross-entropy of every prompt of the frontier; None without a finite point."""
    points = [(number(row.get("cross_entropy")), number(row.get("target")), row) for row in pareto]
    known = [(x, y, row) for x, y, row in points if x is not None and y is not None]
    if not known:
        return None
    unit = visible(metrics.get("target_units", "sd"))
    axes = Axes.around(
        [x for x, _, _ in known],
        [y for _, y, _ in known],
        x_label="cross-entropy of the prompt (nats per token; left is more fluent)",
        y_label=f"target ({unit})",
    )
    prompts, index = metrics.get("prompts") or [], metrics.get("selected")
    chosen = prompts[index].get("text") if isinstance(index, int) and 0 <= index < len(prompts) else None
    good = sorted((x, y) for x, y, row in known if row.get("retokenises") is not False)
    path = " ".join(f"{axes.px(x)},{axes.py(y)}" for x, y in good)
    body = [f'<polyline class="line faint" points="{path}"/>'] if len(good) > 1 else []
    for x, y, row in known:
        text = row.get("text", "")
        at = f'cx="{axes.px(x)}" cy="{axes.py(y)}"'
        kind = "hollow" if row.get("retokenises") is False else "dot"
        tip = html.escape(f"{visible(text)}\ntarget {y:.3f}, cross-entropy {x:.3f}")
        body.append(f'<circle class="{kind}" {at} r="4.5"><title>{tip}</title></circle>')
        if chosen is not None and text == chosen:
            body.append(f'<circle class="ring" {at} r="9"/>')
    return axes.draw(body, "Target against cross-entropy of the prompts found")


def progress_plots(progress: Sequence[Mapping[str, Any]], unit: str = "sd") -> list[str]:
    """Best target and best J of every fluency slot against the step; fewer figures where there are no numbers."""
    figures = []
    series = [_series(progress, "best_target")]
    lines = [max(values) for _, values in series[0]]
    steps = [step for step, _ in series[0]]
    if len(steps) > 1:
        axes = Axes.around(steps, lines, x_label="step", y_label=f"best target ({unit})", width=460, height=260)
        path = " ".join(f"{axes.px(s)},{axes.py(v)}" for s, v in zip(steps, lines, strict=True))
        figures.append(axes.draw([f'<polyline class="line" points="{path}"/>'], "Best target against step"))
    losses = _series(progress, "best_loss")
    slots = min((len(values) for _, values in losses), default=0)
    if len(losses) > 1 and slots:
        steps = [step for step, _ in losses]
        axes = Axes.around(
            steps,
            [v for _, values in losses for v in values],
            x_label="step",
            y_label="best J (lower is better)",
            width=460,
            height=260,
        )
        body = []
        for slot in range(slots):
            path = " ".join(f"{axes.px(step)},{axes.py(values[slot])}" for step, values in losses)
            strength = 1.0 if slots == 1 else 0.25 + 0.75 * slot / (slots - 1)
            tip = f"fluency slot {slot + 1} of {slots}"
            body.append(
                f'<polyline class="line" opacity="{strength:.2f}" points="{path}"><title>{tip}</title></polyline>'
            )
        figures.append(axes.draw(body, "Best J of each fluency slot against step"))
    return figures


def rate_plot(metrics: Mapping[str, Any], *, limit: int = 24) -> str | None:
    """Persona rates with 95 % intervals: baseline as a band, prompts and controls as dots; None without a rate."""
    baseline = metrics.get("baseline")
    base = split_rate(baseline, "test") or split_rate(baseline, "validation")
    rows = [("no prompt", baseline, "base")]
    index = metrics.get("selected")
    for i, prompt in enumerate((metrics.get("prompts") or [])[:limit]):
        rows.append((str(prompt.get("text", "")), prompt, "chosen" if i == index else "prompt"))
    rows += [(f"[{named(row)}] {row.get('text') or ''}".rstrip(), row, "control") for row in controls(metrics)]
    rows = [row for row in rows if split_rate(row[1], "test") or split_rate(row[1], "validation")]
    if not rows:
        return None
    line, top, left, right, width = 24, 10, 300, 20, 980
    height = top + line * len(rows) + 40
    bottom = top + line * len(rows)

    def px(share: float) -> float:
        return round(left + share * (width - left - right), 1)

    parts = []
    if base is not None:
        low, high = _ends(base)
        parts.append(
            f'<rect class="band" x="{px(low)}" y="{top}" width="{px(high) - px(low):.1f}" height="{bottom - top}"/>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = px(share)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 16}" text-anchor="middle">{100 * share:g}</text>')
    parts.append(
        f'<text class="label" x="{px(0.5)}" y="{height - 4}" text-anchor="middle">answers that match the persona '
        "(%), 95 % intervals; filled: test, hollow: validation</text>"
    )
    for row, (label, entry, kind) in enumerate(rows):
        parts += _rate_row(top + line * (row + 0.5), left - 10, label, entry, kind, px)
    return _svg(width, height, parts, "Persona rates with 95 % intervals")


def _rate_row(y: float, edge: int, label: str, entry: Any, kind: str, px: Any) -> list[str]:
    shown = visible(label)
    short = shown if len(shown) <= 42 else shown[:41] + "…"
    parts = [
        f'<text class="row {kind}" x="{edge}" y="{y + 4}" text-anchor="end"><title>{html.escape(shown)}</title>'
        f"{html.escape(short)}</text>"
    ]
    for split, mark in (("validation", "hollow"), ("test", "dot")):
        rate = split_rate(entry, split)
        if rate is None:
            continue
        low, high = _ends(rate)
        tip = html.escape(f"{split}: {interval(rate)}, n = {visible(rate.get('n', '?'))}")
        if split == "test":
            parts.append(f'<line class="whisker {kind}" x1="{px(low)}" x2="{px(high)}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<circle class="{mark} {kind}" cx="{px(rate["rate"])}" cy="{y}" r="{5 if split == "test" else 4}">'
            f"<title>{tip}</title></circle>"
        )
    return parts


def _ends(rate: Mapping[str, Any]) -> tuple[float, float]:
    ends = [number(end) for end in (rate.get("ci95") or ())]
    low, high = ends if len(ends) == 2 else (None, None)
    return (rate["rate"] if low is None else low), (rate["rate"] if high is None else high)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, list[float]]]:
    """(step, values) of the rows whose ``key`` is a finite number or a list of them."""
    found = []
    for row in rows:
        step, value = number(row.get("step")), row.get(key)
        given = value if isinstance(value, list) else [value]
        flat = [number(v) for entry in given for v in (entry if isinstance(entry, list) else [entry])]
        if step is not None and flat and all(v is not None for v in flat):
            found.append((step, [v for v in flat if v is not None]))
    return found


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5 * max(abs(high), 1.0)
    return low - room, high + room


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" '
        f'style="max-width:{width}px">' + "".join(parts) + "</svg>"
    )
