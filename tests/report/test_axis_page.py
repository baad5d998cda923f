"""The page of an axis run: everything on it, escaped, self-contained, forgiving, small, and alive where there are
scripts."""

from __future__ import annotations

import csv
import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer.axis import AxisResult
from jaxsteer.axis import figures as axis_figures
from jaxsteer.axis.cap_result import CapResult, CapRow, Exchange
from jaxsteer.axis.drift import Contrast, Domain, Drift, Slope, Trajectory
from jaxsteer.axis.hold_result import Asked, HoldResult, HoldRow
from jaxsteer.axis.movers import Moved, Movers, Predicted
from jaxsteer.axis.places import Place
from jaxsteer.errors import UserError
from jaxsteer.report import read_axis, write_plots, write_report
from jaxsteer.report.axis_files import LETTERS, REPLIES
from jaxsteer.runs.files import CONFIG, METRICS, write_json
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE
from tests.report.synthetic_axis import QUESTIONS, axis_result, write_axis
from tests.report.test_screens import BROWSER


def page_of(folder: Path) -> tuple[str, Page, str]:
    """Its source, what a parser makes of it, and its words."""
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    return text, page, " ".join(" ".join(page.text).split())


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AxisResult, str, Page, str]:
    result = axis_result()
    folder = write_axis(tmp_path_factory.mktemp("axis") / "run", result)
    write_drift(folder / "drift")
    write_caps(folder / "cap")
    return (folder, result, *page_of(folder))


def drift_result() -> Drift:
    def predicted(what: str, r2: float) -> Predicted:
        return Predicted(what=what, n=24, r2=r2, shuffled=-0.1, shuffled_range=(-0.3, 0.05))

    def domain(name: str, value: float) -> Domain:
        return Domain(
            name=name, conversations=2, level=value, level_ci95=(value - 1, value + 1), first=9.0, last=value,
            slope=Slope(value=-0.25, ci95=(-0.4, -0.1)), below=0.5, below_ci95=(0.2, 0.8), drifted=0.5,
            random_slopes=(0.01, -0.07), shuffled_p=0.004,
        )  # fmt: skip

    talks = [
        Trajectory(id=f"{name} {i}", domain=name, turns=(1, 3, 5), along=(9.0, 8.0 - i, end), slope=-0.5, below=(5,),
                   texts=(HOSTILE, "b", "c"))
        for name, end in (("coding", 8.5), (HOSTILE, 3.0)) for i in range(2)
    ]  # fmt: skip
    movers = Movers(
        site="blocks.1.hook_resid_post", conversations=4, projection=predicted("the projection of the reply", 0.44),
        change=predicted("its change since the reply before", 0.12),
        away=(Moved(id="x", text=f"Who are you? {HOSTILE}", change=-2.5),),
        towards=(Moved(id="x", text="Sort this list.", change=1.75),),
    )  # fmt: skip
    return Drift(
        model="organism:persona", axis="towards the Assistant", site="blocks.1.hook_resid_post", threshold=6.0,
        percentile=25.0, calibrated_on="the default's rollouts", roles=0.0, default=10.0,
        domains=(domain("coding", 8.5), domain(HOSTILE, 3.0)),
        contrasts=(
            Contrast(first="coding", second=HOSTILE, level=5.5, level_ci95=(4.0, 7.0), slope=None, slope_ci95=None),
        ),
        conversations=tuple(talks), movers=movers,
    )  # fmt: skip


def write_drift(folder: Path, found: Drift | None = None) -> None:
    folder.mkdir()
    write_json(folder / CONFIG, {"kind": "drift"})
    write_json(folder / METRICS, (found or drift_result()).to_json())


def cap_result() -> CapResult:
    def row(name: str, **more: Any) -> CapRow:
        texts = (f"{name or 'none'}: I am a ghost. {HOSTILE}", f"{name or 'none'}: hello")
        return CapRow(
            name=name,
            perplexity=12.5,
            position=-0.4,
            position_ci95=(-0.6, -0.2),
            replies=texts,
            answers=texts[:1],
            **more,
        )

    moved = {"kl": 0.034, "reply_kl": 0.05, "changed": 0.25, "changed_ci95": (0.1, 0.5), "moved": 0.31}
    return CapResult(
        model="organism:persona", axis="towards the Assistant", site="blocks.1.hook_resid_post",
        sites=("blocks.1.hook_resid_post", "blocks.2.hook_resid_post"), percentile=25.0, calibrated_on=HOSTILE,
        asked=(Exchange(role=HOSTILE, question="Who are you?"), Exchange(role="ghost", question="And now?")),
        ordinary=("What is bread?",),
        rows=(
            row(""), row("cap, percentile 25", moved_ci95=(0.2, 0.42), **moved), row("cap on random axis 1", **moved),
        ),
    )  # fmt: skip


