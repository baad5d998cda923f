"""Persona directions: difference of means at any sites, what they are worth, and their file.

Sign, everywhere: a direction points from matching (the persona is shown) to not matching, so that going along it
reduces the persona.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer import __version__
from jaxsteer.display import aligned, decimals
from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.models.model import Model
from jaxsteer.models.reading import BATCH, direction_sites, read_rows
from jaxsteer.models.sites import resid_site
from jaxsteer.personas.pairs import Pairs
from jaxsteer.runs.result import Shown
from jaxsteer.statistics import auroc
from jaxsteer.steer.vectors import Vectors, check_vectors, load_vectors, random_arrays, save_vectors

SIGN = "matching→not matching"
UNITS = "residual stream, raw difference of means"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction(Shown):
    """One vector per site, in the stream's own units, pointing from matching to not matching."""

    delta: dict[str, np.ndarray]
    """float32 (D,) per site; never normalised here."""
    mean_resid_norm: dict[str, float]
    """Mean norm of the stream at the site and read position, the unit of steering coefficients."""
    n: int
    """Number of pairs."""
    read_position: str
    metadata: dict[str, str]
    """Model, fingerprint, persona, data hash, template, split seed, sign, units, version: what the file carries."""
    diagnostics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Per site: norm, split_half_cosine, letter_cosine; agreement, separability and auroc of ``diagnose``."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order they were asked for."""
        return tuple(self.delta)

    def __repr__(self) -> str:
        return (
            f"Direction({len(self.delta)} sites: {self.sites[0]} ... {self.sites[-1]}; {self.n} pairs of "
            f"{self.metadata.get('persona', 'unknown')}, read at {self.read_position})"
        )

    def at(self, site: int | str, coefficient: float = 1.0) -> Vectors:
        """Vectors to steer by: at a site, or in the stream after a layer by its number, so many mean norms of the
        stream along the direction. Positive coefficients lead away from the persona, negative ones bring it out.

        Raises ``UserError`` for a site that the direction does not have."""
        name = resid_site(site) if isinstance(site, int) else site
        found = self.vectors().at(name)
        return dataclasses.replace(found, coefficient=float(coefficient), coefficient_units="mean_resid_norm")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a vector file (``save_direction``); ``load_direction`` reads it."""
        return save_direction(self, path)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per site: length, length in mean norms of the stream, and the diagnostics."""
        return [
            {"site": site, "norm_share": float(np.linalg.norm(self.delta[site])) / self.mean_resid_norm[site]}
            | self.diagnostics.get(site, {})
            for site in self.sites
        ]

    def table(self) -> str:
        """One line per site."""
        names = ("agreement", "separability", "auroc")
        rows: list[tuple[str, ...]] = [("site", "norm", "of the stream's", "halves", *names)]
        for row in self.to_rows():
            facts = (row.get("norm"), row["norm_share"], row.get("split_half_cosine"), *map(row.get, names))
            rows.append((row["site"], *(decimals(fact) for fact in facts)))
        note = "halves: cosine of the directions of two halves of the questions; along it the persona gets less"
        return aligned(rows, note=note)

    def unit(self, site: str) -> Float[np.ndarray, " D"]:
        """The direction with norm 1. Raises ``UserError`` where it is zero."""
        norm = float(np.linalg.norm(self.delta[site]))
        if not norm > 0:
            raise UserError(f"the direction at {site} is zero: its pairs do not differ there")
        return self.delta[site] / np.float32(norm)

    def vectors(self) -> Vectors:
        """The direction as steering vectors. Added, they reduce the persona: negative coefficients bring it out."""
        return Vectors(
            arrays=self.delta,
            mean_resid_norm=self.mean_resid_norm,
            read_position=self.read_position,
            metadata={
                **{name: text for name, text in self.metadata.items() if name not in _OWN},
                "n_pairs": str(self.n),
                "diagnostics": json.dumps(self.diagnostics),
            },
            model=self.metadata.get("model", ""),
            fingerprint=self.metadata.get("fingerprint", ""),
            sign=self.metadata.get("sign", ""),
        )


