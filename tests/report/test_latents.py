"""The page of latents: escaped, self-contained, and the same facts as the text."""

from __future__ import annotations

import re
from pathlib import Path

from jaxsteer.report.latents import latents_page, latents_text, write_latents
from jaxsteer.sae.exploration import Exploration, LatentReport, Snippet

HOSTILE = ("<script>alert(1)</script>", "a\x1b[31m\u202eb", '"><img src=x onerror=alert(1)>')
FOUND = Exploration(
    sae=HOSTILE[0],
    model=HOSTILE[2],
    site="blocks.1.hook_resid_post",
    tokens=1234,
    latents=(
        LatentReport(
            latent=12,
            density=0.015,
            largest=4.0,
            snippets=(Snippet(tokens=HOSTILE, activations=(0.0, 4.0, 1.0), peak=1),),
            promotes=(HOSTILE[0], " yes"),
        ),
        LatentReport(latent=55, density=0.0, largest=0.0, snippets=(), promotes=()),
    ),
)


def test_everything_on_the_page_is_escaped(tmp_path: Path):
    page = latents_page(FOUND)
    assert not re.search(r"<(script|img|link|iframe)", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page and "\\x1b[31m\\u202eb" in page
    assert not re.search(r"(src|href|@import|url\()", re.sub(r"&#34;&gt;&lt;img src=x", "", page))
    path = write_latents(FOUND, tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == page


def test_shading_follows_the_latent():
    page = latents_page(FOUND)
    opacities = re.findall(r"rgba\(var\(--hot\), ([\d.]+)\)", page)
    assert opacities == ["0", "0.90", "0.30"]
    assert page.count('class="peak"') == 1 and "Never active in this text." in page


def test_text_marks_the_strongest_token():
    text = latents_text(FOUND)
    assert "latent 12: active at 1.5 % of tokens, at most 4" in text
    assert ">>a\\x1b[31m\\u202eb<<" in text and f"[{HOSTILE[2]}]" in text
    assert "latent 55" in text and "never active here" in text
