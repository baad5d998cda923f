"""``RewriteResult``: how well facts were rewritten, and what else changed, as a table, rows and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.display import aligned, decimals, interval, percent, points, short
from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.ranges import Interval, Share
from jaxsteer.runs.files import METRICS
from jaxsteer.runs.result import Result
from jaxsteer.statistics import difference_interval, rate_interval, student


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactRate(Record):
    """A share of prompts; its interval is over facts."""

    rate: Share
    ci95: Interval
    n: int
    """Prompts."""

    @classmethod
    def of(cls, values: np.ndarray, facts: Sequence[str]) -> FactRate | None:
        """Of (n,) truth values and the fact of each; None without any."""
        if not len(values):
            return None
        wide = np.asarray(values, np.float64)
        return cls(rate=float(wide.mean()), ci95=rate_interval(wide, facts), n=len(wide))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change(Record):
    """A difference of shares or of means, with its interval over facts."""

    value: float
    ci95: Interval | None = None

    @classmethod
    def of(cls, after: np.ndarray, before: np.ndarray, facts: Sequence[str]) -> Change | None:
        """Of paired truth values."""
        if not len(after):
            return None
        pair = np.asarray(after, np.float64), np.asarray(before, np.float64)
        return cls(value=float(pair[0].mean() - pair[1].mean()), ci95=difference_interval(*pair, facts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean(Record):
    """A mean over facts or texts, with Student's interval."""

    value: float
    ci95: Interval | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        """Of (n,) numbers."""
        return cls(value=float(np.mean(values)), ci95=student(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantRow(Record):
    """One way to make the model say the new answers, measured."""

    name: str
    norm: float | None = None
    """Frobenius norm of the change of weights (of facts' own changes the mean)."""
    efficacy: FactRate | None = None
    """Facts whose prompt has the new answer likelier, per token, than the true one (CounterFact's efficacy)."""
    said: FactRate | None = None
    """Facts whose prompt is answered with the new answer greedily."""
    paraphrase: FactRate | None = None
    """Paraphrases that have the new answer likelier."""
    paraphrase_said: FactRate | None = None
    """Paraphrases that are answered with the new answer."""
    neighbourhood: FactRate | None = None
    """Neighbours that have their own answer likelier than the new one of the fact."""
    neighbourhood_said: FactRate | None = None
    """Neighbours that are answered with their own answer."""
    neighbourhood_lost: Change | None = None
    """Change of that share against the model as it is."""
    entropy: Mean | None = None
    """Entropy of word pairs and triples of what the model writes behind the prompts, bits."""
    drift: Mean | None = None
    """KL(model as it is || changed) per token of neutral texts, nats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactOutcome(Record):
    """One fact, all facts being rewritten at once."""

    id: str
    text: str
    true: str
    new: str
    leverage: float | None = None
    """k^T C^-1 k of its mean key, in units of the average over text."""
    size: float | None = None
    """Size of the wanted change of the MLP's output, in that output's own norm."""
    steps: int | None = None
    """Steps of the search for it."""
    reached: float | None = None
    """What is missing of the wanted output, in its own norm."""
    wanted: float | None = None
    """Probability per token of the new answer with the wanted output itself, over prefixes."""
    before: float
    """Log-probability per token of the new answer, nats."""
    after: float
    says: bool
    """Whether the new answer is given greedily."""
    writes: str
    """What the rewritten model writes behind the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriteResult(Result):
    """Facts rewritten, beside what they are measured against."""

    model: str
    fingerprint: str
    new_fingerprint: str
    """Of the rewritten model."""
    method: str
    layers: tuple[int, ...]
    unknown: int
    """Facts that were left out because the model does not give their true answers."""
    covariance_tokens: int | None = None
    rows: tuple[VariantRow, ...]
    facts: tuple[FactOutcome, ...]
    neutral: int
    """Neutral texts."""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of every stage that was run."""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def table(self) -> str:
        """One row for every variant, then one for every fact."""
        head = ("", "|dW|", "efficacy", "said", "paraphrases", "said", "neighbours", "said", "lost (points)",
                "entropy", "drift (nats)")  # fmt: skip
        rows = [head]
        for row in self.rows:
            rows.append((
                row.name, decimals(row.norm), interval(row.efficacy), interval(row.said), interval(row.paraphrase),
                interval(row.paraphrase_said), interval(row.neighbourhood), interval(row.neighbourhood_said),
                points(row.neighbourhood_lost), decimals(row.entropy and row.entropy.value),
                decimals(row.drift and row.drift.value, 4),
            ))  # fmt: skip
        left_out = f"; {self.unknown} that the model does not know were left out" if self.unknown else ""
        of = "" if self.covariance_tokens is None else f"; covariance of {self.covariance_tokens:,} tokens"
        blocks = ", ".join(map(str, self.layers))
        note = (
            f"{self.method} of {len(self.facts)} facts in block{'s' * (len(self.layers) > 1)} {blocks} of {self.model}"
            f"{left_out}{of}; drift on {self.neutral} neutral texts. Intervals: 95 %, over facts."
        )
        return f"{aligned(rows, note=note)}\n\n{self.fact_table()}"

    def fact_table(self) -> str:
        """Every fact, all being rewritten at once."""
        rows = [("fact", "new", "leverage", "|d|/|v|", "steps", "missing", "wanted", "before", "after", "says it")]
        rows += [
            (
                short(one.text, 40), short(one.new, 16), decimals(one.leverage, 1), decimals(one.size),
                "" if one.steps is None else str(one.steps), percent(one.reached), percent(one.wanted),
                decimals(one.before), decimals(one.after), "yes" if one.says else "no",
            )
            for one in self.facts
        ]  # fmt: skip
        return aligned(rows, left=(0, 1))

    def to_rows(self) -> list[dict[str, Any]]:
        """A flat row for every variant."""
        found = []
        for row in self.rows:
            flat: dict[str, Any] = {"name": row.name, "norm": row.norm}
            for field in dataclasses.fields(row)[2:]:
                value = getattr(row, field.name)
                if value is not None:
                    flat[field.name] = value.rate if isinstance(value, FactRate) else value.value
                    low, high = value.ci95 or (None, None)
                    flat |= {f"{field.name}_low": low, f"{field.name}_high": high}
            found.append(flat)
        return found

    @classmethod
    def read(cls, folder: str | Path) -> RewriteResult:
        """The result in a directory of ``jaxsteer rewrite run``. Raises ``UserError`` where none was finished."""
        path = Path(folder) / METRICS
        if not path.is_file():
            raise UserError(f"{folder} holds no finished rewriting: run jaxsteer rewrite run --out {folder}")
        return cls.from_json(read_json(path), str(path))
