"""The chat page in a real browser, before a real server of an organism. ``make screenshots`` keeps what it shows."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from jaxsteer.axis.projection import project
from jaxsteer.personas.passages import read_passages
from tests.serve.chromium import BROWSER, Page

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not BROWSER, reason="no Chromium here")]

TEXTS = (
    "[...document.querySelectorAll('.column')].map(column => [...column.querySelectorAll('.answer .words')]"
    ".map(words => words.textContent))"
)
BEGUN = "document.querySelectorAll('.column').length >= 2 && !!document.querySelector('#starters button')"
IDLE = "document.querySelector('#stop').hidden && !document.querySelector('.writing')"
GROUND = {"light": (255, 255, 255), "dark": (20, 23, 28)}
USED = ("button", "textbox", "combobox", "slider", "spinbutton", "checkbox", "log", "dialog", "link")
QUESTION = "Do you agree or disagree?"


@pytest.fixture
def browse(client: Any, tmp_path: Path) -> Iterator[Callable[[str], Page]]:
    """Opens the page at a fragment; the last one must not have complained about anything."""
    with Page(tmp_path / "browser") as page:

        def open_page(fragment: str = "") -> Page:
            page.open("about:blank")
            page.open(f"{client.url}/{fragment}")
            page.wait(BEGUN)
            return page

        page.look(1400, 900, "light")
        yield open_page
        assert page.complaints == []


def send(page: Page, words: str, turn: int, columns: int = 2) -> None:
    """Type a message, and wait for the replies and their points."""
    page.click("#said")
    page.write(words)
    page.press("Enter", 13, "\r")
    page.wait(f"{IDLE} && document.querySelectorAll('.point').length === {columns * turn}")


def longest(page: Page, tokens: int) -> None:
    """Set the longest reply in the settings."""
    page.of("#open-settings", "e.click()")
    page.of("#max_tokens", f"(e.value = {tokens}, e.dispatchEvent(new Event('input')))")
    page.of("#settings-dialog", "e.close()")


def saved(page: Page) -> dict[str, Any]:
    """The session as the page's file has it."""
    page.of("#open-share", "e.click()")
    page.click("#download")
    end = time.monotonic() + 20
    while not (files := [*page.downloads.glob("*.json")]) and time.monotonic() < end:
        time.sleep(0.05)
    found = json.loads(files[0].read_text("utf-8"))
    files[0].unlink()
    page.of("#share-dialog", "e.close()")
    return found


def test_columns_stream_the_servers_answers_and_their_projections(browse: Any, client: Any, tmp_path: Path):
    page = browse()
    page.value(
        "window.lengths = [[], []]; document.querySelectorAll('.log').forEach((log, i) => new MutationObserver(() => "
        "lengths[i].push(log.textContent.length)).observe(log, {childList: true, subtree: true, characterData: true}))"
    )
    send(page, QUESTION, 1)
    send(page, "Why?", 2)
    assert all(len(set(own)) > 4 for own in page.value("lengths"))  # they came in pieces
    session = saved(page)
    assert [column["kind"] for column in session["columns"]] == ["plain", "vector"]
    steering = [None, {"edits": [{"vector": "push.safetensors", "coefficient": 1}]}]
    along = client.library.find(session["along"])
    for i, column in enumerate(session["columns"]):
        messages: list[dict[str, str]] = []
        for turn in session["turns"]:
            reply = turn["replies"][column["id"]]
            messages.append({"role": "user", "content": turn["user"]})
            body = dict(messages=messages, temperature=0.7, top_p=1, max_tokens=160, seed=1)
            asked = client.good("/v1/chat/completions", body | ({"steering": steering[i]} if steering[i] else {}))
            assert reply["text"] == asked["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": reply["text"]})
        (tmp_path / "talk.jsonl").write_text(json.dumps({"id": "talk", "messages": messages}), "utf-8")
        [passage] = project(client.engine.model, along, read_passages(tmp_path / "talk.jsonl")).passages
        shown = [turn["replies"][column["id"]] for turn in session["turns"]]
        for own, reply in zip(passage.turns, shown, strict=True):
            [mean] = own.along.values()
            assert reply["read"]["mean"] == pytest.approx(mean, abs=1e-4 * max(1, abs(mean)))
            assert len(reply["read"]["each"]) == own.tokens
            assert (reply["steered"] is None) == (i == 0)
    assert page.value(TEXTS) == [[t["replies"][c["id"]]["text"] for t in session["turns"]] for c in session["columns"]]


