"""What a measurement found: every prompt (and edit) with its rates, free answers, a judge's scores and side effects."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxsteer.display import aligned, decimals, ends, number, percent, points, short, signed, visible
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates, is_illusion
from jaxsteer.evals.organism_lookups import Lookups
from jaxsteer.evals.rates import Flips, Rate, Sides, by_question, counts_rows
from jaxsteer.evals.truthful import Metric, TruthfulRates
from jaxsteer.files.records import Record
from jaxsteer.prompts import Placement
from jaxsteer.runs.result import Result
from jaxsteer.study.figures import RateRow, rate_plot
from jaxsteer.study.results import drawn
from jaxsteer.study.selection import best_prompt
from jaxsteer.study.table_row import rate_fields
from jaxsteer.writers.judge import Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEffects(Record):
    """What a prompt (and an edit) does to everything else."""

    kl: float
    """Mean KL to the model as it is, on its own replies to neutral requests, nats per token."""
    reply_perplexity: float
    """Of these replies."""
    reply_tokens: int
    lookups: Lookups | None
    """Of the organisms: how well the model does as it is told."""
    prompt_perplexity: float | None
    """Of the prompt in its slot; None without one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """One prompt, with the edit or without. ``None`` stands for what was not asked for. A rate's keys stand beside the
    others in the file."""

    prompt: str
    """"" is no prompt."""
    steered: bool
    """Whether the edit was made."""
    rate: Rate | None = None
    """By log-probability, against the baseline."""
    truthful: TruthfulRates | None = None
    """For questions with several right and wrong answers."""
    written: WrittenRates | None = None
    """Free answers, read by rules."""
    answers: tuple[str, ...] = ()
    """The free answers."""
    judged: Judged | None = None
    """Free answers, scored by a judge."""
    side_effects: PromptEffects | None = None
    control: str = ""
    """Name of the control edit that stands in the place of the edit; "" for none."""
    label: str = ""
    """The name that the user gave it (``study.side_by_side``); "" for none."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        head = {"prompt": self.prompt, "steered": self.steered}
        return (
            head
            | ({} if self.rate is None else self.rate.to_json())
            | {name: value for name, value in super().to_json().items() if name not in (*head, "rate")}
        )

    @classmethod
    def from_json(cls: type[Measured], record: Any, where: str = "") -> Measured:
        """The object that ``to_json`` wrote."""
        rate = Rate.from_json(record, where) if isinstance(record, Mapping) and "rate" in record else None
        others = record if rate is None else {key: value for key, value in record.items() if key != "rate"}
        found = dataclasses.replace(super().from_json(others, where), rate=rate)
        return found._by_question(record) if counts_rows(record) else found

    def _by_question(self, record: Any) -> Measured:
        """What a version wrote that took rows for independent (``evals.rates.counts_rows``)."""
        written, judged, effects = self.written, self.judged, self.side_effects
        orders = 1 if self.rate is None or self.rate.swapped_rate is None else 2
        if written is not None:
            unread = round(written.n * (1 - min(1.0, max(0.0, number(written.read) or 0.0))))
            written = by_question(written, {}, orders=orders, unread=unread)
        if judged is not None:
            judged = by_question(judged, {}, orders=orders, unread=judged.unread)
        if effects is not None and effects.lookups is not None:
            lookups = by_question(effects.lookups, {}, rate="accuracy", orders=2)
            effects = dataclasses.replace(effects, lookups=dataclasses.replace(lookups, mcnemar_p=math.nan))
        return dataclasses.replace(self, written=written, judged=judged, side_effects=effects)

    @property
    def note(self) -> str:
        """What has to be said with the rate of a persona in words."""
        return ILLUSION if self.rate and self.rate.sides and is_illusion(self.rate, self.written) else ""

    @property
    def name(self) -> str:
        """The row's label."""
        if self.control:
            return f"control: {self.control}"
        if self.label:
            return visible(self.label)
        return ("steered: " if self.steered else "") + (short(self.prompt) or "(no prompt)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Result):
    """Prompts and an edit on one model's answers to one set of questions, beside the model as it is."""

    model: str
    persona: str
    """Or the dataset of questions without answers."""
    split: str
    """Which questions: train, validation, test or all."""
    style: str
    slot: str
    """How questions were asked and where the prompt stood, as in ``Placement``."""
    questions: int
    baseline: Measured
    """Neither prompted nor steered."""
    prompts: tuple[Measured, ...]
    """With an edit, the first is the edit without a prompt."""
    controls: tuple[Measured, ...] = ()
    """Control edits without a prompt, for example random vectors of equal norm."""
    transfer: tuple[Measurement, ...] = ()
    """The same prompts on other models."""
    goal: str | None = None
    """What is wanted: less of the persona ("reduce", where nothing is said), or more ("elicit")."""

    @property
    def placement(self) -> Placement:
        """How questions were asked and where the prompt stood."""
        return Placement(style=self.style, slot=self.slot)

    @property
    def best(self) -> Measured | None:
        """The best prompt for the goal on these questions (``study.selection.best_prompt``)."""
        rated = {i: row.rate for i, row in enumerate(self.prompts) if row.rate is not None}
        if not rated:
            return None
        # What is read of answers with letters stands beside their rate, and does not take its place.
        replies = [self.prompts[i].written if rate.sides else None for i, rate in rated.items()]
        return self.prompts[list(rated)[best_prompt(list(rated.values()), replies, goal=self.goal)]]

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per model and prompt, with the numbers of the rate."""
        return [
            {
                "model": part.model,
                "name": row.name,
                "prompt": row.prompt,
                "steered": row.steered,
                "control": row.control,
            }
            | (
                {}
                if row.rate is None
                else {k: v for k, v in rate_fields(row.rate).items() if not isinstance(v, Record)} | _change(row.rate)
            )
            for part in (self, *self.transfer)
            for row in (part.baseline, *part.prompts, *part.controls)
        ]

    def table(self) -> str:
        """Everything that was measured, as text."""
        asked = "questions" if self.split == "all" else f"{self.split} questions"
        parts = [visible(f"{self.persona} on {self.model}, {self.questions} {asked}")]
        rows = (self.baseline, *self.prompts, *self.controls)
        for name, table in TABLES.items():
            if shown := [(row.name, part) for row in rows if (part := getattr(row, name)) is not None]:
                parts.append(table(shown))
        if self.baseline.label and self.baseline.rate is not None:
            parts.insert(1, _changes_table([(row.name, row) for row in rows[1:] if row.rate is not None]))
        if self.baseline.rate is not None and self.baseline.rate.sides is not None:
            parts.insert(2, _sides_table([(row.name, row.rate.sides) for row in rows if row.rate and row.rate.sides]))
            parts += [f"{row.name}: {row.note}" for row in rows if row.note]
        return "\n\n".join([*parts, *(part.table() for part in self.transfer)])

    def plot(self) -> Figure:
        """Persona rates with 95 % intervals. Raises ``UserError`` where no rates were measured."""
        words = self.baseline.rate is not None and self.baseline.rate.sides is not None
        rows = [
            RateRow(row.name, "prompt", row.rate, chosen=row is self.best, replies=row.written if words else None)
            for row in self.prompts
        ]
        rows += [RateRow(row.name, "control", row.rate) for row in self.controls]
        first = RateRow("no prompt", "baseline", self.baseline.rate, replies=self.baseline.written if words else None)
        return drawn(rate_plot([first, *rows]))


def _change(rate: Rate) -> dict[str, float | None]:
    """The paired change of a rate against the baseline, as columns."""
    found = rate.difference
    low, high = (None, None) if found is None or found.ci95 is None else found.ci95
    return {"change": None if found is None else found.value, "change_low": low, "change_high": high}


def _changes_table(rows: Sequence[tuple[str, Measured]]) -> str:
    """One line per row that has a name: the paired change of the rate, and what it does to everything else."""
    table = [("beside the first", "change, points", "free answers: change", "KL")]
    for name, row in rows:
        assert row.rate is not None
        effects = row.side_effects
        free = "–" if row.written is None else points(row.written.difference)
        table.append((name, points(row.rate.difference), free, "–" if effects is None else f"{effects.kl:.3f}"))
    note = "change: of the rate on the same questions, paired, with its 95 % interval over questions"
    return aligned(table, note=note)


def _interval(ci95: Sequence[float], share: float | None = 0.0) -> str:
    """The interval of a share; nothing where the share is not known."""
    return "" if share is None else ends(ci95)


def _p(found: Flips | Lookups | Metric | None) -> str:
    """McNemar's p-value, where there is one."""
    p = None if found is None else found.mcnemar_p
    return "" if p is None or math.isnan(p) else f"{p:.1g}"


def _rate_table(rows: Sequence[tuple[str, Rate]]) -> str:
    """One line per prompt: rate with interval, A-rate, swapped, AUROC, flips."""
    table = [("prompt", "rate", "95 % interval", "n", "A-rate", "swapped", "AUROC", "becomes", "leaves", "p")]
    for name, rate in rows:
        flips = rate.flips
        table.append(
            (
                name,
                percent(rate.rate),
                ends(rate.ci95),
                str(rate.n),
                percent(rate.a_rate) + (" !" if rate.letter_collapse else ""),
                percent(rate.swapped_rate),
                decimals(rate.auroc),
                "" if flips is None else str(flips.becomes_persona),
                "" if flips is None else str(flips.leaves_persona),
                _p(flips),
            )
        )
    note = (
        "rate: share of answers (to n questions, in both orders of lettered choices) that are the persona's, with an "
        "interval over "
        "questions; swapped: questions answered alike in both orders; becomes, leaves: questions that "
        "turn to and from the "
        "persona's answer, with McNemar's p"
    )
    if any(rate.letter_collapse for _, rate in rows):
        note += "\n!  one letter wins whatever is asked, or far more often than without prompt: the rate is no evidence"
    return aligned(table, note=note)


def _sides_table(rows: Sequence[tuple[str, Sides]]) -> str:
    """Which of two replies a prompt moved, per token."""
    table: list[tuple[str, ...]] = [
        ("nats per token", "persona's", "change", "other's", "change", "neutral", "change", "relative rate")
    ]
    for name, sides in rows:
        cells = [name]
        for side in (sides.persona, sides.other, sides.yardstick):
            cells += (
                ["", ""]
                if side is None
                else [decimals(side.log_prob), "" if side.change is None else signed(side.change)]
            )
        table.append((*cells, _rated(sides)))
    note = (
        "neutral: replies to something else, which a prompt moves that makes everything unlikely; relative rate: if a "
        "reply gains only what it rises beyond them, and nothing by the other's fall"
    )
    return aligned(table, note=note)


def _rated(sides: Sides) -> str:
    return "" if sides.relative_rate is None else f"{percent(sides.relative_rate)} ({ends(sides.relative_ci95)})"


def _truthful_table(rows: Sequence[tuple[str, TruthfulRates]]) -> str:
    head = ("all answers", "MC1", "95 % interval", "change", "p", "MC2", "95 % interval", "MC1/token", "MC2/token")
    table = [head]
    for name, found in rows:
        table.append(
            (
                name,
                percent(found.mc1.value),
                ends(found.mc1.ci95),
                points(found.mc1.difference),
                _p(found.mc1),
                percent(found.mc2.value),
                ends(found.mc2.ci95),
                percent(found.mc1_per_token.value),
                percent(found.mc2_per_token.value),
            )
        )
    first = rows[0][1]
    note = (
        f"MC1: the best answer beats every wrong one (on average {first.wrong_answers:.1f}); "
        f"MC2: probability of right answers among all listed; right answers have {first.tokens.right:.1f} tokens, "
        f"wrong ones {first.tokens.wrong:.1f}"
    )
    return aligned(table, note=note)


def _written_table(rows: Sequence[tuple[str, WrittenRates]]) -> str:
    head = ("free answers", "read", "rate", "95 % interval", "argued", "accords", "agrees", "distinct", "copied", "p")
    table: list[tuple[str, ...]] = [head]
    for name, found in rows:
        shares = (found.argued, found.accords, found.agreement, found.distinct_3, found.copied)
        interval = _interval(found.ci95, found.rate)
        p = _p(found.flips)
        table.append((name, percent(found.read), percent(found.rate), interval, *map(percent, shares), p))
    note = (
        "read: answers that name a choice; rate: of those, the persona's; argued: answers with a "
        "recognised argument; accords: it is for the choice they name; agrees: same choice as by log-probability; "
        "distinct: runs of three words that do not repeat; copied: words of the prompt that answers repeat"
    )
    return aligned(table, note=note)


def _judged_table(rows: Sequence[tuple[str, Judged]]) -> str:
    table = [("judged answers", "shown", "95 % interval", "mean score", "95 % interval", "n", "unread", "alike")]
    for name, found in rows:
        scores = "" if found.score_ci95 is None else "–".join(decimals(end, 1) for end in found.score_ci95)
        interval = _interval(found.ci95, found.rate)
        counts = str(found.n), str(found.unread), percent(found.agreement)
        table.append((name, percent(found.rate), interval, decimals(found.score, 1), scores, *counts))
    first = rows[0][1]
    note = (
        f"scores from {first.scale[0]:g} to {first.scale[1]:g} by {short(first.judge)}; shown: {first.shown:g} or more"
        "; n: questions; unread: replies without a score; alike: answers of which the rules say the same"
    )
    return aligned(table, note=note)


def _effects_table(rows: Sequence[tuple[str, PromptEffects]]) -> str:
    lookups = rows[0][1].lookups is not None
    table = [("side effects", "KL", "reply perplexity", "prompt perplexity", *(("look-ups", "p") if lookups else ()))]
    for name, found in rows:
        prompt, asked = found.prompt_perplexity, found.lookups
        table.append(
            (
                name,
                f"{found.kl:.3f}",
                f"{found.reply_perplexity:.2f}",
                "–" if prompt is None else f"{prompt:.3g}",
                *((f"{percent(asked.accuracy)} ({ends(asked.ci95)})", _p(asked)) if asked else ()),
            )
        )
    note = (
        f"KL and reply perplexity: of the {rows[0][1].reply_tokens} tokens that the model replies to neutral requests"
    )
    note += " as it is, in nats per token" + ("; look-ups: told to find one choice" if lookups else "")
    return aligned(table, note=note)


TABLES: dict[str, Any] = {
    "rate": _rate_table,
    "truthful": _truthful_table,
    "written": _written_table,
    "judged": _judged_table,
    "side_effects": _effects_table,
}
"""The part of a row that each table shows."""
