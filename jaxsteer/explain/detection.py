"""How well words tell where a latent fires: a score without a judge.

A context's score for a latent is the sum of the weights of the latent's words that occur in it; the score of the words
is the AUROC of contexts where the latent fires against contexts where it does not, and against those where a
neighbouring latent fires and it does not (hard negatives). Beside it stand the same for the tokens at which the latent
fires most strongly in other contexts, for words by the plain dot product, for words drawn at random, and for the words
of another latent. The unit of intervals is the latent.

Letters: n contexts, C latents, V words, S latents scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from jaxsteer.display import aligned, decimals
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import Contexts
from jaxsteer.explain.explanations import Explanations
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.files.records import Record
from jaxsteer.runs.result import Result
from jaxsteer.statistics import student

FEWEST = 10
"""Contexts of either kind that a score needs; latents with fewer are rare or silent."""
_BLOCK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Record):
    """How well one kind of words tells where latents fire."""

    words: str
    auroc: float
    """Mean over latents, against contexts where the latent does not fire."""
    auroc_ci95: tuple[float, float] | None = None
    hard: float | None = None
    """The same against contexts where a neighbour fires."""
    hard_ci95: tuple[float, float] | None = None
    above: float = 0.0
    """Share of latents with an AUROC above 0.7."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionResult(Result):
    """Detection of latents by words."""

    contexts: int
    width: int
    latents: int
    """Latents that were scored."""
    rare: int
    """Latents that fire in fewer than ``FEWEST`` contexts, or are silent in fewer."""
    silent: int
    """Those that fire nowhere."""
    scores: tuple[Score, ...]
    each: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """AUROC of the explanations of every latent that was scored."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for each kind of words."""
        return [score.to_json() for score in self.scores]

    def table(self) -> str:
        """A line for each kind of words."""
        rows = [("words", "AUROC", "95 %", "hard", "95 %", "above 0.7")]
        for s in self.scores:
            rows.append((
                s.words, decimals(s.auroc), _ends(s.auroc_ci95), decimals(s.hard), _ends(s.hard_ci95), f"{s.above:.0%}"
            ))  # fmt: skip
        note = (
            f"{self.latents:,} latents in {self.contexts:,} contexts of {self.width} tokens; {self.silent:,} fire in "
            f"none, and {self.rare - self.silent:,} in too few or too many."
        )
        return aligned(rows, left=(0,), note=note)


def _ends(ci: tuple[float, float] | None) -> str:
    return "" if ci is None else f"{ci[0]:.2f} to {ci[1]:.2f}"


def aurocs(
    score: Float[np.ndarray, "n S"], positive: Bool[np.ndarray, "n S"], counted: Bool[np.ndarray, "n S"] | None = None
) -> Float[np.ndarray, " S"]:
    """The AUROC of every column, ties counting half; NaN without both kinds. Rows that do not count are left out."""
    counted = np.ones_like(positive) if counted is None else counted
    ranks = rankdata(np.where(counted, score, np.inf), axis=0)  # what does not count comes behind all others
    ups, downs = (positive & counted).sum(0), (~positive & counted).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.where(positive & counted, ranks, 0).sum(0) - ups * (ups + 1) / 2
        return np.where((ups > 0) & (downs > 0), total / (ups * downs), np.nan)