def mean_difference(
    model: Model,
    pairs: Pairs,
    sites: str | Sequence[str],
    *,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Direction:
    """Mean of good minus bad streams at each pair's read position, at any number of sites in one pass.

    Streams over batches of ``batch_size`` rows; sums are float64, so the result does not depend on it. The diagnostics
    hold ``norm``, ``split_half_cosine`` (between two halves of the questions; NaN for a single one) and
    ``letter_cosine`` (with mean "(A)" minus mean "(B)", where rows end in answers). ``progress(done, total)`` counts
    texts. Raises ``UserError`` for sites of another width than D or beyond the last layer.
    """
    parsed = direction_sites(model, sites)
    weights = _weights(pairs)
    n = len(pairs)
    sums = np.zeros((len(parsed), len(weights), model.config.d_model))
    norms, done = np.zeros(len(parsed)), 0
    for chunk, states in read_rows(model, pairs.rows, pairs.reads, parsed, batch_size=batch_size):
        wide = states.astype(np.float64)
        sums += np.einsum("kb,sbd->skd", weights[:, chunk], wide)
        norms += np.linalg.norm(wide, axis=-1).sum(-1)
        done += len(chunk)
        if progress is not None:
            progress(done, 2 * n)
    if not np.isfinite(sums).all():
        raise UserError("the model gives NaN or infinite activations on these pairs: check its weights and dtype")
    names = [site.name for site in parsed]
    diagnostics = {
        name: {
            "norm": float(np.linalg.norm(delta)),
            "split_half_cosine": _cosine(first, second),
            "letter_cosine": _cosine(delta, letter),
        }
        for name, (delta, first, second, letter) in zip(names, sums, strict=True)
    }
    return Direction(
        delta={name: row[0].astype(np.float32) for name, row in zip(names, sums, strict=True)},
        mean_resid_norm={name: float(total / (2 * n)) for name, total in zip(names, norms, strict=True)},
        n=n,
        read_position=pairs.read_position,
        metadata={
            "model": model.name,
            "fingerprint": model.fingerprint,
            "sign": SIGN,
            "estimator": "mean difference",
            "units": UNITS,
            "jaxsteer_version": __version__,
            **pairs.recipe,
        },
        diagnostics=diagnostics,
    )


def _weights(pairs: Pairs) -> Float[np.ndarray, "k m"]:
    """(4, 2n) weights whose sums over rows (good, then bad) are: delta, its two halves, and the letter contrast."""
    n = len(pairs)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(pairs.groups))}
    half = np.asarray([numbers[group] % 2 for group in pairs.groups])
    members = [np.ones(n), half == 0, half == 1]
    weights = np.zeros((4, 2 * n))
    for k, member in enumerate(members):
        share = member / max(member.sum(), 1)
        weights[k] = np.concatenate([share, -share])
    if all(pairs.good_letter):
        is_a = np.asarray([letter == "(A)" for letter in pairs.good_letter], float)
        rows_a = np.concatenate([is_a, 1 - is_a])
        weights[3] = rows_a / max(rows_a.sum(), 1) - (1 - rows_a) / max((1 - rows_a).sum(), 1)
    return weights


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale > 0 else float("nan")


def pair_states(
    model: Model, pairs: Pairs, sites: str | Sequence[str], *, batch_size: int = BATCH
) -> Float[np.ndarray, "s 2 n D"]:
    """float32 streams at sites, read from the good and the bad row of every pair."""
    parsed, n = direction_sites(model, sites), len(pairs)
    found = np.zeros((len(parsed), 2 * n, model.config.d_model), np.float32)
    for chunk, states in read_rows(model, pairs.rows, pairs.reads, parsed, batch_size=batch_size):
        found[:, chunk] = states
    return found.reshape(len(parsed), 2, n, -1)


ESTIMATORS = ("mean difference", "pca", "logistic")
"""Of ``fit_direction``."""