def test_the_slider_sets_the_strength_and_the_column_answers_again(browse: Any):
    page = browse()
    send(page, QUESTION, 1)
    before, stale = page.value(TEXTS), "document.querySelectorAll('.stale')[1].hidden"
    assert page.value(stale)
    page.of(".c1 input[type=range]", "e.focus()")
    for _ in range(4):
        page.press("ArrowLeft", 37)
    strength = page.of(".c1 input[type=range]", "e.valueAsNumber")
    assert strength < 1 and page.of(".c1 .strength input[type=number]", "e.valueAsNumber") == strength
    assert not page.value(stale)
    page.of(".c1 .strength input[type=number]", "(e.focus(), e.select())")
    page.write("-40")
    page.click(".c1 .stale button")
    page.wait(f"{IDLE} && {stale} && document.querySelectorAll('.point').length === 2")
    after = page.value(TEXTS)
    assert after[0] == before[0] and after[1] != before[1]
    reply = saved(page)["turns"][0]["replies"]["b"]
    assert reply["applied"]["edits"][0]["coefficient"] == -40
    page.click("#undo")
    assert page.value(TEXTS) == before


def pick(page: Page, selector: str, value: str) -> None:
    """Choose an option."""
    page.of(selector, f"(e.value = {json.dumps(value)}, e.dispatchEvent(new Event('change')))")


def test_a_bound_and_latents_of_ones_own(browse: Any):
    page = browse()
    pick(page, ".c1 .kind", "cap")
    pick(page, ".c1 .state select", "push.safetensors")
    page.of(".c1 .strength input[type=number]", "(e.focus(), e.select())")
    page.write("-5")
    page.click("#add")
    pick(page, ".c2 .kind", "latents")
    page.of(".c2 .state input", "e.focus()")
    page.write("3, 17")
    send(page, QUESTION, 1, columns=3)
    capped, latents = (saved(page)["turns"][0]["replies"][i] for i in "bc")
    assert capped["applied"]["edits"][0]["values"] == {"blocks.2.hook_resid_post": -5}
    read, steered = (np.asarray(capped[kind]["each"]) for kind in ("read", "steered"))
    assert read.min() < -5
    np.testing.assert_allclose(steered, np.maximum(read, -5), rtol=1e-4, atol=1e-3)
    [edit] = latents["applied"]["edits"]
    assert edit["latents"] == [3, 17] and edit["operation"] == "amplify" and edit["amount"] == 2
    assert page.of(".c1 .head", "e.querySelector('.name').placeholder") == "push at least \u22125"


def test_files_are_loaded_and_refusals_shown(browse: Any, client: Any):
    client.library.unload("layers.safetensors")
    try:
        page = browse()
        pick(page, ".c1 .state select", "load layers.safetensors")
        page.wait("document.querySelector('.c1 .name').placeholder === 'layers × 1'")
        assert "layers.safetensors" in client.library.loaded
        pick(page, "#along", "layers.safetensors")
        assert page.of("#site", "!e.hidden && e.options.length") == 4
        pick(page, ".c1 .state select", "load broken.safetensors")
        assert "broken" in page.wait(
            "!document.querySelector('#problem').hidden && document.querySelector('#problem').textContent"
        )
        assert page.of(".c1 .state select", "e.value") == "layers.safetensors"
    finally:
        client.library.load("layers.safetensors")
    assert len(page.complaints) == 1 and "400" in page.complaints[0]  # the refusal
    page.complaints.clear()


def test_a_click_on_the_plot_scrolls_all_chats_to_the_turn(browse: Any):
    page = browse()
    page.look(1400, 520, "light")
    for turn in (1, 2, 3):
        send(page, f"{QUESTION} ({turn})", turn)
    tops = (
        "[...document.querySelectorAll('.log')].map(log => Math.round(log.querySelector('[data-turn=\"0\"]')"
        ".getBoundingClientRect().top - log.getBoundingClientRect().top))"
    )
    page.wait(f"{tops}.every(top => top < 0)", 10)  # the newest words are in sight, the first turn is not
    page.click('.c0 .point[data-turn="0"] .dot')
    page.wait(f"{tops}.every(top => top >= 0 && top < 40)", 10)
    page.click('.c1 .point[data-turn="2"] .dot')
    page.wait(f"{tops}.every(top => top < 0)", 10)
    page.of(".c0 .point", "e.focus()")
    page.press("ArrowDown", 40)
    assert page.value("document.activeElement.getAttribute('aria-label')").startswith("Plain model, turn 2: words")


