"""Latents for people: their strongest moments as text for the terminal and as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxsteer.display import visible
from jaxsteer.explain.result import Described
from jaxsteer.files import write_text
from jaxsteer.report.templates import template
from jaxsteer.sae.exploration import Exploration, LatentReport, Snippet


def latents_text(found: Exploration, meanings: Mapping[int, Described] | None = None) -> str:
    """Every latent with its snippets; the strongest token stands in ``>> <<``, other active ones in ``[ ]``.

    ``meanings`` are explanations by latent."""
    return "\n\n".join(_latent_text(latent, (meanings or {}).get(latent.latent)) for latent in found.latents)


def _latent_text(latent: LatentReport, means: Described | None) -> str:
    lines = [f"latent {latent.latent}: active at {100 * latent.density:.3g} % of tokens, at most {latent.largest:.4g}"]
    if means is not None:
        lines += [f"  label    {visible(means.label)}"] if means.label else []
        lines.append(f"  words    {' '.join(map(visible, means.words))}")
    if latent.promotes:
        lines.append(f"  promotes {'  '.join(visible(token) for token in latent.promotes)}")
    if latent.suppresses:
        lines.append(f"  lowers   {'  '.join(visible(token) for token in latent.suppresses)}")
    if latent.near:
        lines.append(f"  near     {'  '.join(f'{one.latent} ({one.cosine:.2f})' for one in latent.near)}")
    lines += [f"  {snippet.activations[snippet.peak]:8.4g}  {_marked(snippet)}" for snippet in latent.snippets]
    return "\n".join(lines if latent.snippets else [*lines, "  never active here"])


def _marked(snippet: Snippet) -> str:
    parts = []
    for i, (token, value) in enumerate(zip(snippet.tokens, snippet.activations, strict=True)):
        left, right = (">>", "<<") if i == snippet.peak else ("[", "]") if value else ("", "")
        parts.append(f"{left}{visible(token)}{right}")
    return "".join(parts)


def latents_page(found: Exploration, meanings: Mapping[int, Described] | None = None) -> str:
    """The page as HTML. Texts of tokens are escaped; it needs no network, no script and no other file."""
    here = {latent.latent for latent in found.latents}
    return template("latents").render(found=found, shade=_shade, meanings=meanings or {}, here=here)


def write_latents(found: Exploration, path: str | Path, meanings: Mapping[int, Described] | None = None) -> Path:
    """Write the page, whole or not at all, and return its path."""
    write_text(path, latents_page(found, meanings))
    return Path(path)


def _shade(value: float, largest: float) -> str:
    """Opacity of a token's colour: 0 where the latent is off, at least a tenth where it is active."""
    return f"{0.1 + 0.8 * max(0.0, min(1.0, value / largest)):.2f}" if value > 0 and largest > 0 else "0"