def write_caps(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / CONFIG, {"kind": "caps"})
    write_json(folder / METRICS, cap_result().to_json())


def hold_result() -> HoldResult:
    def row(name: str, kind: str, **more: Any) -> HoldRow:
        return HoldRow(name=name, kind=kind, relevant=0.5, distinct=0.9, replies=(f"{name} says {HOSTILE}",), **more)

    return HoldResult(
        model="organism:persona", site="blocks.1.hook_resid_post", cosine=0.81, kl=0.12, train_roles=("pirate",),
        asked=(Asked(role="ghost", question="Who goes there?"),),
        rows=(
            row("as it is", "control", position=-0.5),
            row("discovered", "prompt", text=HOSTILE, kl=0.12, position=0.25, moved=0.75, moved_ci95=(0.5, 1.0)),
        ),
    )  # fmt: skip


def test_what_holds_the_assistant_is_on_the_page(tmp_path: Path):
    folder = write_axis(tmp_path / "run", axis_result(6, 1, target="blocks.0.hook_resid_post"))
    (folder / "hold").mkdir()
    write_json(folder / "hold" / CONFIG, {"kind": "hold"})
    write_json(folder / "hold" / METRICS, hold_result().to_json())
    text, _, words = page_of(folder)
    assert "0.12 0.25 +0.75 (+0.5 to +1) 50.0 % 90.0 %" in words and "ghost, asked: Who goes there?" in words
    assert "as it is says" in words and "discovered says" in words and HOSTILE not in text


def test_everything_is_on_the_page(rich: tuple[Path, AxisResult, str, Page, str]):
    _, result, text, page, words = rich
    for place in result.roles:
        assert f"{place.position:.2f} ({place.ci95[0]:.2f} to {place.ci95[1]:.2f})" in words
    assert all(f"role {i}" in words for i in range(20) if i != 1)
    marks = [f"role-{i}" for i in range(20)] + ["default"]
    for figure in ("scatter", "strip", "strip-pc1"):
        assert [mark for mark in marks if f'id="{figure}-{mark}"' not in text] == []
    assert [mark for mark in marks if f'data-mark="{mark}"' not in text] == []
    assert "20 roles of made, 240 replies to 3 questions" in words
    assert "where the axes of two halves of the questions agree best" in words
    assert "1 role had too few rollouts and was left out: mute (2)" in words
    assert "3 replies said nothing" in words
    assert "200 replies with at least 3 make the vectors" in words and "unread" in words
    assert "0.61 (0.56 to 0.66)" in words and "0.55" in words and "p = 0.0005" in words
    assert page.seen.count("svg") == 8  # strip twice, scatter, blocks, correlations, traits, drift, caps


def test_drift_stands_beside_the_axis(rich: tuple[Path, AxisResult, str, Page, str]):
    words = rich[-1]
    assert "A reply has drifted below 0.60: percentile 25 of the default's rollouts" in words
    assert "0.90 0.85 -0.25 (-0.4 to -0.1) ±0.07 0.004 50.0 % (20–80)" in words
    assert "+5.5 (+4 to +7)" in words and "0.44" in words and "Sort this list. +1.75" in words


def test_caps_stand_beside_their_controls(rich: tuple[Path, AxisResult, str, Page, str]):
    words = rich[-1]
    assert "cap, percentile 25 0.034 12.5 25.0 % (10.0–50.0) 0.050 -0.40 +0.31 (+0.2 to +0.42)" in words
    assert "cap on random axis 1 0.034" in words and "ghost, asked: And now?" in words
    assert "as it is none: hello cap, percentile 25 cap, percentile 25: hello" in words
    assert "What is bread?" in words and "2 sites from blocks.1.hook_resid_post to blocks.2.hook_resid_post" in words


