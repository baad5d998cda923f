"""One row of a table that compares methods: a baseline, a control, or a search, on one model and persona."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxsteer.evals.attribution import Attribution
from jaxsteer.evals.rates import Difference, Flips, Interval, Rate
from jaxsteer.files.records import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow(Record):
    """A method on one model and persona, or one of its seeds or prompts in ``each``. A rate is on test questions."""

    model: str = ""
    persona: str = ""
    method: str = ""
    value: Any = None
    """Of an ablation: what was varied."""
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
    rate: float
    ci95: Interval | None = None
    range: Interval | None = None
    """The lowest and the highest rate of ``each``."""
    n: int | None = None
    a_rate: float | None = None
    swapped_rate: float | None = None
    ci95_groups: Interval | None = None
    auroc: float | None = None
    auroc_ci95: Interval | None = None
    rate_by_label: tuple[float | None, float | None] | None = None
    margin: float | None = None
    probability: float | None = None
    letter_collapse: bool | None = None
    debiased_rate: float | None = None
    letter_bias: float | None = None
    difference: Difference | None = None
    margin_difference: Difference | None = None
    flips: Flips | None = None
    perplexity: float | None = None
    """Of the prompt in its slot; of several prompts their geometric mean."""
    perplexity_ratio: float | None = None
    """To that of ordinary sentences."""
    tried: int | None = None
    """Candidates that were compared to find it."""
    target: float | None = None
    cross_entropy: float | None = None
    site: str | None = None
    read_position: str | None = None
    probe_correlation: float | None = None
    attribution: Attribution | None = None
    each: tuple[TableRow, ...] = ()
    """One row per seed or prompt, where there are several."""

    @property
    def unprompted(self) -> bool:
        """Whether it is the model as it is: neither prompted nor steered."""
        return self.kind == "baseline" and self.prompt == "" and not self.steered

    @property
    def members(self) -> tuple[TableRow, ...]:
        """``each``, or the row itself."""
        return self.each or (self,)


def rate_fields(rate: Rate) -> dict[str, Any]:
    """The fields of a rate, as those of a row."""
    return {field.name: getattr(rate, field.name) for field in dataclasses.fields(rate)}