def fit_direction(
    model: Model,
    pairs: Pairs,
    sites: str | Sequence[str],
    estimator: str = "mean difference",
) -> Direction:
    """The direction of ``pairs`` by an estimator; all have the length and the sign of the difference of means.

    ``pca``: the axis along which the differences of pairs are largest (2310.01405, without its random signs).
    ``logistic``: the weights of a logistic regression that tells good from bad, with scikit-learn's default L2 penalty,
    on states that are centred and divided by their mean norm. Raises ``UserError`` as ``mean_difference``.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"unknown estimator {estimator!r}: expected {', '.join(ESTIMATORS)}")
    mean = mean_difference(model, pairs, sites)
    if estimator == "mean difference":
        return mean
    delta = {}
    for site, (good, bad) in zip(mean.sites, pair_states(model, pairs, sites).astype(np.float64), strict=True):
        if not mean.delta[site].any():
            delta[site] = mean.delta[site]
            continue
        if estimator == "pca":
            axis = np.linalg.svd(good - bad, full_matrices=False)[2][0]
        else:
            from sklearn.linear_model import LogisticRegression

            both = np.concatenate([good, bad])
            scaled = (both - both.mean(0)) / np.linalg.norm(both, axis=-1).mean()
            axis = LogisticRegression(max_iter=1000).fit(scaled, np.arange(len(both)) < len(good)).coef_[0]
        axis *= np.sign(axis @ mean.delta[site]) or 1.0
        delta[site] = (axis / np.linalg.norm(axis) * np.linalg.norm(mean.delta[site])).astype(np.float32)
    metadata = {**mean.metadata, "estimator": estimator}
    facts = {site: {"norm": float(np.linalg.norm(vector))} for site, vector in delta.items()}
    return dataclasses.replace(mean, delta=delta, metadata=metadata, diagnostics=facts)


def shuffled(pairs: Pairs, seed: int) -> Pairs:
    """A control: the same rows, and of a random half of the questions good and bad exchanged."""
    rng, numbers = np.random.default_rng(seed), {g: i for i, g in enumerate(dict.fromkeys(pairs.groups))}
    half = rng.permutation(len(numbers)) < (len(numbers) + 1) // 2
    swap = np.asarray([half[numbers[group]] for group in pairs.groups])
    both = zip(zip(pairs.good, pairs.good_read, strict=True), zip(pairs.bad, pairs.bad_read, strict=True), strict=True)
    good, bad = zip(*(pair[::-1] if s else pair for pair, s in zip(both, swap, strict=True)), strict=True)
    reads = [tuple(read for _, read in side) for side in (good, bad)]
    good_read, bad_read = map(np.asarray, reads) if isinstance(pairs.good_read, np.ndarray) else reads
    return dataclasses.replace(
        pairs,
        good=tuple(row for row, _ in good),
        bad=tuple(row for row, _ in bad),
        good_read=good_read,
        bad_read=bad_read,
        good_letter=("",) * len(pairs),
        recipe={**pairs.recipe, "contrast": f"{pairs.recipe.get('contrast', '')}, labels shuffled by seed {seed}"},
    )


def diagnose(model: Model, direction: Direction, pairs: Pairs) -> Direction:
    """The direction with what held-out ``pairs`` say of it among its diagnostics: what predicts that steering works.

    ``agreement`` is the mean cosine of the pairs' differences and the direction, ``separability`` is d', the distance
    of the means of <r, v> in their pooled standard deviation (2505.22637, 2602.17881), and ``auroc`` that of <r, v>
    (good above bad). NaN where states do not differ.
    """
    check_direction(direction, model)
    diagnostics = {site: dict(facts) for site, facts in direction.diagnostics.items()}
    for site, states in zip(direction.sites, pair_states(model, pairs, direction.sites), strict=True):
        good, bad = states.astype(np.float64)
        unit = direction.unit(site).astype(np.float64)
        along, gaps = (good @ unit, bad @ unit), good - bad
        lengths = np.linalg.norm(gaps, axis=-1)
        some, spread = lengths > 0, np.sqrt((along[0].var() + along[1].var()) / 2)
        area = auroc(np.concatenate(along), np.arange(2 * len(good)) < len(good))
        diagnostics.setdefault(site, {}).update(
            agreement=float((gaps[some] @ unit / lengths[some]).mean()) if some.any() else float("nan"),
            separability=float((along[0].mean() - along[1].mean()) / spread) if spread > 0 else float("nan"),
            auroc=float("nan") if area is None else area,
        )
    return dataclasses.replace(direction, diagnostics=diagnostics)


def random_direction(direction: Direction, seed: int) -> Direction:
    """A control: isotropic random vectors of the same norms at the same sites."""
    metadata = {**direction.metadata, "estimator": f"random control, seed {seed}"}
    return dataclasses.replace(direction, delta=random_arrays(direction.delta, seed), metadata=metadata, diagnostics={})


def check_direction(direction: Direction, model: Model) -> None:
    """Refuse a direction that cannot belong to ``model`` (width, layers); warn when it comes from other weights."""
    check_vectors(direction.vectors(), model, any_weights=True)


_OWN = frozenset({"model", "fingerprint", "sign"})
"""Metadata of a direction that vectors have as fields."""


def save_direction(direction: Direction, path: str | os.PathLike[str]) -> Path:
    """Write ``direction.safetensors`` (``jaxsteer.steer.vectors``), whole or not at all. Returns the path."""
    return save_vectors(direction.vectors(), path)


def load_direction(path: str | os.PathLike[str], *, model: Model | None = None) -> Direction:
    """Read a direction that ``save_direction`` wrote, and check it against ``model`` when one is given.

    Raises ``UserError`` for a missing or damaged file, another format, vectors that are no persona direction, and a
    direction of another width or depth than the model's; a direction made on other weights is a logged warning.
    """
    vectors = load_vectors(path, model=model, any_weights=True)
    metadata = dict(vectors.metadata)
    if vectors.operation != "add" or "n_pairs" not in metadata:
        raise UserError(
            f"{path} holds vectors of another origin ({vectors.source_format or 'unknown'}, operation "
            f"{vectors.operation}), not a persona direction, whose sign is {SIGN}: read it with "
            f"jaxsteer.steer.load_vectors"
        )
    try:
        n, diagnostics = int(metadata.pop("n_pairs")), parse_json(metadata.pop("diagnostics", "{}"), path, nan=True)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    own = {name: text for name in sorted(_OWN) if (text := getattr(vectors, name))}
    return Direction(
        delta=vectors.arrays,
        mean_resid_norm=vectors.mean_resid_norm,
        n=n,
        read_position=vectors.read_position,
        metadata={**metadata, **own},
        diagnostics=diagnostics,
    )
