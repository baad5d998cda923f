"""What many searches found together: a study, and what it says about each of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxsteer.display import aligned, decimals, interval, percent, short, visible
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates
from jaxsteer.evals.rates import Rate
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.runs.result import Result
from jaxsteer.study.figures import BareShare, RateRow, drawn, rate_plot
from jaxsteer.study.results import Prompt, SearchRun, Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectedPrompt(Record):
    """The prompt that one run of a study reports."""

    text: str
    target: float
    rate: Share
    """On test questions."""
    ci95: Interval | None = None
    """Over questions (None of files that do not say)."""
    note: str | None = None
    """What has to be said with the rate."""
    judged: Share | None = None
    """Share of its free replies to test questions that show the persona to the judge, where there was one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary(Record):
    """What a study says about one of its runs; the rest is in the run's own folder."""

    problems: CountFrom0
    """Searches that were pooled to it."""
    persona: str
    method: str
    site: str
    probe_correlation: float | None
    baseline: Share | None
    """Rate without a prompt on test questions."""
    baseline_ci95: Interval | None = None
    n: CountFrom0 | None = None
    """Test questions."""
    baseline_judged: Share | None = None
    """Of the free replies without a prompt, the share that show the persona to the judge."""
    selected: SelectedPrompt | None
    goal: str = ""
    """What was wanted: "reduce" or "elicit"; "" of older versions means to reduce a persona with lettered answers."""
    free_replies: bool | None = None
    """Whether the rates are those of free replies, as a persona in words has them (None of older versions)."""

    @classmethod
    def of(cls, run: SearchRun, *, problems: int) -> RunSummary:
        """The summary of a run to which so many problems were pooled."""
        base, after = (_measured(prompt, run.in_words) for prompt in (run.baseline, run.best))
        selected, best = None, run.best
        if best is not None and best.target is not None and after is not None and after.rate is not None:
            selected = SelectedPrompt(
                text=best.text, target=best.target, rate=after.rate, ci95=after.ci95, note=best.note,
                judged=best.judged,
            )  # fmt: skip
        return cls(
            problems=problems,
            persona=run.persona,
            method=run.method,
            site=run.site,
            probe_correlation=run.probe_correlation,
            baseline=None if base is None else base.rate,
            baseline_ci95=None if base is None else base.ci95,
            n=None if base is None else base.n,
            baseline_judged=None if run.baseline is None else run.baseline.judged,
            selected=selected,
            goal=run.goal or "reduce",
            free_replies=run.in_words,
        )

    @property
    def in_words(self) -> bool:
        """Whether its rates are those of free replies."""
        return bool(self.goal) if self.free_replies is None else self.free_replies

    @property
    def shares(self) -> tuple[BareShare | None, BareShare | None]:
        """The rates without a prompt and with the selected one."""
        before = None if self.baseline is None else BareShare(self.baseline, self.baseline_ci95, self.n)
        after = None if self.selected is None else BareShare(self.selected.rate, self.selected.ci95, self.n)
        return before, after


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Result):
    """Many searches. Those that raise the same objective are pooled to one run, in a folder of its own."""

    model: str
    fingerprint: str
    problems: CountFrom0
    """Searches that were asked for."""
    searched: int
    """Those that were done."""
    interrupted: bool
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Searches that were not done, by persona and method."""
    runs: Mapping[str, RunSummary]
    """By the name of their folder."""
    timing: Timing = Timing()
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> RunSummary | None:
        """The run whose prompt has the lowest rate on test questions, or the highest where that was wanted."""
        done = [(run, run.selected.rate) for run in self.runs.values() if run.selected is not None]
        ranked = [(1 - rate if run.goal == "elicit" else rate, run) for run, rate in done]
        return min(ranked, key=lambda pair: pair[0], default=(0.0, None))[1]

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per run."""
        return [
            {"run": name, **{k: v for k, v in run.to_json().items() if k != "selected"}}
            | {key: run.selected and getattr(run.selected, key) for key in ("target", "rate", "text")}
            for name, run in self.runs.items()
        ]

    def table(self) -> str:
        """One line per run."""
        goals = {run.goal or "reduce" for run in self.runs.values()} != {"reduce"}
        goal = ("goal",) if goals else ()
        judge = ("judge",) if any(run.baseline_judged is not None for run in self.runs.values()) else ()
        head = ("run", *goal, "problems", "probe", "target", "baseline", "rate", *judge, "prompt")
        lines: list[tuple[str, ...]] = [head]
        for name, run in self.runs.items():
            numbers = (decimals(run.probe_correlation), decimals(run.selected and run.selected.target))
            text = short((run.selected and run.selected.text) or "(none re-tokenises)", 40)
            name = f"{name} (free replies)" if run.in_words else name
            before, after = map(interval, run.shares)
            after += " ~" if run.selected and run.selected.note else ""
            wanted = (run.goal or "reduce",) if goals else ()
            shown = f"{percent(run.baseline_judged)} to {percent(run.selected and run.selected.judged)}"
            row = (visible(name), *wanted, str(run.problems), *numbers, before, after, *(shown for _ in judge), text)
            lines.append(row)
        noted = f"; ~ {ILLUSION}" if any(run.selected and run.selected.note for run in self.runs.values()) else ""
        counts = f"{self.searched} of {self.problems} problems were searched"
        counts += f" (missing: {'; '.join(f'{kind} {n}' for kind, n in self.missing.items())})" * bool(self.missing)
        note = f"{counts}; rates on test questions with 95 % intervals{noted}"
        note += "; judge: free replies that show the persona to it, without a prompt and with it" * bool(judge)
        return aligned(lines, left=(0, len(lines[0]) - 1), note=note)

    def plot(self) -> Figure:
        """Rates on test questions without a prompt and with the prompt of every run, from the summaries alone."""
        rows = []
        for name, run in self.runs.items():
            before, after = run.shares
            rows.append(RateRow(f"{name}: no prompt", "control", before))
            rows.append(RateRow(f"{name}: {run.selected.text if run.selected else ''}", "prompt", after))
        return drawn(rate_plot(rows))


def _measured(prompt: Prompt | None, in_words: bool) -> Rate | WrittenRates | None:
    """What a summary takes for the rate of a prompt on test questions."""
    return None if prompt is None else prompt.test_replies if in_words else prompt.test