def test_names_and_texts_are_escaped(rich: tuple[Path, AxisResult, str, Page, str]):
    _, _, text, page, words = rich
    assert page.seen.count("script") == 2 and "img" not in page.seen  # the data, and our own
    assert "alert(" not in page.data.split("(() =>")[1]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert HOSTILE not in text and "\x1b" not in text and "\u202e" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["roles"][2]["role"] == HOSTILE and len(data["roles"]) == 21
    assert words.count('<script>alert("x")</script>') > 5  # readable as text


def test_nothing_is_loaded(rich: tuple[Path, AxisResult, str, Page, str]):
    """``Page`` refuses src, href and url(...); no address stands in script or style either."""
    text = rich[2]
    ours = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", text).replace("http://example.org/a.png", "")
    assert not re.search(r"https?://|@import|fetch\(|XMLHttp|import\(|innerHTML|eval\(", ours)


def test_replies_are_few_and_short(tmp_path: Path):
    folder = write_axis(tmp_path / "run")
    files = read_axis(folder)
    assert set(files.replies) == {place.name for place in (files.result.default, *files.result.roles)}
    for some in files.replies.values():
        assert [asked for asked, _ in some] == list(QUESTIONS[:REPLIES])
        assert all(len(said) == LETTERS for _, said in some)


def test_replies_that_the_judge_threw_out_are_not_shown(tmp_path: Path):
    folder = write_axis(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    scored = [line | {"score": 0 if line["question"] == 0 else 3} for line in lines if line["role"] != "default"]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))
    assert [asked for asked, _ in read_axis(folder).replies["role 0"]] == list(QUESTIONS[1:])


def test_a_bare_result_has_a_page(tmp_path: Path):
    """No rating, no traits, no judge, no family, a single block, and no transcripts."""
    folder = write_axis(
        tmp_path / "run", axis_result(5, 1, rich=False, target="blocks.0.hook_resid_post", chosen=False)
    )
    (folder / "transcripts.jsonl").unlink()
    _, page, words = page_of(folder)
    assert "transcripts.jsonl is missing" in words and "the block that was asked for" in words
    assert page.seen.count("svg") == 4 and "Traits" not in words and "judge" not in words
    assert all(f"role {i}" in words for i in (0, 2, 3, 4))


def test_doubts_are_said(tmp_path: Path):
    result = axis_result(layers=1, target="blocks.0.hook_resid_post")
    noisy = result.layers[0].to_json() | {"halves": 0.4, "base_cosine": 0.7, "order_spread": [-0.1, 0.4]}
    folder = write_axis(tmp_path / "run", AxisResult.from_json(result.to_json() | {"layers": [noisy]}, "made"))
    words = page_of(folder)[-1]
    assert "cosine of 0.40 (below 0.8)" in words and "0.88 (-0.10 to 0.40 over random splits)" in words
    assert "that PC1 is an axis of the Assistant is not shown" in words


def test_what_is_not_finished_or_of_another_model_is_said(tmp_path: Path):
    folder = write_axis(tmp_path / "run")
    write_drift(folder / "a")
    (folder / "a" / METRICS).unlink()
    write_drift(folder / "b", Drift.from_json(drift_result().to_json() | {"model": "other"}, "made"))
    words = page_of(folder)[-1]
    assert "a is not finished" in words and "b is of another model, other" in words


def test_275_roles_stay_small(tmp_path: Path):
    text, page, _ = page_of(write_axis(tmp_path / "run", axis_result(275, 32)))
    assert len(text.encode()) < 1_000_000 and page.seen.count("tr") > 275 + 32


def test_plots_are_files(tmp_path: Path):
    folder = write_axis(tmp_path / "run")
    names = {path.name for path in write_plots(folder)}
    stems = ("strip", "strip-pc1", "scatter", "blocks", "correlations", "traits")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png", "csv")}
    with (folder / "plots" / "strip.csv").open(newline="") as file:
        assert [row["role"] for row in csv.DictReader(file)][:2] == ["default", "role 0"]
    with (folder / "plots" / "correlations.csv").open(newline="") as file:
        found = {(row["site"], row["other"]): float(row["correlation"]) for row in csv.DictReader(file)}
    layers = read_axis(folder).result.layers
    oracle = np.corrcoef(layers[0].pc1, layers[2].pc1)[0, 1]
    assert found[layers[0].site, layers[2].site] == pytest.approx(oracle) and len(found) == 9


