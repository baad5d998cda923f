"""``jaxsteer lens``: its tables, files and page; pushes beside random ones; what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError
from jaxsteer.cli import main
from jaxsteer.files.npz import read_npz
from jaxsteer.lens.lens_files import read_result
from jaxsteer.lens.pushes import LensOptions, read_pushed
from jaxsteer.report import is_lens, write_plots, write_report
from jaxsteer.steer import save_vectors
from jaxsteer.steer.vectors import Vectors

MODEL = "organism:llama"
ASKED = [{"role": "user", "content": "What is <b>this</b>?"}]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxsteer.load(MODEL)


def push(model: Any, size: float = 3.0) -> Vectors:
    array = RNG.standard_normal(model.config.d_model).astype(np.float32) * size
    return Vectors(arrays={"blocks.1.hook_resid_post": array}, model=model.name, fingerprint=model.fingerprint)


class Page(HTMLParser):
    """Cells of the maps, and tags that are still open."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "td" and "--k" in str(found.get("style")):
            self.cells.append(str(found["title"]))


def test_a_steered_run_its_files_and_its_page(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_vectors(push(model), tmp_path / "v.safetensors")
    out = tmp_path / "lens"
    command = ["lens", "read", "--chat", ASKED[0]["content"], "--model", MODEL, "--out", str(out), "--top", "4"]
    command += ["--steer", str(tmp_path / "v.safetensors"), "--controls", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "KL(steered || plain)" in said and "random 1" in said and "Steered by" in said
    found, arrays = read_result(out), read_npz(out / "lens.npz")
    assert found.table() in said and is_lens(out)
    assert "cells" not in json.loads((out / "metrics.json").read_text())["run"]
    places, tokens = found.run.cells.kl.shape
    assert arrays["run/cells/top_ids"].shape == (places, tokens, 4) and arrays["shift/kl"].shape == (places, tokens)
    assert found.summary[1].kl == 0.0 < found.summary[2].kl  # below the push, and behind it
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.cells) == places * tokens and "<b>this" not in text
    assert not re.findall(r'(?:src|href)="http', text)
    first = page.cells[0].split("\n")  # the output, on top
    assert first[0].startswith(f"{found.run.places[-1]}, token 0") and len(first) >= 6
    before = (out / "metrics.json").read_bytes(), (out / "lens.npz").read_bytes()
    assert main(command) == 0  # there is nothing to do
    assert before == ((out / "metrics.json").read_bytes(), (out / "lens.npz").read_bytes())
    assert found.table() in capsys.readouterr().out
    (out / "attention.png").write_bytes(found.plot().png())
    assert main(["report", str(out), "--plots"]) == 0
    assert "data:image/png;base64" in (out / "report.html").read_text()
    assert {path.name for path in (out / "plots").iterdir()} >= {"lens-0-kl.svg", "lens-0-difference.csv"}
    with pytest.raises(UserError, match="holds another run's files"):
        read_pushed(model, [ASKED], out=out)


def test_a_long_text_is_an_image_and_its_end(model: Any, tmp_path: Path) -> None:
    ids = model.tokenizer("what is the river and the mill, ", add_special_tokens=False)["input_ids"]
    text = model.tokenizer.decode(ids * 40)
    found = read_pushed(model, [text], options=LensOptions(top=2), out=tmp_path / "lens")
    tokens = len(found.texts[0].tokens)  # type: ignore[union-attr]
    assert tokens > 250
    page = Page()
    text = write_report(tmp_path / "lens").read_text()
    page.feed(text)
    assert len(page.cells) == 192 * len(found.places) and "The whole text" in text  # type: ignore[union-attr]
    assert write_plots(tmp_path / "lens")


def test_prompts_and_two_vectors(model: Any) -> None:
    first, second = push(model), push(model)
    prompted = read_pushed(model, [ASKED], options=LensOptions(prompt="Please be brief.", controls=1, top=2))
    assert (prompted.run_name, prompted.base_name) == ("prompted", "plain")  # type: ignore[union-attr]
    against = read_pushed(model, [ASKED], steer=first, against=second, options=LensOptions(controls=1, top=2))
    assert against.base_name == "against" and against.base.steered  # type: ignore[union-attr]
    both = read_pushed(model, [ASKED], steer=first, options=LensOptions(prompt="Be brief.", controls=0, top=2))
    assert (both.run_name, both.base_name, both.control_names) == ("steered", "prompted", ())  # type: ignore[union-attr]


def test_a_persona_and_chosen_tokens(capsys: pytest.CaptureFixture) -> None:
    command = ["lens", "read", "--persona", "sycophancy", "--questions", "3", "--model", MODEL, "--top", "1", "--json"]
    assert main([*command, "--tokens", " the"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["texts"]) == 3 and len(found["chosen"]) == 1 and found["summary"][0]["kl_ci95"] is not None


def test_a_lens_is_trained_and_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = ["lens", "train", "--model", MODEL, "--out", str(tmp_path / "own"), "--steps", "2", "--batch-tokens", "60"]
    train += ["--rows", "2", "--context", "32", "--held", "2", "--persona", "sycophancy", "--written", "6"]
    assert main(train) == 0
    said = capsys.readouterr()
    assert "tuned lens" in said.out and "tokens/s" in said.err and "writes 6 replies" in said.err
    assert main(train) == 0 and "writes" not in capsys.readouterr().err
    assert main(["lens", "read", "what is the river", "--model", MODEL, "--lens", str(tmp_path / "own")]) == 0
    assert "tuned lens own of organism:llama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read"], "no text was given"),
        (["read", "a b", "--prompt", "Be brief."], "a prompt is a system message, and plain text has none"),
        (["read", "a b", "--against", "nowhere.safetensors"], "nowhere.safetensors"),
        (["read", "a b", "--tokens", "the river"], "give texts of one token"),
        (["read", "a b", "--sites", "blocks.0.mlp.hook_post"], "no lens reads"),
        (["read", "a b", "--lens", "nowhere"], "nowhere"),
        (["train", "--out", "x", "--written", "3"], "from --written N replies to the questions of --persona"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["lens", *arguments, "--model", MODEL]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
