"""What latents respond to and what they write: their strongest moments in text, and the tokens that they promote.

Letters: B rows, T time, D width, S latents asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
    """Tokens that it promotes."""


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
    chosen = jnp.asarray(latents)
    best: list[dict[tuple[int, ...], tuple[float, np.ndarray, int]]] = [{} for _ in latents]
    active, seen, empty = np.zeros(len(latents)), 0, 0
    while seen < sample.tokens:
        ids, mask, _ = texts.next()
        x = capture(model, ids, [source.name], mask)[source.name].reshape(*ids.shape, -1)
        keep = usable(x, jnp.asarray(ids), jnp.asarray(mask), bos)
        codes, on, count = to_host(_codes(sae, x, keep, chosen))
        empty = empty + 1 if count == 0 else 0
        if empty > 64:
            raise UserError(f"{empty} batches of text in a row hold no usable activation at {source.name}.")
        active, seen = active + on, seen + int(count)
        for i in range(len(latents)):
            keep_strongest(best[i], ids, mask, codes[:, :, i], detail)
        if progress is not None:
            progress(seen)
    writes = KINDS[target.kind].stream and sae.d_out == model.config.d_model
    promoted = promoted_tokens(model, sae, list(latents), top=detail.top) if writes else [()] * len(latents)
    reports = []
    for i, latent in enumerate(latents):
        moments = sorted(best[i].items(), key=lambda moment: -moment[1][0])
        reports.append(
            LatentReport(
                latent=int(latent),
                density=float(active[i] / seen),
                largest=moments[0][1][0] if moments else 0.0,
                snippets=tuple(_snippet(model, ids, codes, peak) for ids, (_, codes, peak) in moments),
                promotes=promoted[i],
            )
        )
    return Exploration(model=model.name, site=source.name, tokens=seen, latents=tuple(reports))


@jax.jit
def _codes(
    sae: SAE, x: Float[Array, "B T D"], keep: Bool[Array, "B T"], latents: Int[Array, " S"]
) -> tuple[Float[Array, "B T S"], Float[Array, " S"], Int[Array, ""]]:
    """Latents where activations count (else 0), at how many tokens each is active, and how many tokens count."""
    codes = jnp.where(keep[..., None], encode(sae, x, latents), 0.0)
    return codes, jnp.sum(codes != 0, (0, 1), dtype=jnp.float32), keep.sum()


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
