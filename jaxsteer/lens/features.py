"""Features that are one direction of a site: a neuron, what a head adds to a token, any vector. What they respond to.

A feature's value at a token is the inner product of a vector with the values of its site, heads joined: a neuron's
vector is 1 at its entry of ``mlp.hook_post``; a head's lies in its part of ``attn.hook_z``, so that the value is what
the head adds to a token's logit, before the last norm's division (and without the norm that follows attention in
Gemma 2 and 3). Latents of sparse autoencoders have a command of their own (``jaxsteer.sae.explore``).

Letters: B rows, T tokens, W width of a site, F features, S these and their random ones, D width of the stream.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsteer.display import decimals, visible
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.lens.texts import first_token
from jaxsteer.lens.words import read_words
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.models.sites import KINDS, Site, parse_site
from jaxsteer.models.transformer import centred, norm_weight
from jaxsteer.processes import to_host
from jaxsteer.ranges import CountFrom0, Seed, check_ranges
from jaxsteer.runs.result import Result
from jaxsteer.sae.exploration import Detail, keep_strongest
from jaxsteer.sae.harvest import rows_of, usable
from jaxsteer.sae.texts import Documents, Sample
from jaxsteer.steer import load_vectors

FORMS = "m3.n17 (a neuron), 'a3.h5: Paris' (what a head adds to the logit of \" Paris\"), FILE or FILE:SITE (a vector)"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Feature:
    """A vector at a site."""

    name: str
    site: str
    reads: Float[np.ndarray, " W"]
    """Its value is the inner product with this, float32."""
    writes: Float[np.ndarray, " D"] | None
    """What it adds to the stream where it is 1; None where the site writes nothing there."""

    def random(self, rng: np.random.Generator) -> Float[np.ndarray, " W"]:
        """A vector of the same length in its place: another neuron, another direction of the head or of the site."""
        at = np.flatnonzero(self.reads)
        found = np.zeros_like(self.reads)
        if len(at) == 1:
            found[rng.choice(np.delete(np.arange(len(found)), at))] = self.reads[at[0]]
            return found
        drawn = rng.standard_normal(len(at))
        found[at] = drawn * (np.linalg.norm(self.reads) / np.linalg.norm(drawn))
        return found


def find_feature(model: Model, text: str) -> Feature:
    """The feature that a text names: "m3.n17", "a3.h5: Paris" (with the token's space), "FILE" or "FILE:SITE".

    Raises ``UserError`` for other texts, layers, heads and neurons that the model does not have, and vector files that
    do not fit it or hold several vectors where no site is given.
    """
    config, w = model.config, model.params.layers
    if match := re.fullmatch(r"m(\d+)\.n(\d+)", text):
        layer, unit = _within(match, text, config.n_layers, config.d_mlp, "neurons")
        reads = np.zeros(config.d_mlp, np.float32)
        reads[unit] = 1.0
        return Feature(
            name=text, site=Site(layer, "mlp.hook_post").name, reads=reads, writes=_host(w.down[layer, unit])
        )  # fmt: skip
    if match := re.fullmatch(r"a(\d+)\.h(\d+):(.+)", text, re.DOTALL):
        layer, head = _within(match, text, config.n_layers, config.n_heads, "heads")
        token, params = first_token(model, match[3]), model.params
        column = params.embed[token] if params.unembed is None else params.unembed[:, token]
        along = _host(centred(column.astype(jnp.float32) * norm_weight(params.final_norm, config), config))
        o = _host(w.o[layer, head])  # [H, D]
        parts = np.zeros((config.n_heads, config.d_head), np.float32)
        parts[head] = o @ along
        return Feature(name=text, site=Site(layer, "attn.hook_z").name, reads=parts.ravel(), writes=parts[head] @ o)
    path, _, name = text.partition(".safetensors:")
    path = f"{path}.safetensors" if name else text
    if not path.endswith(".safetensors"):
        raise UserError(f"{text!r} names no feature: expected {FORMS}")
    vectors = load_vectors(Path(path), model=model)
    chosen = name or vectors.metadata.get("site") or (vectors.sites[0] if len(vectors.sites) == 1 else "")
    if not chosen:
        raise UserError(f"{path} holds vectors at {len(vectors.sites)} sites: write {path}:SITE for one of them")
    site = parse_site(chosen, config.n_layers)
    array = vectors.at(site.name).arrays[site.name].astype(np.float32)
    return Feature(
        name=f"{Path(path).name}:{site.name}", site=site.name, reads=array.ravel(),
        writes=array if KINDS[site.kind].stream else None,
    )  # fmt: skip


def _within(match: re.Match[str], text: str, layers: int, units: int, what: str) -> tuple[int, int]:
    layer, unit = int(match[1]), int(match[2])
    if layer >= layers or unit >= units:
        raise UserError(f"{text!r}: the model has layers 0 to {layers - 1}, and in each {what} 0 to {units - 1}")
    return layer, unit


def _host(array: Array) -> Float[np.ndarray, ...]:
    return np.asarray(to_host(array.astype(jnp.float32)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Record):
    """A piece of text around a strong moment."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """Of the feature at each of them."""
    peak: CountFrom0
    """Number of the token with the largest value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureReport(Record):
    """What one feature responds to, and what it writes."""

    name: str
    site: str
    mean: float
    """Over tokens, BOS and outliers left out."""
    deviation: float
    largest: float
    control: float
    """The largest value of random features of the same site and length, in their standard deviations from their mean;
    the mean over ``Features.controls`` of them."""
    examples: tuple[Example, ...]
    """The strongest first, one for each row of text at most."""
    promotes: tuple[str, ...]
    """Tokens whose logits what it writes raises most, without the last norm's division."""
    suppresses: tuple[str, ...]

    @property
    def largest_z(self) -> float:
        """The largest value in standard deviations from the mean."""
        return (self.largest - self.mean) / self.deviation if self.deviation else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Result):
    """Features of one model on one text."""

    model: str
    tokens: int
    """At which values were looked."""
    controls: CountFrom0
    """Random features beside each."""
    features: tuple[FeatureReport, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per example."""
        return [
            {"feature": one.name, "value": each.values[each.peak], "text": "".join(each.tokens), "peak": each.peak}
            for one in self.features
            for each in one.examples
        ]

    def table(self) -> str:
        """Every feature with its examples; the strongest token stands in ``>> <<``."""
        found = []
        for one in self.features:
            beside = f"; random ones reach {decimals(one.control, 1)}" * bool(self.controls)
            lines = [
                f"{one.name} at {one.site}: mean {one.mean:.3g}, at most {one.largest:.4g}, which is "
                f"{one.largest_z:.1f} standard deviations above it{beside}"
            ]
            for what, tokens in (("promotes", one.promotes), ("suppresses", one.suppresses)):
                if tokens:
                    lines.append(f"  {what} {'  '.join(map(visible, tokens))}")
            for each in one.examples:
                text = "".join(
                    f">>{visible(token)}<<" if i == each.peak else visible(token) for i, token in enumerate(each.tokens)
                )
                lines.append(f"  {each.values[each.peak]:8.4g}  {text}")
            found.append("\n".join(lines))
        return "\n\n".join([*found, f"{self.tokens:,} tokens of text, {self.model}"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How much is told of every feature."""

    examples: CountFrom0 = 8
    """Its strongest moments."""
    around: CountFrom0 = 12
    """Tokens shown on either side of a moment."""
    top: CountFrom0 = 10
    """Tokens that it promotes, and suppresses."""
    lowest: bool = False
    """Look at the most negative values instead."""
    controls: CountFrom0 = 8
    """Random features of the same site and length beside each."""
    seed: Seed = 0
    """Of the random features."""


def feature_examples(
    model: Model,
    documents: Documents,
    features: Sequence[Feature],
    options: FeatureOptions = FeatureOptions(),
    *,
    sample: Sample = Sample(),
    progress: Callable[[int], None] | None = None,
) -> Features:
    """The strongest moments of features in a sample of text, and the tokens that they promote.

    ``progress`` is called with the tokens looked at. Raises ``UserError`` for no features and text without tokens.
    """
    check_ranges(options)
    if not features:
        raise UserError(f"no feature was given: name at least one, as {FORMS}")
    sign = -1.0 if options.lowest else 1.0
    rng = np.random.default_rng([options.seed, 5])
    vectors = [sign * np.stack([one.reads, *(one.random(rng) for _ in range(options.controls))]) for one in features]
    sites = tuple(dict.fromkeys(one.site for one in features))
    by_site = {
        site: np.concatenate([v for one, v in zip(features, vectors, strict=True) if one.site == site])
        for site in sites
    }
    texts, bos = rows_of(model, documents, rows=sample.rows, context=sample.context)
    best: list[dict] = [{} for _ in features]
    sums = {site: np.zeros((2, len(rows))) for site, rows in by_site.items()}
    largest = {site: np.full(len(rows), -np.inf) for site, rows in by_site.items()}
    detail, seen, counted = Detail(snippets=options.examples, around=options.around), 0, dict.fromkeys(sites, 0)
    while seen < sample.tokens:
        ids, mask, _ = texts.next()
        states = capture(model, ids, list(sites), mask)
        for site in sites:
            x = states[site].reshape(*ids.shape, -1)
            keep = usable(x, jnp.asarray(ids), jnp.asarray(mask), bos)
            values, total, squares, top, count = to_host(
                _values(x, keep, jnp.asarray(by_site[site], jnp.float32), every=1 + options.controls)
            )
            sums[site] += total, squares
            largest[site] = np.maximum(largest[site], top)
            counted[site] += int(count)
            for i, one in enumerate(features):
                if one.site == site:
                    own = _column(features, i, 0)
                    keep_strongest(best[i], ids, mask, values[:, :, own], detail, least=-np.inf)
        if not counted[sites[0]]:
            raise UserError(f"the text holds no usable activation at {sites[0]}")
        seen = min(counted.values())
        if progress is not None:
            progress(seen)
    reports = []
    for i, one in enumerate(features):
        at, count = _column(features, i, options.controls), counted[one.site]
        mean = sums[one.site][0] / count
        deviation = np.sqrt(np.maximum(sums[one.site][1] / count - mean**2, 0))
        beside = slice(at + 1, at + 1 + options.controls)
        z = (largest[one.site] - mean) / np.where(deviation > 0, deviation, 1)
        reports.append(
            FeatureReport(
                name=("-" if options.lowest else "") + one.name, site=one.site, mean=float(mean[at]),
                deviation=float(deviation[at]), largest=float(largest[one.site][at]),
                control=float(z[beside].mean()) if options.controls else float("nan"),
                examples=_examples(model, best[i]), **_words(model, one, options),
            )
        )  # fmt: skip
    return Features(model=model.name, tokens=seen, controls=options.controls, features=tuple(reports))


def _column(features: Sequence[Feature], number: int, controls: int) -> int:
    """Where a feature stands among the vectors of its site."""
    return (1 + controls) * sum(one.site == features[number].site for one in features[:number])


@partial(jax.jit, static_argnames="every")
def _values(
    x: Float[Array, "B T W"], keep: Bool[Array, "B T"], vectors: Float[Array, "S W"], *, every: int
) -> tuple[Float[Array, "B T F"], Float[Array, " S"], Float[Array, " S"], Float[Array, " S"], Array]:
    """Values of one in ``every`` vectors (-inf where they do not count), and of all their sums, sums of squares and the
    largest; how many tokens count."""
    found = jnp.einsum("btw,sw->bts", x.astype(jnp.float32), vectors, precision=jax.lax.Precision.HIGHEST)
    here = jnp.where(keep[..., None], found, 0.0)
    shown = jnp.where(keep[..., None], found, -jnp.inf)
    return shown[..., ::every], here.sum((0, 1)), jnp.square(here).sum((0, 1)), shown.max((0, 1)), keep.sum()


def _examples(model: Model, best: dict) -> tuple[Example, ...]:
    found = []
    for ids, (_, values, peak) in sorted(best.items(), key=lambda moment: -moment[1][0]):
        shown = np.where(np.isfinite(values), values, 0.0)
        tokens = tuple(model.tokenizer.decode([token]) for token in ids)
        found.append(Example(tokens=tokens, values=tuple(float(v) for v in shown), peak=int(peak)))
    return tuple(found)


def _words(model: Model, feature: Feature, options: FeatureOptions) -> dict[str, tuple[str, ...]]:
    if feature.writes is None or not options.top:
        return {"promotes": (), "suppresses": ()}
    words = read_words(model, feature.writes[None], top=options.top)
    up, down = words.lens[0], words.lens_against[0]
    return {"promotes": down, "suppresses": up} if options.lowest else {"promotes": up, "suppresses": down}
