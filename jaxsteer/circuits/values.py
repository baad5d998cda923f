"""Attribution of values: gradient times difference at any site, unit by unit, and in the latents of a dictionary.

Where a run and its source differ by D at a site, and g is the metric's gradient there in the run (or averaged along the
line between the streams before block ``start``), every entry's score is D g (attribution patching).

Letters: B rows, T tokens, D width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsteer.circuits.attribution import averaged
from jaxsteer.circuits.rows import Rows, check_answer, check_lengths, metric_of, on_devices, opened_rows
from jaxsteer.circuits.runs import alphas, score_from, two_runs
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_and_read
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sites import FINAL, KINDS, Site, find_sites
from jaxsteer.models.taps import Intervention, checked
from jaxsteer.objectives.reads import Needs, Objective
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE, decode, encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueScores:
    """Values at sites in a run and in its source, and the metric's gradients there, float32, by name of the site.

    They are laid out as everywhere: [B, T, ...], patterns [B, N, T, U]. Gradients are 0 on padding.
    """

    before: Mapping[str, Float[np.ndarray, "B T ..."]]
    after: Mapping[str, Float[np.ndarray, "B T ..."]]
    """In the source."""
    gradients: Mapping[str, Float[np.ndarray, "B T ..."]]
    base: Float[np.ndarray, " B"]
    """The metric of the rows."""
    target: Float[np.ndarray, " B"]
    """That of their sources."""

    def scores(self, site: str) -> Float[np.ndarray, "B T ..."]:
        """Of every entry: difference times gradient. They sum to the site's effect in first order."""
        return (self.after[site] - self.before[site]) * self.gradients[site]

    def by_token(self, site: str) -> Float[np.ndarray, "B T"]:
        """Scores summed over everything but rows and tokens (of patterns: queries)."""
        found = self.scores(site)
        tokens = KINDS[site.split(".", 2)[2] if site.startswith("blocks.") else site].axes.split().index("T")
        return found.sum(tuple(axis for axis in range(1, found.ndim) if axis != tokens))

    def top(self, site: str, count: int = 10) -> list[tuple[tuple[int, ...], float]]:
        """The units (heads, neurons, entries) of the largest scores, summed over tokens, in the mean over rows."""
        total = self.scores(site).sum(1).mean(0, dtype=np.float64)
        order = np.argsort(-np.abs(total), axis=None)[:count]
        return [(tuple(int(i) for i in np.unravel_index(at, total.shape)), float(total.flat[at])) for at in order]


def attribute_values(
    model: Model,
    rows: Rows,
    metric: Objective,
    source: Rows | Intervention,
    sites: str | Sequence[str],
    *,
    start: int = 0,
    edits: Intervention | None = None,
    steps: int = 1,
    rule: str = "left",
) -> ValueScores:
    """Scores of all entries at ``sites``, which lie in blocks from ``start`` on or behind them.

    One step of the left rule takes the gradient in the run itself. Many parameters: those of ``attribute_edges``, whose
    errors these are. Raises ``UserError`` for sites below ``start``.
    """
    named = find_sites(sites, model.config)
    for name, site in named.items():
        if site.layer < start and site.kind not in FINAL or site.kind == "hook_embed":
            raise UserError(f"{name} lies below block {start}, where the runs that are compared begin: choose start")
    pytree, found = metric_of(metric, model.config)
    check_answer(found, rows)
    if isinstance(source, Rows):
        check_lengths(rows, source)
    for each in (edits, source):
        if isinstance(each, Intervention):
            checked(each, model.config, None)
    one = on_devices(model, rows)
    other = on_devices(model, source) if isinstance(source, Rows) else one
    streams, scored = two_runs(model, one, other, source, edits, pytree, found, start)
    before, after, slopes = to_host(
        _scored_values(
            model.params, model.config, one, *streams, edits, pytree, alphas(steps, rule),
            needs=found, start=start, sites=tuple(named.values()),
        )
    )  # fmt: skip
    by_name = lambda values: {name: values[site] for name, site in named.items()}  # noqa: E731
    return ValueScores(
        before=by_name(before), after=by_name(after), gradients=by_name(slopes), base=scored[0], target=scored[1]
    )


def _values(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    edits: Intervention | None,
    start: int,
    sites: Sequence[Site],
) -> dict[Site, Array]:
    context, tap = opened_rows(params, config, rows, edits)
    pick = lambda kind, value: value.astype(jnp.float32)  # noqa: E731
    _, [found] = run_and_read(
        params, config, x, context, config.n_layers, [(sites, pick)], tap=tap, begin=start
    )  # fmt: skip
    return found


@partial(jax.jit, static_argnames=("config", "needs", "start", "sites"))
def _scored_values(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x: Float[Array, "B T D"],
    other: Float[Array, "B T D"],
    edits: Intervention | None,
    metric: Any,
    alphas: Float[Array | np.ndarray, " n"],
    *,
    needs: Needs,
    start: int,
    sites: tuple[Site, ...],
) -> tuple[dict[Site, Array], dict[Site, Array], dict[Site, Array]]:
    """Values of both runs, and gradients. Many parameters: both runs, and what is asked of them."""
    both = [_values(params, config, rows, each, edits, start, sites) for each in (x, other)]
    shapes = {site: jnp.zeros(value.shape, params.embed.dtype) for site, value in both[0].items()}

    def at(alpha: Array) -> dict[Site, Array]:
        between = (x + alpha * (other.astype(jnp.float32) - x.astype(jnp.float32))).astype(x.dtype)
        given = dict(params=params, config=config, rows=rows, x=between, edits=edits, metric=metric)
        score = lambda added: score_from(needs=needs, start=start, added=added, **given).sum()  # noqa: E731
        return jax.tree.map(lambda a: a.astype(jnp.float32), jax.grad(score)(shapes))

    slopes = averaged(at, alphas)
    for site, slope in slopes.items():
        axes = KINDS[site.kind].axes.split()
        inside = rows.mask.reshape([size if a in "BT" else 1 for a, size in zip(axes, slope.shape)])
        slopes[site] = jnp.where(inside, slope, 0)
    return both[0], both[1], slopes


def latent_scores(
    found: ValueScores, site: str, sae: SAE
) -> tuple[Float[np.ndarray, "B T F"], Float[np.ndarray, "B T"]]:
    """Scores of the latents of a dictionary at its site, and of its error node: D f_i (W_dec,i . g), and what remains.

    Latents and error sum to the site's own scores. Raises ``UserError`` for a dictionary that reads one site and writes
    another, and for one whose decoder needs its input.
    """
    if sae.d_in != sae.d_out:
        raise UserError("latents are scored where they are read and written: this dictionary writes to another site")
    latents, errors = _latents(sae, found.before[site], found.after[site], found.gradients[site])
    return to_host(latents), to_host(errors)


@jax.jit
def _latents(sae: SAE, before: Array, after: Array, slope: Array) -> tuple[Array, Array]:
    before, after, slope = (jnp.asarray(a).reshape(*a.shape[:2], -1) for a in (before, after, slope))
    codes = [encode(sae, x) for x in (before, after)]
    rest = [x - decode(sae, f) for x, f in zip((before, after), codes)]
    along = jax.vjp(lambda f: decode(sae, f), codes[0])[1](slope)[0]
    return (codes[1] - codes[0]) * along, ((rest[1] - rest[0]) * slope).sum(-1)
