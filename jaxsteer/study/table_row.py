"""One row of a table that compares methods: a baseline, a control, or a search, on one model and persona."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.evals.attribution import Attribution
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates, is_illusion
from jaxsteer.evals.rates import Difference, Flips, Rate, Sides, by_question, counts_rows
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownPrompt(Record):
    """One prompt of a row, with the numbers that stand beside it."""

    seed: int | None = None
    prompt: str | None = None
    rate: Share
    a_rate: Share | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    target: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow(Record):
    """A method on one model and persona, or one of its seeds or prompts in ``each``. A rate is on test questions.

    The numbers of a rate are those of ``evals.rates.Rate``.
    """

    model: str = ""
    persona: str = ""
    method: str = ""
    value: Any = None
    """Of an ablation: what was varied."""
    same_as: str = ""
    """The method whose row this is too."""
    kind: str = ""
    """baseline, control or search."""
    about: str = ""
    seconds: float | None = None
    """That finding took."""
    seed: int | None = None
    run: str | None = None
    """Folder of the run, relative to the table's file."""
    prompt: str | None = None
    """The text; "" is the model as it is, None an edit or a soft prompt."""
    steered: bool | None = None
    """Whether no text does it."""
    perplexity: float | None = None
    """Of the prompt in its slot; of several prompts their geometric mean."""
    perplexity_ratio: float | None = None
    """To that of ordinary sentences, ``ordinary``."""
    ordinary: float | None = None
    readability: float | None = None
    """Reading ease of Flesch."""
    words: Share | None = None
    """Of the organisms: share of the prompt's words that the generator knows as triggers against the persona."""
    rate: Share
    ci95: Interval | None = None
    range: Interval | None = None
    """The lowest and the highest rate of ``each``."""
    n: CountFrom0 | None = None
    goal: str = ""
    """Of a persona in words "reduce" or "elicit"; ``rate`` and its ``difference`` are those of free replies."""
    preference: Share | None = None
    """And this is the share of questions on which its given reply is likelier than the other."""
    judged: Share | None = None
    """And this is the share of its free replies that show the persona to a judge."""
    note: str | None = None
    """What has to be said with the rate."""
    a_rate: Share | None = None
    swapped_rate: Share | None = None
    auroc: Share | None = None
    auroc_ci95: Interval | None = None
    rate_by_label: tuple[Share | None, Share | None] | None = None
    margin: float | None = None
    probability: Share | None = None
    letter_collapse: bool | None = None
    debiased_rate: Share | None = None
    letter_bias: float | None = None
    difference: Difference | None = None
    margin_difference: Difference | None = None
    flips: Flips | None = None
    sides: Sides | None = None
    tried: int | None = None
    """Candidates that were compared to find it."""
    details: Mapping[str, Any] | None = None
    """Of a baseline: what it chose, and how."""
    candidates: int | None = None
    """Of a search: candidates of all seeds."""
    search_s: float | None = None
    compile_s: float | None = None
    site: str | None = None
    read_position: str | None = None
    probe_correlation: float | None = None
    target: float | None = None
    """The objective, in the units of the search."""
    cross_entropy: float | None = None
    step: int | None = None
    validation_rate: Share | None = None
    """The rate by which the prompt was chosen (``study.selection``)."""
    first_rate: Share | None = None
    """Mean rate of the prompts that the objective alone would report."""
    first: ShownPrompt | None = None
    """Of one seed: that prompt."""
    selected: ShownPrompt | None = None
    """The prompt that is shown, chosen among the seeds' by the same rule."""
    attribution: Attribution | None = None
    each: tuple[TableRow, ...] = ()
    """One row per seed or prompt, where there are several."""

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> TableRow:
        """The object that ``to_json`` wrote, or that an older version did."""
        found = super().from_json(record, where)
        return by_question(found, record, where) if counts_rows(record) else found

    @property
    def unprompted(self) -> bool:
        """Whether it is the model as it is: neither prompted nor steered."""
        return self.kind == "baseline" and self.prompt == "" and not self.steered

    @property
    def members(self) -> tuple[TableRow, ...]:
        """``each``, or the row itself."""
        return self.each or (self,)


def not_complete(missing: Sequence[Mapping[str, Any]], done: int) -> str:
    """A sentence on the cells that a table does not have, by model and persona."""
    places: dict[str, list[str]] = {}
    for cell in missing:
        method = str(cell.get("method")) + ("" if cell.get("value") is None else f" = {cell['value']}")
        places.setdefault(f"{cell.get('model')}, {cell.get('persona')}", []).append(method)
    listed = ". ".join(f"{place}: {'; '.join(methods)}" for place, methods in places.items())
    return f"Not complete: {len(missing)} of {len(missing) + done} cells are missing. {listed}."


def reply_fields(rate: Rate | None, free: WrittenRates | None, goal: str) -> dict[str, Any]:
    """The fields of a persona in words, whose rate is that of what the model writes freely."""
    known = {} if free is None else {"ci95": free.ci95, "n": free.n, "difference": free.difference, "flips": free.flips}
    return {
        "rate": math.nan if free is None or free.rate is None else free.rate,
        **known,
        "goal": goal,
        "preference": None if rate is None else rate.rate,
        "note": ILLUSION if is_illusion(rate, free) else None,
        "sides": None if rate is None else rate.sides,
    }


def rate_fields(rate: Rate) -> dict[str, Any]:
    """The fields of a rate, as those of a row."""
    return {field.name: getattr(rate, field.name) for field in dataclasses.fields(rate)}


def shown(row: TableRow) -> ShownPrompt:
    """What stands beside the prompt of one seed's row."""
    return ShownPrompt(**{field.name: getattr(row, field.name) for field in dataclasses.fields(ShownPrompt)})
