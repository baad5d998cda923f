"""The index page of all latents: escaped, self-contained, small and quick at 65,536 rows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer.explain.detection import DetectionResult, Score
from jaxsteer.explain.explanations import Explanations
from jaxsteer.explain.judged_detection import LabelScore, LabelScores
from jaxsteer.explain.labels import Label, Labels
from jaxsteer.explain.pipeline import TABLE, Explained
from jaxsteer.explain.result import ExplainResult
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.report import write_report
from jaxsteer.report.explain_page import SHOWN, explained_page
from jaxsteer.runs.files import write_json

HOSTILE = '</script><script>alert(1)</script>"&'
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


def explained(latents: int, words: int = 5000, top: int = 50) -> Explained:
    """Words at random; latent 7 is that of the word that no other has, and has a label."""
    rng = np.random.default_rng(0)
    names = [f"word{chr(97 + i % 26)}{i}" for i in range(words - 1)] + ["flattery"]
    names[0] = HOSTILE
    told = rng.integers(0, words - 1, (latents, top)).astype(np.int32)
    told[7, 2], told[3, 0] = words - 1, 0
    table = Explanations(
        words=told, scores=np.ones(told.shape, np.float32), information=rng.random(latents).astype(np.float32),
        vocabulary=Vocabulary(words=tuple(names), tokens=tuple((i,) for i in range(words)), source="given"),
        model=HOSTILE, fingerprint="f", sae="s", digest="d", site="blocks.1.hook_resid_post", side="decoder",
        posterior="bayes", temperature=1.0,
    )  # fmt: skip
    kinds = ("mutual information", "random words", "another latent's")
    detection = DetectionResult(
        contexts=10, width=8, latents=latents - 1, rare=1, silent=1,
        scores=tuple(Score(words=kind, auroc=0.5) for kind in kinds),
        each={str(i): float(value) for i, value in enumerate(rng.random(latents)) if i != 5},
    )  # fmt: skip
    labels = Labels(
        writer=HOSTILE, based="words", prompts={}, labels=(Label(latent=7, label=HOSTILE),), unread=0, nothing=0
    )
    score = LabelScores(
        kind="fuzzing", writer="w", prompt="", scores=(LabelScore(latent=7, accuracy=0.75, f1=0.5, read=9),), unread=0
    )
    result = ExplainResult.of(table, uses=(), detection=detection, labels=labels, scores=(score,))
    return Explained(table=table, result=result)


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(text))


def test_every_latent_stands_in_the_page_and_nothing_from_files_is_markup() -> None:
    found = explained(300)
    page = explained_page(found)
    data = data_of(page)
    assert page.count("alert(1)</script>") == 0 and not re.search(
        r"(src|href|@import|url\()=?", page.split("<body>")[1]
    )
    assert len(data["of"]) == 300 * SHOWN == 300 * data["k"] and len(data["nats"]) == 300
    for latent in (0, 3, 7, 299):
        words = [data["words"][i] for i in data["of"][latent * SHOWN : (latent + 1) * SHOWN]]
        assert words == list(found.table.of(latent, SHOWN))
        assert data["nats"][latent] == pytest.approx(found.table.information[latent], abs=6e-4)
    assert data["auroc"][5] is None and data["labels"] == {"7": HOSTILE} and data["scores"] == {"7": [None, 0.75, None]}
    best = int(np.argmax(found.table.information))
    assert f"<td>{best}</td>" in page  # without a script, too


def test_the_page_of_a_run_is_written(tmp_path: Path) -> None:
    found = explained(40)
    found.table.save(tmp_path / TABLE)
    write_json(tmp_path / "metrics.json", found.result.to_json())
    write_json(tmp_path / "config.json", {"kind": "explain", "sae": ["s", "d"]})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert data_of(page) == data_of(explained_page(found))


def test_a_page_of_65536_latents_is_small() -> None:
    assert len(explained_page(explained(1 << 16)).encode()) < 6 << 20


@pytest.mark.browser
@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_65536_latents_are_searched_at_once(tmp_path: Path) -> None:
    """In a browser: the latent is found by its word, by its number and by its label; rows are drawn as needed."""
    path = tmp_path / "page.html"
    path.write_text(explained_page(explained(1 << 16)), encoding="utf-8")

    def opened(query: str) -> tuple[list[str], str, float]:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"{path.as_uri()}#{query}"]
        page = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
        (rows,) = re.findall(r'<table id="latents">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
        (ms, said) = re.findall(r'id="said"[^>]*data-ms="([\d.]+)"[^>]*>(.*?)</span>', page)[0]
        return re.findall(r"<tr><td>(\d+)</td>", rows), html.unescape(said), float(ms)

    rows, said, ms = opened("")
    assert len(rows) == 100 and said == "65,536 of 65,536 latents"
    for query in ("flattery", "FLATT", "flattery%207", "alert(1)%20flattery"):
        rows, said, ms = opened(query)
        assert rows == ["7"] and said == "1 of 65,536 latents"
        print(f"{query}: {ms} ms")
        assert ms < 500
    assert opened("65535%20word")[0] == ["65535"]
    assert opened("no%20such%20word")[0] == []
