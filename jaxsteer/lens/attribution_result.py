"""What direct logit attribution found, in the mean over texts: tables, a figure, JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from jaxsteer.display import ACCENT, BAND, OTHER, RULE, Plot, aligned, in_style, panels, visible
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0
from jaxsteer.runs.result import Result
from jaxsteer.statistics import student

Interval = tuple[float, float]
SHOWN = 10
"""Parts and heads that the table lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitPart(Record):
    """What one part of the model adds to a logit, in the mean over texts."""

    name: str
    """"embedding", "a3" (attention of layer 3), "a3.h5" (a head of it), "m3" (MLP), "m3.n17" (a neuron of it), "f5" (a
    latent), "bias" (of the last norm, GPT-2), "rest"."""
    value: float
    ci95: Interval | None = None
    """Student's, over texts; None for a single one."""
    control: Interval | None = None
    """Between which 95 % of the same means lie for random tokens in the target's place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitAttribution(Result):
    """Direct contributions of all parts to a logit, in the mean over a text's readings and then over texts."""

    model: str
    target: str
    """Whose logit, in words."""
    texts: int
    readings: int
    logit: LogitPart
    """All parts together."""
    parts: tuple[LogitPart, ...]
    """Embedding, attention and MLP of every layer, the last norm's bias, and the rest; they sum to the logit."""
    heads: tuple[LogitPart, ...] = ()
    """Of all layers."""
    neurons: tuple[LogitPart, ...] = ()
    """Those of the largest means."""
    neuron_control: float | None = None
    """The largest mean (in size) of any neuron for one random token."""
    latents: tuple[LogitPart, ...] = ()
    latent_control: float | None = None
    site: str = ""
    """Where the latents were read."""
    controls: CountFrom0 = 0
    """Random tokens."""
    softcap: float | None = None
    """The model's cap; the logit stands before it."""
    edits: str = ""
    """What the run was changed by."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per part."""
        kinds = {"part": self.parts, "head": self.heads, "neuron": self.neurons, "latent": self.latents}
        return [
            {
                "kind": kind, "name": part.name, "value": part.value,
                "low": None if part.ci95 is None else part.ci95[0],
                "high": None if part.ci95 is None else part.ci95[1],
                "control_low": None if part.control is None else part.control[0],
                "control_high": None if part.control is None else part.control[1],
            }
            for kind, parts in kinds.items()
            for part in parts
        ]  # fmt: skip

    def table(self) -> str:
        """The largest parts of every kind beside what random tokens get."""
        head = ("", "adds", "95 % over texts", f"{self.controls} random tokens, 95 %")
        rows = [_row(self.logit)]
        rows += [_row(part) for part in _largest(self.parts)]
        found = [f"Direct parts of the logit of {self.target}, {self._counted()}, {self.model}", aligned([head, *rows])]
        for what, parts, control in (
            ("head", self.heads, None), ("neuron", self.neurons, self.neuron_control),
            (f"latent at {self.site}", self.latents, self.latent_control),
        ):  # fmt: skip
            if parts:
                note = f"The strongest for one random token has {control:+.3f} (in size)." if control else ""
                columns = 4 if parts[0].control else 3
                table = [(what, *head[1:]), *map(_row, _largest(parts))]
                found.append(aligned([row[:columns] for row in table], note=note))
        notes = [f"The logit stands before the model's soft-cap of {self.softcap:g}."] if self.softcap else []
        notes += [f"The run was changed by: {self.edits}."] if self.edits else []
        notes.append("Direct paths only: what a part does by way of later layers counts as theirs.")
        return "\n\n".join([*found, " ".join(notes)])

    def _counted(self) -> str:
        texts = f"{self.texts} text{'s' * (self.texts != 1)}"
        return texts if self.readings == self.texts else f"{self.readings} tokens of {texts}"

    @in_style
    def plot(self) -> Plot:
        """Attention and MLP of every layer as points with their intervals, over the band of random tokens."""
        figure, axes = panels(2, width=9.0, height=3.2, share_y=True)
        for axis, kind, title, colour in zip(axes, "am", ("attention", "MLP"), (ACCENT, OTHER), strict=True):
            parts = [part for part in self.parts if part.name[0] == kind and part.name[1:].isdigit()]
            at = range(len(parts))
            if all(part.control for part in parts):
                low, high = zip(*(part.control or (0.0, 0.0) for part in parts), strict=True)
                axis.fill_between(at, low, high, color=BAND, linewidth=0, label="random tokens, 95 %")
            axis.axhline(0, color=RULE, linewidth=1)
            for place, part in zip(at, parts, strict=True):
                axis.plot([place, place], part.ci95 or (part.value, part.value), color=colour, linewidth=1.6)
            axis.plot(at, [part.value for part in parts], "o", color=colour, markersize=4)
            axis.set_xlabel(f"{title}, layer")
        axes[0].set_ylabel("adds to the logit")
        return Plot(
            name="logit-attribution",
            title=f"Direct parts of the logit of {visible(self.target)} by layer",
            figure=figure,
            rows=tuple(self.to_rows()),
        )


