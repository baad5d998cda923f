"""What a search found, as objects: a prompt with its rates, and a run.

metrics.json is the serialised form of a ``SearchRun``, a line of pareto.jsonl that of a ``Prompt``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxsteer.display import percent
from jaxsteer.errors import UserError
from jaxsteer.evals.attribution import Attribution
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates, is_illusion
from jaxsteer.evals.rates import Rate
from jaxsteer.files.records import Record
from jaxsteer.prompt_search.compiling import MemoryPlan
from jaxsteer.ranges import Interval
from jaxsteer.runs.result import Result
from jaxsteer.study.figures import RateRow, drawn, rate_plot
from jaxsteer.study.latent_explanation import LatentExplanation, LatentNames
from jaxsteer.study.probe import WARNS, Probe
from jaxsteer.study.run_table import run_table
from jaxsteer.writers.judge import Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(Record):
    """A text and what is known about it. The baseline is the empty text; a control was not searched and has no ids."""

    text: str = ""
    ids: tuple[int, ...] = ()
    """Its tokens in the slot, as they were searched."""
    target: float | None = None
    """The objective, scored from the text, in the units of the search."""
    cross_entropy: float | None = None
    """Of the text in its slot, nats per token."""
    search_target: float | None = None
    """The objective as the search had it, scored from the ids."""
    step: int | None = None
    """The step of the search that found it."""
    population: int | None = None
    """The number of the problem or restart that found it."""
    retokenises: bool | None = None
    """Whether the text gives the ids back. One that does not is never selected."""
    validation: Rate | None = None
    test: Rate | None = None
    validation_replies: WrittenRates | None = None
    """Of a persona in words, what the model wrote freely."""
    test_replies: WrittenRates | None = None
    test_judged: Judged | None = None
    """And what a judge makes of those."""
    note: str | None = None
    """What has to be said with the rate on test questions."""

    @property
    def perplexity(self) -> float | None:
        """Exp of the cross-entropy."""
        return None if self.cross_entropy is None else math.exp(self.cross_entropy)

    @property
    def rate(self) -> Rate | None:
        """On test questions, or on validation questions where no test was run."""
        return self.test or self.validation

    @property
    def replies(self) -> WrittenRates | None:
        """What is written freely, by the same questions."""
        return self.test_replies or self.validation_replies

    @property
    def judged(self) -> float | None:
        """The share of its free replies that show the persona to a judge."""
        return None if self.test_judged is None else self.test_judged.rate

    def with_rate(self, split: str, rate: Rate) -> Prompt:
        """The prompt with its rate on the validation or the test questions."""
        changed: dict[str, Any] = {split: rate}
        return dataclasses.replace(self, **changed)

    def with_replies(self, split: str, found: WrittenRates) -> Prompt:
        """The prompt with its free replies to the validation or the test questions."""
        note = {"note": ILLUSION} if split == "test" and is_illusion(self.test, found) else {}
        changed: dict[str, Any] = {f"{split}_replies": found, **note}
        return dataclasses.replace(self, **changed)

    def row(self) -> dict[str, Any]:
        """Its numbers as one flat row."""
        names = ("text", "target", "cross_entropy", "step", "population", "retokenises")
        flat = {name: getattr(self, name) for name in names}
        for split, rate in (("validation", self.validation), ("test", self.test)):
            low, high = (None, None) if rate is None else rate.ci95
            flat |= {f"{split}_rate": rate and rate.rate, f"{split}_low": low, f"{split}_high": high}
        if (free := self.replies) is not None:
            low, high = free.ci95
            flat |= {"replies_rate": free.rate, "replies_low": low, "replies_high": high, "note": self.note}
        measured = {name: self.rate and getattr(self.rate, name) for name in ("n", "a_rate", "swapped_rate")}
        return flat | measured | {"letter_collapse": self.rate and self.rate.letter_collapse}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing(Record):
    """Seconds of wall time, and candidates."""

    load_s: float | None = None
    """Loading the model."""
    probe_s: float | None = None
    """The direction or signature, and the probe."""
    compile_s: float | None = None
    search_s: float | None = None
    """The search without compilation."""
    eval_s: float | None = None
    """Measuring what was found."""
    candidates: int | None = None
    """Candidates that were scored."""
    candidates_per_s: float | None = None
    steps: int | None = None
    sweep_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units(Record):
    """The units of the objective: (raw - offset) / scale is in standard deviations over random prompts."""

    name: str
    offset: float
    scale: float
    samples: int
    """Random prompts behind both numbers."""


READABLE, READER = 0.8, 0.75
"""Shares below which free replies are doubted: of those that could be read, and of given ones that are read right."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRun(Result):
    """One search, from options to files. ``None`` stands for what its kind of search does not have.

    A search in conversations of one's own has no probe, no splits and no rates.
    """

    model: str
    fingerprint: str
    """Hash of the model's config and weights."""
    persona: str
    method: str
    """resga or saega."""
    site: str
    """Where direction and objective were read."""
    seed: int
    read_position: str
    target_units: str = "sd"
    """``sd`` (standard deviations over random prompts) or ``raw``."""
    objective_units: Units | None = None
    plan: MemoryPlan | None = None
    """What was computed at once, and what it cost per device."""
    interrupted: bool = False
    """Whether the search was ended before its last step."""
    sign: int | None = None
    """-1 where the probe turned the direction or signature."""
    probe_correlation: float | None = None
    """Rank correlation of objective and behaviour over random prompts, at the site."""
    probe_ci95: Interval | None = None
    """Its 95 % interval over prompts."""
    probe: Probe | None = None
    """The same at all sites. ``None`` where ``--probe off`` left it out."""
    splits: Mapping[str, int] | None = None
    """Questions in train, validation and test."""
    conversations: int | None = None
    """Of a search in conversations of one's own, their number."""
    baseline: Prompt | None = None
    """No prompt."""
    controls: Mapping[str, Prompt] = dataclasses.field(default_factory=dict)
    """Prompts that were not searched, by name, measured alike."""
    prompts: tuple[Prompt, ...]
    """What was found, best objective first; then some whose text does not give their ids back."""
    selected: int | None
    """Index of the reported prompt, if there is one."""
    selected_by: str = "objective"
    """How it was chosen (``run_table.RULES``)."""
    goal: str | None = None
    """What was wanted: less of the persona ("reduce", where nothing is said), or more ("elicit")."""
    reply_reader: float | None = None
    """Of a persona in words, the share of given replies that the rule reads right which reads free ones."""
    signature: LatentExplanation | None = None
    """Of saega, what the latents have to do with the reported prompt."""
    soft: Prompt | None = None
    """Of ``--algorithm soft``, the rates of the best soft prompt, which is no text."""
    timing: Timing = Timing()
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Versions and hardware."""
    attribution: Attribution | None = None
    """What each token of the reported prompt does, once ``jaxsteer report --attribute`` has measured it."""
    latent_names: LatentNames | None = None
    """Of saega, what its latents mean, once ``jaxsteer report --explanations`` has looked it up."""

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> SearchRun:
        """The object that ``to_json`` wrote. Raises ``UserError`` also where the selected prompt is none of those."""
        found = super().from_json(record, where)
        if found.selected is None or found.selected in range(known := len(found.prompts)):
            return found
        raise UserError(f"{where}.selected is {found.selected}, expected null or one of {known} prompts from 0")

    @property
    def best(self) -> Prompt | None:
        """The prompt that the run reports; None where no text gives its tokens back."""
        found = self.selected is not None and 0 <= self.selected < len(self.prompts)
        return self.prompts[self.selected or 0] if found else None

    @property
    def split(self) -> str:
        """The questions that its rates are reported on: "test", or "validation" where no test was run."""
        return "test" if self.baseline is None or self.baseline.test is not None else "validation"

    @property
    def in_words(self) -> bool:
        """Whether answers are replies, of which what the model writes freely is the result."""
        return self.baseline is not None and self.baseline.replies is not None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to take the numbers at face value, in words."""
        found = []
        if self.interrupted:
            found.append("The search was interrupted before its last step; what it had found until then is reported.")
        if self.probe_correlation is not None and self.probe_correlation < WARNS:
            low, high = self.probe_ci95 or (None, None)
            prompts = "" if self.probe is None else f" over {self.probe.prompts} random prompts"
            between = "" if low is None else f", 95 % interval {low:.2f} to {high:.2f}{prompts}"
            found.append(
                f"The probe correlation is {self.probe_correlation:.2f} (below {WARNS}{between}): at this site and "
                "read position the objective hardly ranks prompts as behaviour does."
            )
        if self.probe_correlation is None and self.splits is not None:
            found.append(
                "The probe was left out (--probe off): it is unknown whether the objective ranks prompts as behaviour "
                "does at this site, and whether its sign is right."
            )
        if self.best is not None:
            if self.best.retokenises is False:
                found.append("The text of the selected prompt does not give back the token ids that were searched.")
            if self.best.rate is not None and self.best.rate.letter_collapse:
                found.append(
                    f"With the selected prompt the model answers (A) in {percent(self.best.rate.a_rate)} of cases: the "
                    "rate may measure a preferred letter instead of the persona."
                )
            if self.best.note:
                found.append(f"With the selected prompt {self.best.note}.")
            if (free := self.best.replies) is not None and (free.read or 0.0) < READABLE:
                found.append(
                    f"Of the free replies under the selected prompt {percent(free.read)} could be read (below "
                    f"{percent(READABLE)}): the rate is of these alone. Read the replies, or have a judge score them."
                )
        if self.reply_reader is not None and self.reply_reader < READER:
            found.append(
                f"The rule that reads free replies is right on {percent(self.reply_reader)} of given ones (below "
                f"{percent(READER)}): read the replies, have a judge score them, or give more questions."
            )
        return tuple(found)

    def table(self, *, limit: int = 10, width: int | None = None) -> str:
        """The prompts beside the baseline and the controls, at most ``limit`` of them and ``width`` letters each (by
        default what the terminal has room for).

        ``*`` marks the selected prompt and ``!`` one whose text re-tokenises differently. Rates are persona rates with
        their 95 % interval; A-rate and swapped (share of questions answered alike when the choices are exchanged)
        belong to the test questions, or to the validation questions where no test was run. Of a persona in words there
        are two tables: free replies, and which of two given replies is likelier.
        """
        return run_table(self, limit, width)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per baseline, prompt and control."""
        named = [("baseline", "", self.baseline)] if self.baseline is not None else []
        named += [("prompt", "", prompt) for prompt in self.prompts]
        named += [("control", name, control) for name, control in self.controls.items()]
        return [
            {"kind": kind, "name": name, "selected": prompt is self.best, **prompt.row()}
            for kind, name, prompt in named
        ]

    def rate_rows(self, limit: int = 24) -> list[RateRow]:
        """What ``plot`` shows: the baseline, at most ``limit`` prompts, and the controls."""
        named = [] if self.baseline is None else [("no prompt", "baseline", self.baseline)]
        named += [(prompt.text, "prompt", prompt) for prompt in self.prompts[:limit]]
        named += [(f"[{name}] {control.text}".rstrip(), "control", control) for name, control in self.controls.items()]
        return [
            RateRow(label, kind, p.test, p.validation, p is self.best, p.test_replies, p.validation_replies)
            for label, kind, p in named
        ]

    def plot(self) -> Figure:
        """Persona rates with 95 % intervals. Raises ``UserError`` for a run without rates."""
        return drawn(rate_plot(self.rate_rows()))
