"""What probes found: accuracy site by site beside labels that mean nothing; tables, a figure, JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxsteer.display import ACCENT, BAND, MUTED, OTHER, Plot, aligned, decimals, ends, in_style, panels, percent, share
from jaxsteer.files.records import Record
from jaxsteer.models.sites import parse_site
from jaxsteer.ranges import CountFrom0, Share, Weight
from jaxsteer.runs.result import Result

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeScore(Record):
    """A probe at one site and position. Every text is scored by the fit that knows neither it nor its group."""

    site: str
    position: str
    accuracy: Share
    ci95: Interval
    """Over groups."""
    auroc: float | None
    control: Share | None
    """Accuracy of the same probe on control tasks: what it can learn by heart."""
    selectivity: float | None
    """Accuracy minus that."""
    selectivity_ci95: Interval | None
    shuffled: Share | None
    """Accuracy on shuffled labels: chance."""
    calibration: Share
    """Expected calibration error of its probabilities."""
    brier: Share
    """Mean squared error of its probabilities."""
    loss: Weight
    """Log loss on validation folds in nats, at the penalty that is best there."""
    penalty: Weight
    """Of the fit on all texts."""
    types: CountFrom0
    """Of the control task."""
    repeated: Share
    """Share of texts whose type also stands outside of their fold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferScore(Record):
    """The probe that was fitted on all texts, on others."""

    site: str
    position: str
    accuracy: Share
    ci95: Interval
    auroc: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Record):
    """All probes on other texts."""

    name: str
    texts: int
    positives: CountFrom0
    scores: tuple[TransferScore, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult(Result):
    """Probes of one kind at all sites and positions."""

    model: str
    kind: str
    positive: str
    negative: str
    texts: int
    positives: int
    groups: int
    folds: int
    controls: CountFrom0
    """Control tasks."""
    shuffles: CountFrom0
    chosen: CountFrom0
    """Number of the score whose validation loss is lowest."""
    scores: tuple[ProbeScore, ...]
    """By position, then in the order of the sites."""
    transfers: tuple[Transfer, ...] = ()

    @property
    def best(self) -> ProbeScore:
        """The chosen one."""
        return self.scores[self.chosen]

    @property
    def majority(self) -> float:
        """Accuracy of whoever always says the more frequent label."""
        return max(self.positives, self.texts - self.positives) / self.texts

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per site and position."""
        rows = []
        for at, score in enumerate(self.scores):
            row = {name: value for name, value in score.to_json().items() if not isinstance(value, list)}
            row |= {"low": score.ci95[0], "high": score.ci95[1], "chosen": at == self.chosen}
            row |= {f"accuracy on {other.name}": other.scores[at].accuracy for other in self.transfers}
            rows.append(row)
        return rows

    def table(self) -> str:
        """A line per site and position."""
        head = ("", "site", "position", "accuracy", "95 %", "AUROC", "control", "selectivity", "shuffled", "ECE")
        rows = [(*head, *(f"on {other.name}" for other in self.transfers))]
        for at, score in enumerate(self.scores):
            spread = score.selectivity_ci95
            selectivity = "–" if score.selectivity is None else f"{100 * score.selectivity:+.1f}"
            rows.append(
                (
                    "*" * (at == self.chosen), score.site, score.position, percent(score.accuracy), ends(score.ci95),
                    decimals(score.auroc), percent(score.control),
                    selectivity + (f" ({100 * spread[0]:+.0f} to {100 * spread[1]:+.0f})" if spread else ""),
                    percent(score.shuffled), decimals(score.calibration),
                    *(share(t.accuracy, t.ci95) for t in (o.scores[at] for o in self.transfers)),
                )
            )  # fmt: skip
        best = self.best
        seen = (
            f"{best.types} types, {percent(best.repeated)} of the texts have one that also stands outside of their fold"
            if best.repeated
            else "no type stands on both sides of a split, so that no probe can know one by heart and it says nothing"
        )
        note = (
            f"{self.kind} probe of {self.positive!r} ({self.positives}) against {self.negative!r} "
            f"({self.texts - self.positives}), {self.texts} texts of {self.groups} groups, {self.folds} folds. "
            f"Always the more frequent label: {percent(self.majority)}. * lowest loss on validation folds, which were "
            f"test folds of other fits: its accuracy is a little too good. Control: random labels by type ({seen})."
        )
        return aligned(rows, left=(0, 1, 2), note=note)

    @in_style
    def plot(self) -> Plot:
        """Accuracy by layer for every position, with intervals, over control tasks and shuffled labels."""
        positions = list(dict.fromkeys(score.position for score in self.scores))
        figure, axes = panels(len(positions), width=max(6.0, 4.5 * len(positions)), height=3.4, share_y=True)
        for axis, position in zip(axes, positions, strict=True):
            scores = [score for score in self.scores if score.position == position]
            at = list(range(len(scores)))
            low, high = zip(*(score.ci95 for score in scores), strict=True)
            axis.fill_between(at, [100 * x for x in low], [100 * x for x in high], color=BAND, linewidth=0)
            axis.plot(at, [100 * score.accuracy for score in scores], "o-", color=ACCENT, markersize=3, label="probe")
            for name, colour in (("control", OTHER), ("shuffled", MUTED)):
                values = [getattr(score, name) for score in scores]
                if None not in values:
                    axis.plot(at, [100 * x for x in values], color=colour, linewidth=1.2, label=name)
            axis.axhline(100 * self.majority, color=MUTED, linewidth=0.8, linestyle=":", label="more frequent label")
            axis.set_xticks(at[:: max(1, len(at) // 8)])
            axis.set_xticklabels([_short(scores[i].site) for i in at[:: max(1, len(at) // 8)]])
            axis.set_xlabel(f"site, read at {position}")
        axes[0].set_ylabel("accuracy, %")
        axes[0].legend(frameon=False, fontsize=8)
        title = f"Accuracy of {self.kind} probes of {self.positive} by site"
        return Plot(name="probe", title=title, figure=figure, rows=tuple(self.to_rows()))


def _short(site: str) -> str:
    parsed = parse_site(site)
    return "embed" if parsed.kind == "hook_embed" else str(parsed.layer)
