"""What latents respond to and what they write: their strongest moments in text, and the tokens that they promote.

Letters: B rows, T time, D width, S latents asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.run import capture
from jaxsteer.models.sites import KINDS, parse_site
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE, encode
from jaxsteer.sae.harvest import rows_of, usable
from jaxsteer.sae.lens import promoted_tokens
from jaxsteer.sae.loading import check_sae
from jaxsteer.sae.texts import Documents, Sample

BINS = 20
"""Of the histogram of a latent's values."""
_KEPT = 256
"""Rows of text per latent that sampled moments are drawn from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snippet:
    """A piece of text around a strong activation of one latent."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    activations: tuple[float, ...]
    """The latent at each of them (0 where activations do not count: BOS, first token)."""
    peak: int
    """Index of the token with the largest activation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Near:
    """A neighbour of a latent."""

    latent: int
    cosine: float
    """Of the decoder rows."""
    together: float
    """Of the tokens at which the latent is active, the share at which the neighbour is; 0 where there are none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentReport:
    """One latent."""

    latent: int
    density: float
    """Share of tokens at which it is active."""
    largest: float
    """Largest activation seen."""
    snippets: tuple[Snippet, ...]
    """The strongest first; no two of the same text."""
    promotes: tuple[str, ...]
    """Tokens whose logits its decoder row raises most; empty where the SAE does not write into the stream."""
    suppresses: tuple[str, ...] = ()
    """Those that it lowers most."""
    sampled: tuple[Snippet, ...] = ()
    """Moments spread evenly over the quantiles of all rows in which it is active, the strongest first."""
    histogram: tuple[int, ...] = ()
    """Tokens at which it is active, in ``BINS`` equal steps from 0 to ``largest``."""
    near: tuple[Near, ...] = ()
    """Latents with the most similar decoder rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exploration:
    """Latents of one SAE on one text."""

    sae: str = "SAE"
    """What the SAE is called."""
    model: str
    site: str
    tokens: int
    """Activations that were looked at."""
    latents: tuple[LatentReport, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detail:
    """How much is told of every latent."""

    snippets: int = 8
    """Its strongest moments, at most one per row of text."""
    around: int = 12
    """Tokens on either side of a moment."""
    top: int = 10
    """Tokens that it promotes, and that it suppresses."""
    sampled: int = 5
    """Moments over all quantiles of its strength."""
    near: int = 8
    """Neighbours."""


def explore(
    sae: SAE,
    model: Model,
    documents: Documents,
    latents: Sequence[int],
    *,
    detail: Detail = Detail(),
    sample: Sample = Sample(),
    site: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Exploration:
    """Look at ``latents`` on a sample of the model's activations.

    Only these latents are ever computed where the architecture allows.
    Raises ``UserError`` for latents that do not exist and for an SAE that does not fit the model.
    """
    check_sae(sae, model, site)
    if not latents or min(latents) < 0 or max(latents) >= sae.n_latents:
        raise UserError(f"latents {list(latents)}: this SAE has the latents 0 to {sae.n_latents - 1}.")
    source = parse_site(site or sae.config.site_in or "", model.config.n_layers)
    target = parse_site(sae.config.site_out or source.name, model.config.n_layers)
    texts, bos = rows_of(model, documents, rows=sample.rows, context=sample.context)
    cosines, near = nearest(sae, latents, detail.near)
    chosen = jnp.asarray(np.concatenate([np.asarray(latents, np.int32)[:, None], near], 1).reshape(-1))
    best: list[dict[tuple[int, ...], tuple[float, np.ndarray, int]]] = [{} for _ in latents]
    drawn = [_Drawn(latent) for latent in latents]
    values: list[list[np.ndarray]] = [[] for _ in latents]
    both, seen, empty = np.zeros((len(latents), 1 + near.shape[1])), 0, 0
    while seen < sample.tokens:
        ids, mask, _ = texts.next()
        x = capture(model, ids, [source.name], mask)[source.name].reshape(*ids.shape, -1)
        keep = usable(x, jnp.asarray(ids), jnp.asarray(mask), bos)
        every, count = to_host(_codes(sae, x, keep, chosen))
        empty = empty + 1 if count == 0 else 0
        if empty > 64:
            raise UserError(f"{empty} batches of text in a row hold no usable activation at {source.name}.")
        every = every.reshape(*ids.shape, len(latents), -1)
        codes, seen = every[..., 0], seen + int(count)
        both += ((codes != 0)[..., None] & (every != 0)).sum((0, 1))
        for i in range(len(latents)):
            keep_strongest(best[i], ids, mask, codes[:, :, i], detail)
            drawn[i].add(ids, mask, codes[:, :, i])
            values[i].append(codes[..., i][codes[..., i] > 0])
        if progress is not None:
            progress(seen)
    writes = KINDS[target.kind].stream and sae.d_out == model.config.d_model
    promoted, suppressed = (
        promoted_tokens(model, sae, list(latents), top=detail.top, suppressed=low) if writes else [()] * len(latents)
        for low in (False, True)
    )
    reports = []
    for i, latent in enumerate(latents):
        moments = sorted(best[i].items(), key=lambda moment: -moment[1][0])
        largest = moments[0][1][0] if moments else 0.0
        counts = np.histogram(np.concatenate(values[i]), BINS, (0, largest))[0] if largest > 0 else ()
        active = both[i, 0]
        reports.append(
            LatentReport(
                latent=int(latent),
                density=float(active / seen),
                largest=largest,
                snippets=tuple(_snippet(model, ids, codes, peak) for ids, (_, codes, peak) in moments),
                promotes=promoted[i],
                suppresses=suppressed[i],
                sampled=tuple(_snippet(model, *moment) for moment in drawn[i].spread(detail)),
                histogram=tuple(int(n) for n in counts),
                near=tuple(
                    Near(latent=int(n), cosine=float(c), together=float(b / active) if active else 0.0)
                    for n, c, b in zip(near[i], cosines[i], both[i, 1:], strict=True)
                ),
            )
        )
    return Exploration(model=model.name, site=source.name, tokens=seen, latents=tuple(reports))


class _Drawn:
    """Rows in which a latent is active, drawn with equal chances from all that were seen (a reservoir)."""

    def __init__(self, latent: int) -> None:
        self.rng, self.seen = np.random.default_rng([5, latent]), 0
        self.rows: list[tuple[float, np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, mask: np.ndarray, codes: np.ndarray) -> None:
        """Take account of some rows."""
        for row in np.flatnonzero(codes.max(1) > 0):
            self.seen += 1
            at = len(self.rows) if len(self.rows) < _KEPT else int(self.rng.integers(self.seen))
            if at < _KEPT:
                length = int(mask[row].sum())
                entry = (float(codes[row].max()), ids[row, :length].copy(), codes[row, :length].copy())
                self.rows[at : at + 1] = [entry]

    def spread(self, detail: Detail) -> list[tuple[tuple[int, ...], np.ndarray, int]]:
        """Moments at even steps through the rows by their strength: (tokens, values, place of the strongest)."""
        order = sorted(self.rows, key=lambda row: -row[0])
        steps = np.unique(((np.arange(detail.sampled) + 0.5) / max(1, detail.sampled) * len(order)).astype(int))
        found = []
        for at in steps[steps < len(order)]:
            _, ids, codes = order[at]
            peak = int(codes.argmax())
            start, stop = max(0, peak - detail.around), peak + detail.around + 1
            found.append((tuple(int(i) for i in ids[start:stop]), codes[start:stop], peak - start))
        return found


def nearest(sae: SAE, latents: Sequence[int], count: int) -> tuple[Float[np.ndarray, "S n"], Int[np.ndarray, "S n"]]:
    """Cosines of decoder rows with those of their nearest other latents, the largest first, and which these are."""
    cosine, index = to_host(_nearest(sae, jnp.asarray(latents), min(count, sae.n_latents - 1)))
    return np.asarray(cosine), np.asarray(index)


@partial(jax.jit, static_argnames="count")
def _nearest(sae: SAE, latents: Int[Array, " S"], count: int) -> tuple[Float[Array, "S n"], Int[Array, "S n"]]:
    rows = sae.W_dec.astype(jnp.float32)
    units = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = units[latents] @ units.T
    own = jnp.arange(len(units)) == latents[:, None]
    values, indices = jax.lax.top_k(jnp.where(own, -jnp.inf, cosine), count)
    return values, indices


@jax.jit
def _codes(
    sae: SAE, x: Float[Array, "B T D"], keep: Bool[Array, "B T"], latents: Int[Array, " S"]
) -> tuple[Float[Array, "B T S"], Int[Array, ""]]:
    """Latents where activations count (else 0), and how many tokens count."""
    return jnp.where(keep[..., None], encode(sae, x, latents), 0.0), keep.sum()


def keep_strongest(
    best: dict[tuple[int, ...], tuple[float, np.ndarray, int]],
    ids: np.ndarray,
    mask: np.ndarray,
    codes: np.ndarray,
    detail: Detail,
    least: float = 0.0,
) -> None:
    """Put the strongest moments of some rows among the best so far, by text: (value, values around it, its place).

    Texts that are there already do not count, nor do values that are not above ``least``.
    """
    limit, around = detail.snippets, detail.around
    peaks = codes.argmax(1)
    values = codes[np.arange(len(codes)), peaks]
    for row in np.argsort(-values, kind="stable")[:limit]:
        value, peak = float(values[row]), int(peaks[row])
        if value <= least or (len(best) >= limit and value <= min(entry[0] for entry in best.values())):
            return
        start, stop = max(0, peak - around), min(int(mask[row].sum()), peak + around + 1)
        text = tuple(int(i) for i in ids[row, start:stop])
        if text in best:
            continue
        best[text] = value, codes[row, start:stop], peak - start
        if len(best) > limit:
            del best[min(best, key=lambda key: best[key][0])]


def _snippet(model: Model, ids: tuple[int, ...], activations: np.ndarray, peak: int) -> Snippet:
    return Snippet(
        tokens=tuple(model.tokenizer.decode([token]) for token in ids),
        activations=tuple(float(a) for a in activations),
        peak=peak,
    )
