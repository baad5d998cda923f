"""The files of the chat page: nothing from elsewhere, nothing that a text could run, labels, contrast, presets."""

import ast
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import jaxsteer

PAGE = Path(jaxsteer.__file__).parent / "serve" / "page"
TEXTS = {path.name: path.read_text("utf-8") for path in sorted(PAGE.iterdir())}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


class Elements(HTMLParser):
    """Every element with its attributes, and those that stand inside a label."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], bool]] = []
        self._labels = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._labels += tag == "label"
        self.found.append((tag, dict(attrs), self._labels > 0))

    def handle_endtag(self, tag):
        self._labels -= tag == "label"


ELEMENTS = Elements(TEXTS["index.html"]).found


def test_nothing_comes_from_elsewhere():
    for name, text in TEXTS.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`)]*", re.sub(r"(?m)(^|\s)//\s.*$", "", text)))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
    for name, text in SCRIPTS.items():
        for other in re.findall(r'from "([^"]+)"', text):
            assert other.startswith("./") and other[2:] in TEXTS, (name, other)
    for tag, attributes, _ in ELEMENTS:
        for where in ("src", "href"):
            if (to := attributes.get(where)) and not to.startswith("#"):
                assert to.removeprefix("page/") in TEXTS, (tag, to)


def test_no_text_becomes_markup_or_code():
    forbidden = (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment", "DOMParser",
        "eval(", "Function(", "srcdoc", "javascript:", "setHTML",
    )  # fmt: skip
    for name, text in TEXTS.items():
        assert not [word for word in forbidden if word in text], name
    for tag, attributes, _ in ELEMENTS:  # a Content-Security-Policy of 'self' forbids these
        assert tag != "style" and "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag != "script" or set(attributes) == {"type", "src"}


def test_scripts_ask_for_elements_that_there_are():
    ids = [attributes["id"] for _, attributes, _ in ELEMENTS if "id" in attributes]
    assert len(set(ids)) == len(ids)
    asked = {name for text in SCRIPTS.values() for name in re.findall(r'byId\("([\w-]+)"\)', text)}
    assert len(asked) > 30 and asked <= set(ids)


def test_everything_that_can_be_used_has_a_name():
    labelled = {attributes["for"] for tag, attributes, _ in ELEMENTS if tag == "label" and "for" in attributes}
    for tag, attributes, inside in ELEMENTS:
        if tag in ("input", "select", "textarea"):
            assert inside or "aria-label" in attributes or attributes.get("id") in labelled, attributes
        if tag == "dialog":
            assert attributes["aria-labelledby"] in {a.get("id") for _, a, _ in ELEMENTS}
    for name, text in SCRIPTS.items():  # what scripts make
        for made in re.findall(r'make\("(?:input|select|textarea)", \{.*', text):
            own = re.match(r'make\("\w+", \{', made)
            assert own is not None
            line = text[text.index(made) : text.index(made) + 700]
            assert "aria-label" in line or "label" in text[: text.index(made)][-200:], (name, made)


def luminance(colour: str) -> float:
    short = colour.lstrip("#")
    full = "".join(2 * c for c in short) if len(short) == 3 else short
    channels = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_both_schemes():
    light, dark = re.findall(r":root \{(.*?)\}", TEXTS["style.css"], re.DOTALL)[:2]
    assert contrast("#000", "#fff") == pytest.approx(21)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+):(#\w+)", scheme))
        for ink, ground in (("ink", "page"), ("ink", "card"), ("muted", "page"), ("muted", "card"),
                            ("warn-ink", "warn"), ("on-accent", "accent")):  # fmt: skip
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground, scheme)
        for tint in ("c0", "c1", "c2", "c3"):
            assert contrast(colours[tint], colours["page"]) >= 3, (tint, scheme)
        for which in ("up", "down"):  # the strongest colour of a token, under ink
            channels = [int(c) for c in re.findall(rf"--{which}:(\d+),(\d+),(\d+)", scheme)[0]]
            page = [int("".join(2 * c for c in colours["page"][1:])[i : i + 2], 16) if len(colours["page"]) == 4
                    else int(colours["page"][1 + i : 3 + i], 16) for i in (0, 2, 4)]  # fmt: skip
            mixed = "#" + "".join(f"{round(0.5 * a + 0.5 * b):02x}" for a, b in zip(channels, page, strict=True))
            assert contrast(colours["ink"], mixed) >= 4.5, (which, scheme)


def test_presets_are_conversations_roles_and_attacks_of_the_axis():
    from jaxsteer.axis import scripts

    data = Path(scripts.__file__).parent / "data"
    presets = json.loads(TEXTS["presets.json"])
    assert set(presets) == {"about", "conversations", "roles", "attacks"}
    said = [
        talk for talks in json.loads((data / "conversations.json").read_text())["domains"].values() for talk in talks
    ]
    roles = json.loads((data / "roles.json").read_text())["roles"]
    templates = json.loads((data / "attacks.json").read_text()).values()
    instructions = {text for role in roles for text in role["instructions"]}
    for one in presets["conversations"]:
        assert set(one) == {"name", "about", "messages"} and one["messages"] in said
    for one in presets["roles"]:
        assert set(one) == {"name", "system"} and one["system"] in instructions
    for one in presets["attacks"]:
        starts = [template.split("{request}") for template in templates]
        assert any(one["message"].startswith(a) and one["message"].endswith(b) for a, b in starts)
    for some in ("conversations", "roles", "attacks"):
        names = [one["name"] for one in presets[some]]
        assert len(names) >= 6 and len(set(names)) == len(names)


def test_modules_without_a_browser(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    out = tmp_path / "python.json"
    command = [node, "--test", str(Path(__file__).parent / "page_modules.mjs")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHON_OUT": str(out)}
    )
    assert done.returncode == 0, done.stdout
    shown = json.loads(out.read_text("utf-8"))
    calls = [node for node in ast.walk(ast.parse(shown["python"])) if isinstance(node, ast.Call)]
    [given] = [
        {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        for call in calls
        if any(k.arg == "messages" for k in call.keywords)
    ]
    assert given.pop("extra_body") == {"steering": shown["body"].pop("steering")}
    assert given == shown["body"]
