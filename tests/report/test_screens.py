"""The page in a real browser: screenshots at two widths, light and dark. ``make screenshots`` keeps them to look at."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from jaxsteer.report import write_report
from tests.report.synthetic import write_many, write_run, write_table, write_words
from tests.report.synthetic_axis import write_axis

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
PAGE = {"light": (255, 255, 255), "dark": (20, 23, 28)}

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not BROWSER, reason="no Chromium here")]


def screenshot(page: Path, out: Path, width: int, scheme: str) -> np.ndarray:
    """(height, width, 3) uint8."""
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *dark]
    command += [f"--window-size={width},3600", f"--screenshot={out}", page.as_uri()]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    return np.round(255 * imread(out)[..., :3]).astype(np.uint8)


PAGES = {"report": write_run, "many": write_many, "table": write_table, "words": write_words, "axis": write_axis}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_fills_its_window(tmp_path: Path, name: str, width: int, scheme: str):
    page = write_report(PAGES[name](tmp_path / "run"))
    kept = Path(os.environ.get("JAXSTEER_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    seen = screenshot(page, kept / f"{name}-{width}-{scheme}.png", width, scheme)
    assert seen.shape[1] == width
    background = np.asarray(PAGE[scheme])
    assert (seen[0, 0] == background).all()
    drawn = (np.abs(seen.astype(int) - background).sum(-1) > 30).mean(1) > 0
    assert drawn[:3000].mean() > 0.3  # rows of pixels with something on them
    margin = seen[:, -8:]  # nothing of the page reaches into its right margin
    assert (np.abs(margin.astype(int) - background).sum(-1) <= 30).all()