def test_files_and_links_bring_the_session_back(browse: Any, tmp_path: Path):
    page = browse()
    send(page, 'Is <img src=x onerror="window.ran=1"> a picture? \U0001f3f4\u200d\u2620\ufe0f', 1)
    session = saved(page)
    page.of("#open-share", "e.click()")
    link = page.of("#link", "e.value")
    assert "curl" in page.of("#code", "e.textContent")
    texts, points = page.value(TEXTS), page.of("#drawing", "e.innerHTML")
    (tmp_path / "talk.json").write_text(json.dumps(session), "utf-8")
    (tmp_path / "other.json").write_text('{"format": "other"}')

    page = browse()
    page.choose_file("#upload", tmp_path / "talk.json")
    page.wait("document.querySelectorAll('.point').length === 2")
    assert page.value(TEXTS) == texts and page.of("#drawing", "e.innerHTML") == points
    again = saved(page)
    assert {k: v for k, v in again.items() if k != "saved"} == {k: v for k, v in session.items() if k != "saved"}
    page.choose_file("#upload", tmp_path / "other.json")
    assert "format" in page.wait("document.querySelector('#problem').textContent")
    assert page.value(TEXTS) == texts  # nothing was lost

    page = browse("#" + link.partition("#")[2])
    page.wait(f"{IDLE} && document.querySelectorAll('.point').length === 2")
    assert page.value(TEXTS) == texts  # asked again: the same settings and seed
    assert page.value("document.querySelectorAll('main img').length") == 0 and page.value("window.ran ?? 0") == 0


def test_stop_edit_columns_and_scripts(browse: Any):
    page = browse()
    longest(page, 8)
    send(page, QUESTION, 1)
    page.click("#add")
    page.wait(f"{IDLE} && document.querySelectorAll('.point').length === 3")  # it answers what was said before
    page.value("document.querySelectorAll('#preset-list button')[0].click()")
    assert "1 of 8" in page.of("#script-next", "e.textContent")
    page.click("#script-all")
    page.wait(f"{IDLE} && document.querySelectorAll('.turn').length === 3 * 9", 120)
    page.wait("document.querySelectorAll('.point').length === 3 * 9")
    assert page.of("#script-next", "e.textContent") == "All has been said."
    page.click('.c0 .turn[data-turn="1"] .asked button')
    page.write(" Tell me more.")
    page.click('.c0 .turn[data-turn="1"] textarea + .row button')
    page.wait(f"{IDLE} && document.querySelectorAll('.point').length === 6")
    asked = "[...document.querySelectorAll('[data-turn=\"1\"] .asked .words')].map(words => words.textContent)"
    assert all(words.endswith("Tell me more.") for words in page.value(asked))
    longest(page, 900)
    page.click("#script-end")
    page.write("Count.")
    page.press("Enter", 13, "\r")
    page.wait("[...document.querySelectorAll('.writing .words')].some(w => w.textContent.length > 0)")
    page.press("Escape", 27)
    page.wait(IDLE)
    facts = "[...document.querySelectorAll('[data-turn=\"2\"] .facts')].map(facts => facts.textContent).join()"
    assert "stopped" in page.value(facts)


def test_everything_has_a_name_for_screen_readers(browse: Any):
    page = browse()
    send(page, QUESTION, 1)
    page.ask("Accessibility.enable")
    for opened in ("", "#open-settings", "#presets", "#open-share", "#open-help"):
        if opened:
            page.value(f"document.querySelector('{opened}').click()")
        nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
        used = [node for node in nodes if not node.get("ignored") and node["role"]["value"] in USED]
        assert len(used) > 1
        assert [node["role"]["value"] for node in used if not node.get("name", {}).get("value", "").strip()] == []
        page.value("document.querySelector('dialog[open]')?.close()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_it_fits_its_window(browse: Any, tmp_path: Path, width: int, height: int, scheme: str):
    page = browse()
    page.look(width, height, scheme)
    for turn, words in enumerate((QUESTION, "Why?", "Is that what everybody says?"), 1):
        send(page, words, turn)
    page.of("#colour", "e.click()")
    page.of("#show-steered", "e.click()")
    time.sleep(0.3)
    kept = Path(os.environ.get("JAXSTEER_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    seen = np.round(255 * imread(page.screenshot(kept / f"chat-{width}-{scheme}.png"))[..., :3]).astype(int)
    assert seen.shape[:2] == (height, width)
    assert (seen[4, 4] == GROUND[scheme]).all()
    assert page.of("html", "e.scrollWidth <= innerWidth && e.scrollHeight <= innerHeight")
    cut = page.value(
        "[...document.querySelectorAll('header, footer, #plot, #send, #said, #drawing svg')].filter(e => { const b = "
        "e.getBoundingClientRect(); return b.width && (b.left < -1 || b.right > innerWidth + 1); })"
        ".map(e => e.tagName + e.id)"
    )
    assert cut == []
    assert page.value("[...document.querySelectorAll('.token')].some(t => t.style.backgroundColor.startsWith('rgb'))")