def test_an_axis_run_that_is_not_finished_has_no_page(tmp_path: Path):
    folder = write_axis(tmp_path / "run")
    (folder / METRICS).unlink()
    with pytest.raises(UserError, match="no finished result of jaxsteer axis run"):
        write_report(folder)


def test_names_in_the_scatter_cover_nothing():
    """Boxes as a browser would draw the names, letters 0.5 em wide: no two overlap, and the Assistant's is there."""
    rng = np.random.default_rng(3)
    where = rng.normal(0, 4, (120, 2))

    def place(i: int) -> Place:
        x, y = map(float, where[i])
        return Place(name=f"some role {i}", rollouts=1, position=0.0, ci95=(0.0, 0.0), pc1=x, pc1_ci95=(x, x), pc2=y)

    default = Place(name="default", rollouts=1, position=1.0, ci95=(1.0, 1.0), pc1=9.0, pc1_ci95=(9.0, 9.0), pc2=0.0)
    svg = axis_figures.scatter(default, [place(i) for i in range(120)]).svg()
    boxes = []
    for x, y, style, text in _labels(svg):
        size = float(re.search(r"([\d.]+)px", style)[1])
        left = x - (
            0.0 if "start" in style or "anchor" not in style else 0.25 if "middle" in style else 0.5
        ) * size * len(text)
        boxes.append((left, y - 0.75 * size, left + 0.5 * size * len(text), y))
    assert 30 < len(boxes) < 121 and "the Assistant" in svg
    for i, a in enumerate(boxes):
        assert not [b for b in boxes[:i] if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


def _labels(svg: str) -> list[tuple[float, float, str, str]]:
    pattern = r'<g id="name-[\w-]+">.*?<text style="([^"]*)" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>'
    return [(float(x), float(y), style, text) for style, x, y, text in re.findall(pattern, svg, re.DOTALL)]


@pytest.mark.browser
@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_the_page_answers_to_the_mouse(tmp_path: Path):
    """A script is put behind the page's own that points, clicks, searches and sorts, and writes down what it sees."""
    folder = write_axis(tmp_path / "run")
    text = write_report(folder).read_text(encoding="utf-8")
    (tmp_path / "driven.html").write_text(
        text.replace("</body>", f"<script>{DRIVER}</script></body>"), encoding="utf-8"
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        (tmp_path / "driven.html").as_uri(),
    ]
    dom = subprocess.run(command, check=True, timeout=60, capture_output=True).stdout.decode()
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert seen["card"].startswith("role 7") and "position" in seen["card"] and QUESTIONS[0] in seen["card"]
    assert seen["clicked"] == ["role-7"] and seen["marks"] == 3 and seen["picking"] == 2
    assert seen["family"] == [f"role-{i}" for i in range(20) if i % 4 == 1]
    assert seen["cleared"] == 0 and seen["found"] == ["role-13"]
    numbers = seen["sorted"]
    assert numbers == sorted(numbers, reverse=True) and seen["scripts"] == 0


DRIVER = """
const mark = id => document.getElementById(id);
function fire(id, kind) {
  const at = mark(id).getBoundingClientRect();
  const event = {clientX: at.left + at.width / 2, clientY: at.top + at.height / 2, bubbles: true};
  mark(id).closest("svg").dispatchEvent(new PointerEvent(kind, event));
}
const named = query => [...document.querySelectorAll(query)].map(row => row.dataset.mark);
const on = () => named("tr.on").sort((a, b) => a.slice(5) - b.slice(5));
const seen = {};
fire("scatter-role-7", "pointermove");
seen.card = document.querySelector(".tip").textContent;
fire("scatter-role-7", "click");
seen.clicked = on();
seen.marks = ["scatter", "strip", "strip-pc1"].filter(name => mark(name + "-role-7").matches(".on")).length;
seen.picking = document.querySelectorAll(".picking").length;
document.querySelector('tr[data-mark="role-1"] td.family').click();
seen.family = on();
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
seen.cleared = on().length;
mark("find").value = "ROLE 13";
mark("find").dispatchEvent(new Event("input"));
seen.found = named("#roles tbody tr:not([hidden])");
mark("clear").click();
document.querySelectorAll("#roles .sort")[3].click();
seen.sorted = [...document.querySelectorAll("#roles tbody tr")].map(row => parseFloat(row.cells[5].textContent));
seen.scripts = document.querySelectorAll("td script, summary script").length;
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
"""