def detect(
    found: Explanations,
    contexts: Contexts,
    near: Int[np.ndarray, "C k"],
    *,
    plain: Int[np.ndarray, "C K"] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DetectionResult:
    """Score the words of all latents that fire in some contexts and are silent in others.

    One half of the contexts, drawn with ``seed``, tells which tokens latents fire at (the baseline); the other is what
    every kind of words is scored on. ``near`` are neighbours, for hard negatives; ``plain`` the words by dot product.

    Raises ``UserError`` for contexts of another SAE, and when no latent has contexts enough of both kinds.
    """
    if contexts.values.shape[1] != len(found):
        raise UserError(f"the contexts are of {contexts.values.shape[1]:,} latents, the explanations of {len(found):,}")
    order = np.random.default_rng(seed).permutation(len(contexts))
    half = len(order) // 2
    seen, held = contexts.part(order[:half]), contexts.part(order[half:])
    fires = held.values > 0
    count = fires.sum(0)
    chosen = np.flatnonzero((count >= FEWEST) & (len(held) - count >= FEWEST))
    if not len(chosen):
        raise UserError(
            f"no latent fires in {FEWEST} or more of {len(held)} contexts and is silent in {FEWEST} or more: read more"
        )
    present = held.words(found.vocabulary).astype(np.float32)
    tokens = firing_words(seen, found.vocabulary, found.words.shape[1])
    rng = np.random.default_rng([seed, 1])
    size = len(found.vocabulary)
    kinds: dict[str, np.ndarray] = {"mutual information": _weights(found.words, found.scores, size, chosen)}
    if plain is not None:
        kinds["dot product"] = _weights(plain, np.ones_like(plain, float), size, chosen)
    kinds["strongest tokens"] = tokens[chosen]
    drawn = rng.random((len(chosen), size)).argsort(1)[:, : found.words.shape[1]]
    kinds["random words"] = _weights(drawn, np.ones_like(drawn, float), size, np.arange(len(chosen)))
    kinds["another latent's"] = np.roll(kinds["mutual information"], 1, axis=0)
    easy: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    hard: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    for begin in range(0, len(chosen), _BLOCK):
        part = chosen[begin : begin + _BLOCK]
        fired = fires[:, part]
        close = np.stack([fires[:, near[latent]].any(1) for latent in part], 1)
        for name, weights in kinds.items():
            score = present @ weights[begin : begin + _BLOCK].T
            easy[name].append(aurocs(score, fired))
            hard[name].append(aurocs(score, fired, fired | close))
        if progress is not None:
            progress(min(begin + _BLOCK, len(chosen)))
    scores = tuple(_score(name, np.concatenate(easy[name]), np.concatenate(hard[name])) for name in kinds)
    own = np.concatenate(easy["mutual information"])
    return DetectionResult(
        contexts=len(held),
        width=held.tokens.shape[1],
        latents=len(chosen),
        rare=len(found) - len(chosen),
        silent=int((count == 0).sum()),
        scores=scores,
        each={str(latent): float(value) for latent, value in zip(chosen.tolist(), own, strict=True)},
    )


def firing_words(contexts: Contexts, vocabulary: Vocabulary, top: int) -> Float[np.ndarray, "C V"]:
    """Weights of the ``top`` words at whose first tokens latents fire: their mean largest values, float32."""
    by_first: dict[int, int] = {}
    for number, ids in enumerate(vocabulary.tokens):
        by_first.setdefault(ids[0], number)
    found = np.zeros((contexts.values.shape[1], len(vocabulary)), np.float32)
    rows = np.arange(len(contexts))
    table = np.full(max(max(by_first, default=0), int(contexts.tokens.max())) + 2, -1)
    table[list(by_first)] = list(by_first.values())
    for latent in range(len(found)):
        at = contexts.tokens[rows, contexts.places[:, latent]]
        word, value = table[at], np.maximum(contexts.values[:, latent], 0)
        some = (word >= 0) & (value > 0)
        np.add.at(found[latent], word[some], value[some])
    if top < len(vocabulary):
        least = np.partition(found, -top, axis=1)[:, -top][:, None]
        found = np.where(found >= np.maximum(least, 1e-30), found, 0.0)
    return found


def _weights(words: np.ndarray, scores: np.ndarray, size: int, chosen: np.ndarray) -> np.ndarray:
    weights = np.zeros((len(chosen), size), np.float32)
    np.put_along_axis(weights, words[chosen], np.maximum(scores[chosen], 0).astype(np.float32), axis=1)
    return weights


def _score(name: str, easy: np.ndarray, hard: np.ndarray) -> Score:
    easy, hard = easy[np.isfinite(easy)], hard[np.isfinite(hard)]
    return Score(
        words=name,
        auroc=float(easy.mean()),
        auroc_ci95=student(easy),
        hard=float(hard.mean()) if len(hard) else None,
        hard_ci95=student(hard),
        above=float((easy > 0.7).mean()),
    )
