"""The page of latents: escaped, self-contained, and the same facts as the text."""

from __future__ import annotations

import re
from pathlib import Path

from jaxsteer.explain.result import Described
from jaxsteer.report.latents import latents_page, latents_text, write_latents
from jaxsteer.sae.exploration import Exploration, LatentReport, Near, Snippet

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
            suppresses=(HOSTILE[2],),
            sampled=(Snippet(tokens=(" weak", HOSTILE[0]), activations=(0.5, 0.0), peak=0),),
            histogram=(3, 0, 1),
            near=(Near(latent=55, cosine=0.5, together=0.25), Near(latent=9, cosine=0.25, together=0.0)),
        ),
        LatentReport(latent=55, density=0.0, largest=0.0, snippets=(), promotes=()),
    ),
)


def test_everything_on_the_page_is_escaped(tmp_path: Path):
    page = latents_page(FOUND)
    assert not re.search(r"<(script|img|link|iframe)", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page and "\\x1b[31m\\u202eb" in page
    links = re.sub(r'href="#latent-55"', "", re.sub(r"&#34;&gt;&lt;img src=x", "", page))
    assert not re.search(r"(src|href|@import|url\()", links)
    path = write_latents(FOUND, tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == page


def test_shading_follows_the_latent():
    page = latents_page(FOUND)
    opacities = re.findall(r"rgba\(var\(--hot\), ([\d.]+)\)", page)
    assert opacities == ["0", "0.90", "0.30", "0.20", "0"]
    assert page.count('class="peak"') == 2 and "Never active in this text." in page


def test_text_marks_the_strongest_token():
    text = latents_text(FOUND)
    assert "latent 12: active at 1.5 % of tokens, at most 4" in text
    assert ">>a\\x1b[31m\\u202eb<<" in text and f"[{HOSTILE[2]}]" in text
    assert "latent 55" in text and "never active here" in text


def test_meanings_stand_beside_what_was_seen():
    means = Described(
        latent=12, words=(HOSTILE[0], "sea"), information=1.25, auroc=0.81, label=HOSTILE[2], support=0.75,
        group="calm", scores={"detection": 0.9, "simulation": 0.4},
    )  # fmt: skip
    page = latents_page(FOUND, {12: means})
    assert not re.search(r"<(script|img|link|iframe)", page)
    text = " ".join(page.split())
    assert "AUROC of 0.81 (chance: 0.5); detection of the label 0.90 (chance: 0.5);" in text
    assert "simulation of the label 0.40 (chance: 0)" in text
    assert "supported by votes: 0.75" in text and "(calm)" in text and "<code>sea</code>" in text
    heights = [float(h) for h in re.findall(r'<rect[^>]*height="([\d.]+)"', page)]
    assert heights == [40.0, 0.0, 13.3]
    assert '<a href="#latent-55">55</a> (0.50; 25.0 %)' in text and "9 (0.25; 0.0 %)" in text
    said = latents_text(FOUND, {12: means})
    assert "words    <script>alert(1)</script> sea" in said and "near     55 (0.50)  9 (0.25)" in said
