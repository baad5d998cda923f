"""Latents for people: their strongest moments as text for the terminal and as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.display import visible
from jaxsteer.files import write_text
from jaxsteer.report.templates import template
from jaxsteer.sae.exploration import Exploration, LatentReport, Snippet


def latents_text(found: Exploration) -> str:
    """Every latent with its snippets; the strongest token stands in ``>> <<``, other active ones in ``[ ]``."""
    return "\n\n".join(_latent_text(latent) for latent in found.latents)


def _latent_text(latent: LatentReport) -> str:
    lines = [f"latent {latent.latent}: active at {100 * latent.density:.3g} % of tokens, at most {latent.largest:.4g}"]
    if latent.promotes:
        lines.append(f"  promotes {'  '.join(visible(token) for token in latent.promotes)}")
    lines += [f"  {snippet.activations[snippet.peak]:8.4g}  {_marked(snippet)}" for snippet in latent.snippets]
    return "\n".join(lines if latent.snippets else [*lines, "  never active here"])


def _marked(snippet: Snippet) -> str:
    parts = []
    for i, (token, value) in enumerate(zip(snippet.tokens, snippet.activations, strict=True)):
        left, right = (">>", "<<") if i == snippet.peak else ("[", "]") if value else ("", "")
        parts.append(f"{left}{visible(token)}{right}")
    return "".join(parts)


def latents_page(found: Exploration) -> str:
    """The page as HTML. Texts of tokens are escaped; it needs no network, no script and no other file."""
    return template("latents").render(found=found, shade=_shade)


def write_latents(found: Exploration, path: str | Path) -> Path:
    """Write the page, whole or not at all, and return its path."""
    write_text(path, latents_page(found))
    return Path(path)


def _shade(value: float, largest: float) -> str:
    """Opacity of a token's colour: 0 where the latent is off, at least a tenth where it is active."""
    return f"{0.1 + 0.8 * max(0.0, min(1.0, value / largest)):.2f}" if value > 0 and largest > 0 else "0"