def summarised(
    found: Mapping[str, np.ndarray], sums: Mapping[str, np.ndarray], neurons: int, latents: int, **about: Any
) -> LogitAttribution:
    """Means over texts, each the mean over its readings.

    ``found`` are the arrays of ``LogitParts`` by name. ``sums`` are over texts: "parts" as ``names`` below and "heads"
    [K, L, N] for the target and K - 1 random tokens, "neurons" [2, L, I] and "latents" [2, F] for the target and one
    random token, with squares of the first. ``about`` are the other fields of the result.
    """
    _, text = np.unique(found["text"], return_inverse=True)
    count, layers = int(text.max()) + 1, found["attention"].shape[1]

    def by_text(values: np.ndarray) -> np.ndarray:
        total = np.zeros((count, *values.shape[1:]))
        np.add.at(total, text, values)
        return total / np.bincount(text).reshape(-1, *[1] * (values.ndim - 1))

    def part(name: str, values: np.ndarray, control: np.ndarray | None = None) -> LogitPart:
        between = None if control is None or not len(control) else np.percentile(control, [2.5, 97.5])
        ends = None if between is None else (float(between[0]), float(between[1]))
        return LogitPart(name=name, value=float(values.mean()), ci95=student(values), control=ends)

    names = ["embedding", *(part_name(kind, layer) for kind in "am" for layer in range(layers))]
    columns = [found["embedding"][:, None], found["attention"], found["mlp"]]
    if "bias" in found:
        names, columns = [*names, "bias"], [*columns, found["bias"][:, None]]
    values = by_text(np.concatenate(columns, 1))
    control = sums["parts"][1:] / count
    parts = [part(name, values[:, i], control[:, i]) for i, name in enumerate(names)]
    heads: list[LogitPart] = []
    if "heads" in found:
        values, control = by_text(found["heads"]), sums["heads"][1:] / count
        where = np.ndindex(values.shape[1:])
        heads = [part(part_name("a", i, j), values[:, i, j], control[:, i, j]) for i, j in where]
    logit = by_text(found["logit"])
    return LogitAttribution(
        texts=count,
        readings=len(text),
        logit=part("logit", logit, sums["parts"][1:].sum(1) / count),
        parts=(*parts, part("rest", by_text(found["rest"]))),
        heads=tuple(heads),
        neurons=_strongest(sums, "neurons", count, neurons, lambda at: part_name("m", *at)),
        neuron_control=_control(sums, "neurons", count),
        latents=_strongest(sums, "latents", count, latents, lambda at: f"f{at[0]}"),
        latent_control=_control(sums, "latents", count),
        controls=len(sums["parts"]) - 1,
        **about,
    )


def _strongest(
    sums: Mapping[str, np.ndarray], name: str, count: int, top: int, called: Callable[[tuple[int, ...]], str]
) -> tuple[LogitPart, ...]:
    """The units of the largest means, with Student's intervals from sums of squares."""
    if name not in sums:
        return ()
    mean = sums[name][0] / count
    found = []
    for flat in np.argsort(-np.abs(mean), axis=None, kind="stable")[:top]:
        at = np.unravel_index(flat, mean.shape)
        value, spread = float(mean[at]), None
        if count > 1:
            variance = max(0.0, float(sums[f"{name} squared"][at]) - count * value * value) / (count - 1)
            spread = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
        ends = None if spread is None else (value - spread, value + spread)
        found.append(LogitPart(name=called(tuple(int(i) for i in at)), value=value, ci95=ends))
    return tuple(found)


def _control(sums: Mapping[str, np.ndarray], name: str, count: int) -> float | None:
    """The largest mean of a unit for the random token."""
    return float(np.abs(sums[name][1]).max() / count) if name in sums and len(sums[name]) > 1 else None


def part_name(kind: str, layer: int, unit: int | None = None) -> str:
    """The name of an attention ("a3"), a head ("a3.h5"), an MLP ("m3") or a neuron ("m3.n17")."""
    return f"{kind}{layer}" + ("" if unit is None else f".{'h' if kind == 'a' else 'n'}{unit}")


def _largest(parts: tuple[LogitPart, ...]) -> list[LogitPart]:
    return sorted(parts, key=lambda part: -abs(part.value))[:SHOWN]


def _row(part: LogitPart) -> tuple[str, str, str, str]:
    between = lambda ends: "–" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"  # noqa: E731
    return part.name, f"{part.value:+.3f}", between(part.ci95), between(part.control)
