"""Linear probes and small MLPs on a model's states: what can be read off them, site by site, in one program.

Every fold of the texts is tested once, by a probe that was fitted on the others; groups are never torn apart. The fold
after it chooses the penalty. Beside the true labels stand control tasks (arXiv 1909.03368) and shuffled labels, fitted
with the same penalty. Intervals are over groups.

Letters: S problems (positions times sites), n texts, D width, C label sets, Q penalties, K folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from scipy.special import expit

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.lens.fitting import calibrated, fit, log_loss, principal_axes
from jaxsteer.lens.probe_data import (
    LabelSets,
    ProbeData,
    check_positions,
    label_sets,
    probe_data,
    read_weights,
    split_folds,
)
from jaxsteer.lens.probe_options import Kind, ProbeOptions
from jaxsteer.lens.probe_result import ProbeResult, ProbeScore, Transfer, TransferScore
from jaxsteer.lens.records import TextRecord
from jaxsteer.models.model import Model
from jaxsteer.models.reading import read_rows
from jaxsteer.models.sites import KINDS, Site, find_sites
from jaxsteer.processes import to_host
from jaxsteer.ranges import check_ranges
from jaxsteer.statistics import auroc, calibration_error, difference_interval, rate_interval
from jaxsteer.steer import Vectors


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probes:
    """Probes at all sites and positions, and what they found."""

    result: ProbeResult
    vectors: Vectors | None
    """The probes' directions at the sites of the stream, read at the chosen position, for steering: each as long as the
    difference of the class means along it, towards the positive label. None for other sites and MLPs."""
    weights: Float[np.ndarray, "S D"]
    """For states as they are, by position and then site; of an MLP the mean gradient of its log-odds."""
    intercepts: Float[np.ndarray, " S"]
    probability: Float[np.ndarray, "S n"]
    """Of the positive label, of every text by the fit that does not know it."""
    options: ProbeOptions

    def transfer(self, model: Model, records: Sequence[TextRecord], name: str) -> Probes:
        """The same with the accuracies of all probes on other texts of the same labels.

        Raises ``UserError`` for texts without the positive label, and for MLPs, which are not kept.
        """
        if self.options.kind == "mlp":
            raise UserError("an MLP is not kept and cannot be tried on other texts: use a linear kind of probe")
        data = probe_data(model, records, self.result.positive)
        if data.names[1] not in (self.result.negative, f"not {self.result.positive}"):
            raise UserError(
                f"{name} has the labels {data.names[0]!r} and {data.names[1]!r}, and the probe tells "
                f"{self.result.positive!r} from {self.result.negative!r}"
            )
        states, _, _ = _read(model, data, self.options, None)
        values = np.einsum("snd,sd->sn", states, self.weights, dtype=np.float64) + self.intercepts[:, None]
        scores = []
        for score, own in zip(self.result.scores, values, strict=True):
            right = ((own > 0) == data.labels).astype(np.float64)
            scores.append(
                TransferScore(
                    site=score.site, position=score.position, accuracy=float(right.mean()),
                    ci95=rate_interval(right, data.groups), auroc=auroc(own, data.labels),
                )
            )  # fmt: skip
        found = Transfer(name=name, texts=len(data.labels), positives=int(data.labels.sum()), scores=tuple(scores))
        result = dataclasses.replace(self.result, transfers=(*self.result.transfers, found))
        return dataclasses.replace(self, result=result)


def probe(
    model: Model,
    records: Sequence[TextRecord],
    options: ProbeOptions = ProbeOptions(),
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Probes:
    """Fit and test probes of the records' labels at all sites and positions.

    ``progress`` is called with (texts read, of how many). Raises ``UserError`` for texts without labels or with one
    label only, fewer groups than folds, and sites or positions that do not fit.
    """
    check_ranges(options)
    check_positions(options.positions)
    if not options.penalties:
        raise UserError("a probe needs at least one penalty")
    data = probe_data(model, records, options.positive)
    fold = split_folds(data, options.folds, options.seed)
    states, sites, weights = _read(model, data, options, progress)
    labels = label_sets(
        data, weights, fold, controls=options.controls, shuffles=options.shuffles, seed=options.seed
    )  # fmt: skip
    if not np.isfinite(states).all():
        raise UserError("the model gives NaN or infinite activations on these texts: check its weights and dtype")
    penalties = options.penalties if options.kind != "mean" else (1.0,)
    found = to_host(
        fit_all(
            jnp.asarray(states), jnp.repeat(jnp.asarray(labels.columns), len(sites), 0), jnp.asarray(fold),
            jnp.asarray(penalties, jnp.float32), kind=options.kind, folds=options.folds,
        )
    )  # fmt: skip
    probability = expit(found["logodds"].astype(np.float64))
    scores = _scores(data, found | {"probability": probability}, labels, sites, options, penalties)
    result = ProbeResult(
        model=model.name, kind=options.kind, positive=data.names[0], negative=data.names[1], texts=len(data.labels),
        positives=int(data.labels.sum()), groups=len(set(data.groups)), folds=options.folds, controls=options.controls,
        shuffles=options.shuffles, chosen=int(np.argmin([score.loss for score in scores])), scores=scores,
    )  # fmt: skip
    return Probes(
        result=result,
        vectors=_vectors(model, data, states, found["w"], sites, result),
        weights=found["w"],
        intercepts=found["b"],
        probability=probability.astype(np.float32),
        options=options,
    )


def _read(
    model: Model, data: ProbeData, options: ProbeOptions, progress: Callable[[int, int], None] | None
) -> tuple[Float[np.ndarray, "S n D"], tuple[Site, ...], list[np.ndarray]]:
    """States by position and then site, the sites, and the weights of every text's tokens."""
    sites = tuple(dict.fromkeys(find_sites(options.sites, model.config).values()))
    if not sites:
        raise UserError("no site was given: name at least one, e.g. blocks.2.hook_resid_post")
    widths = {KINDS[site.kind].width(model.config) for site in sites}
    if len(widths) > 1:
        raise UserError(
            f"the sites have widths {', '.join(map(str, sorted(widths)))}: probe those of one width at a time"
        )
    weights = [read_weights(row, options.positions) for row in data.rows]
    states = np.zeros((len(options.positions), len(sites), len(data.rows), widths.pop()), np.float32)
    done = 0
    for chunk, read in read_rows(model, data.ids, weights, sites, batch_size=options.batch):
        states[:, :, chunk] = np.moveaxis(read, 2, 0)
        done += len(chunk)
        if progress is not None:
            progress(done, len(data.rows))
    return states.reshape(-1, *states.shape[2:]), sites, weights


