"""What explanations of an SAE's latents amount to: how much words say, how they do in text, and what a writer says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsteer.display import aligned, decimals, percent, visible
from jaxsteer.errors import UserError
from jaxsteer.explain.detection import DetectionResult
from jaxsteer.explain.explanations import Explanations
from jaxsteer.explain.judged_detection import LabelScores
from jaxsteer.explain.labels import Labels
from jaxsteer.explain.simulation import SimulationScores
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.runs.files import METRICS
from jaxsteer.runs.result import Result

COMPARED = 10
"""Words of a latent that the shares of the paper count."""
OFTEN = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordUse(Record):
    """Which words explanations use (2502.15576)."""

    words: str
    """Whose words."""
    diversity: float
    """Share of the words that are not superficial which explain some latent: more is better."""
    lexical: float
    """Share of superficial words which explain some latent: less is better."""
    dominate: float
    """Share of the words in use which explain more than a tenth of all latents: less is better."""


def word_use(name: str, words: Int[np.ndarray, "C K"], vocabulary: Vocabulary) -> WordUse:
    """The three shares, of the best ``COMPARED`` words of every latent; -1 stands for no word."""
    best = words[:, :COMPARED]
    counts = np.bincount(best[best >= 0], minlength=len(vocabulary))
    used, superficial = counts > 0, vocabulary.superficial
    return WordUse(
        words=name,
        diversity=float(used[~superficial].mean()) if (~superficial).any() else 0.0,
        lexical=float(used[superficial].mean()) if superficial.any() else 0.0,
        dominate=float((counts[used] > OFTEN * len(words)).mean()) if used.any() else 0.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainResult(Result):
    """Explanations of all latents of one SAE."""

    model: str
    fingerprint: str
    sae: str
    digest: str
    site: str
    latents: int
    vocabulary: int
    """Words."""
    vocabulary_source: str
    left_out: Mapping[str, int]
    """Of the vocabulary: pieces of words, rows of odd norm, other spellings, words that cannot be spelt."""
    side: str
    posterior: str
    mutual_information: float
    """Of latents and words, in nats."""
    bound: float
    """What it can be at most."""
    uses: tuple[WordUse, ...]
    detection: DetectionResult | None = None
    """Where text was given."""
    labels: Labels | None = None
    """Where a writer was given."""
    label_scores: tuple[LabelScores, ...] = ()
    simulation: SimulationScores | None = None
    """Where it was asked for."""
    examples: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Words of the latents that say most, by latent."""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Wall time of the stages that this call did."""

    @classmethod
    def of(cls, table: Explanations, **measured: Any) -> ExplainResult:
        """The result that goes with a table of words."""
        v = table.vocabulary
        scores = measured.pop("scores", ())
        return cls(
            model=table.model,
            fingerprint=table.fingerprint,
            sae=table.sae,
            digest=table.digest,
            site=table.site,
            latents=len(table),
            vocabulary=len(v),
            vocabulary_source=v.source,
            left_out={"fragments": v.fragments, "odd": v.odd, "repeated": v.repeated, "unspelt": v.unspelt},
            side=table.side,
            posterior=table.posterior,
            mutual_information=table.mutual_information,
            bound=table.bound,
            examples={str(i): table.of(int(i)) for i in np.argsort(-table.information, kind="stable")[:20]},
            label_scores=scores,
            **measured,
        )

    @classmethod
    def read(cls, folder: str | Path) -> ExplainResult:
        """The result in a directory of ``jaxsteer sae explain``. Raises ``UserError`` where there is none."""
        path = Path(folder) / METRICS
        if not path.is_file():
            raise UserError(f"{folder} holds no finished result of jaxsteer sae explain (there is no {METRICS})")
        return cls.from_json(read_json(path), str(path))

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for each kind of words."""
        found = {} if self.detection is None else {score.words: score for score in self.detection.scores}
        return [
            {**use.to_json(), **({"auroc": found[use.words].auroc} if use.words in found else {})} for use in self.uses
        ]

    def table(self) -> str:
        """How much words say, how they do, and examples."""
        left = ", ".join(f"{n:,} {what}" for what, n in self.left_out.items() if n)
        head = (
            f"{self.latents:,} latents of {visible(self.sae)} ({self.side}), {self.vocabulary:,} words "
            f"({self.vocabulary_source}{f'; left out: {left}' if left else ''}): {self.mutual_information:.2f} nats of "
            f"mutual information, at most {self.bound:.2f}"
        )
        rows = [("words by", "diversity", "lexical", "dominate")]
        rows += [(u.words, percent(u.diversity), percent(u.lexical), percent(u.dominate)) for u in self.uses]
        parts = [head, aligned(rows)]
        if self.detection is not None:
            parts.append("Where latents fire, told by words:\n" + self.detection.table())
        if self.labels is not None:
            parts.append(self.labels.table())
        for score in self.label_scores:
            ci = "" if score.ci95 is None else f" ({score.ci95[0]:.2f} to {score.ci95[1]:.2f})"
            parts.append(
                f"{score.kind} by {visible(score.writer)}: {decimals(score.accuracy)}{ci} of answers right, both kinds "
                f"counting half; {score.unread} contexts unread"
            )
        if (told := self.simulation) is not None:
            ci = "" if told.ci95 is None else f" ({told.ci95[0]:.2f} to {told.ci95[1]:.2f})"
            parts.append(
                f"simulation by {visible(told.writer)}: correlation {decimals(told.correlation)}{ci} with the latents' "
                f"values, chance 0; {told.unread} tokens unread"
            )
        some = [(latent, " ".join(map(visible, words))) for latent, words in self.examples.items()]
        parts.append(aligned([("latent", "words"), *some], left=(0, 1)))
        return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described(Record):
    """What is known of the meaning of one latent."""

    latent: int
    words: tuple[str, ...]
    """By mutual information, the strongest first."""
    information: float
    """How much it says about words, in nats."""
    auroc: float | None = None
    """How well its words tell its contexts; None where that was not scored."""
    label: str = ""
    support: float | None = None
    """Mean of the votes on the label, 0 to 1."""
    group: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of the label by a writer: "detection" and "fuzzing" (chance 0.5), "simulation" (chance 0)."""


def describe(table: Explanations, result: ExplainResult, latent: int, *, count: int = 15) -> Described:
    """All that a table and a result say of one latent. Raises ``UserError`` for one that there is not."""
    words = table.of(latent, count)
    labels = () if result.labels is None else result.labels.labels
    label = next((one for one in labels if one.latent == latent), None)
    scores = {
        told.kind: one.accuracy
        for told in result.label_scores
        for one in told.scores
        if one.latent == latent and one.accuracy is not None
    }
    for told in () if result.simulation is None else result.simulation.scores:
        if told.latent == latent and told.correlation is not None:
            scores["simulation"] = told.correlation
    return Described(
        latent=latent,
        words=words,
        information=float(table.information[latent]),
        auroc=None if result.detection is None else result.detection.each.get(str(latent)),
        label="" if label is None else label.label,
        support=None if label is None else label.support,
        group="" if label is None else label.group,
        scores=scores,
    )