@partial(jax.jit, static_argnames=("kind", "folds"))
def fit_all(
    x: Float[Array, "S n D"],
    y: Float[Array, "S n C"],
    fold: Int[Array, " n"],
    penalties: Float[Array, " Q"],
    *,
    kind: Kind,
    folds: int,
) -> dict[str, Array]:
    """All probes in one program: label sets and penalties side by side, folds and problems one after the other."""
    log_odds = kind in ("logistic", "mlp")

    def one_problem(inputs: tuple[Array, Array]) -> dict[str, Array]:
        x, y = inputs
        axes, true = principal_axes(x), y[:, :1]

        def fitted(columns: Array, weight: Array, penalty: Array) -> tuple[Array, Array, Array, Array]:
            found = fit(kind, x, columns, weight, penalty, axes)
            odds = found.scores if log_odds else calibrated(found.scores, columns, weight)
            return found.scores, odds, found.w, found.b

        def one_fold(number: Array) -> tuple[Array, Array, Array]:
            test, chooses = fold == number, fold == (number + 1) % folds
            weight = (~test & ~chooses).astype(x.dtype)
            _, odds, _, _ = fitted(jnp.repeat(true, len(penalties), 1), weight, penalties)
            loss = (
                jnp.where(chooses[:, None], log_loss(odds, jnp.broadcast_to(true, odds.shape)), 0).sum(0)
                / chooses.sum()
            )
            best = penalties[jnp.argmin(loss)]
            scores, odds, _, _ = fitted(y, (~test).astype(x.dtype), jnp.full(y.shape[1], best))
            return scores, odds[:, 0], loss

        scores, odds, loss = lax.map(one_fold, jnp.arange(folds))
        row = jnp.arange(len(x))
        loss = loss.mean(0)
        best = jnp.argmin(loss)
        _, _, w, b = fitted(true, jnp.ones(len(x)), penalties[best][None])
        return {
            "scores": scores[fold, row], "logodds": odds[fold, row], "loss": loss[best], "best": best,
            "w": w[:, 0], "b": b[0],
        }  # fmt: skip

    return lax.map(one_problem, (x, y))


def _scores(
    data: ProbeData,
    found: dict[str, np.ndarray],
    labels: LabelSets,
    sites: Sequence[Site],
    options: ProbeOptions,
    penalties: Sequence[float],
) -> tuple[ProbeScore, ...]:
    """What every probe found on the texts that it does not know."""
    places = [(at, site) for at in range(len(options.positions)) for site in sites]
    out = []
    for number, (at, site) in enumerate(places):
        right = ((found["scores"][number] > 0) == (labels.columns[at] > 0)).astype(np.float64)
        true, control, mixed = right[:, 0], right[:, 1 : 1 + labels.controls], right[:, 1 + labels.controls :]
        beside = control.mean(1) if labels.controls else None
        probability = found["probability"][number]
        out.append(
            ProbeScore(
                site=site.name,
                position=options.positions[at],
                accuracy=float(true.mean()),
                ci95=rate_interval(true, data.groups),
                auroc=auroc(found["logodds"][number], data.labels),
                control=None if beside is None else float(beside.mean()),
                selectivity=None if beside is None else float(true.mean() - beside.mean()),
                selectivity_ci95=None if beside is None else difference_interval(true, beside, data.groups),
                shuffled=float(mixed.mean()) if mixed.size else None,
                calibration=calibration_error(probability, data.labels),
                brier=float(np.mean((probability - data.labels) ** 2)),
                loss=float(found["loss"][number]),
                penalty=float(penalties[int(found["best"][number])]) if options.kind != "mean" else 0.0,
                types=labels.types[at],
                repeated=labels.repeated[at],
            )
        )
    return tuple(out)


def _vectors(
    model: Model,
    data: ProbeData,
    states: Float[np.ndarray, "S n D"],
    weights: Float[np.ndarray, "S D"],
    sites: Sequence[Site],
    result: ProbeResult,
) -> Vectors | None:
    """The probes' directions at the sites of the stream, at the chosen position."""
    if result.kind == "mlp" or not all(KINDS[site.kind].stream for site in sites):
        return None
    position, first = result.best.position, result.chosen // len(sites) * len(sites)
    arrays, norms = {}, {}
    for at, site in enumerate(sites, first):
        x, w = states[at].astype(np.float64), weights[at].astype(np.float64)
        apart = x[data.labels].mean(0) - x[~data.labels].mean(0)
        arrays[site.name] = (w * (w @ apart) / max(w @ w, 1e-300)).astype(np.float32)
        norms[site.name] = float(np.linalg.norm(x, axis=1).mean())
    return Vectors(
        arrays=arrays,
        mean_resid_norm={name: norm for name, norm in norms.items() if norm > 0},
        sign=f"towards {result.positive!r}, away from {result.negative!r}",
        model=model.name,
        fingerprint=model.fingerprint,
        read_position=position,
        metadata={
            "estimator": f"{result.kind} probe",
            "site": result.best.site,
            "n": str(result.texts),
            "jaxsteer_version": __version__,
        },
    )
