"""`jaxsteer serve` refuses what would be open to others, or is not there, before it loads a model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

import jaxsteer
from jaxsteer.cli.commands import parse
from jaxsteer.errors import UserError
from tests.serve.conftest import direction


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")


def test_what_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxsteer.runs.bars.load", lambda *_, **__: pytest.fail("a model was loaded"))
    short, spaces = tmp_path / "short", tmp_path / "spaces"
    short.write_text("secret\n")
    spaces.write_text("é" * 30)
    for arguments, message in (
        (["--host", "0.0.0.0"], "other machines: give --key-file"),
        (["--key-file", str(short)], "at least 16 ASCII"),
        (["--key-file", str(spaces)], "at least 16 ASCII"),
        (["--key-file", str(tmp_path / "none")], "none"),
        (["--vectors", str(short)], "is no directory"),
    ):
        with pytest.raises(UserError, match=message):
            parse(["serve", *arguments]).run()
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(UserError, match="already in use; give another --port"):
            parse(["serve", "--port", str(other.getsockname()[1])]).run()
    key = tmp_path / "key"
    key.write_text("k" * 20)
    with pytest.raises(UserError, match="nothing can listen at 203.0.113.9|no address"):
        parse(["serve", "--host", "203.0.113.9", "--key-file", str(key)]).run()


def test_what_a_server_is_given(tmp_path: Path, directory: Path) -> None:
    model: Any = jaxsteer.load("organism:llama")
    push, layers = directory / "push.safetensors", directory / "layers.safetensors"
    command = parse(
        ["serve", "--steer", str(push), "--steer", str(layers), "--axis", str(push), "--vectors", str(directory)]
    )
    library = command._library(model)
    assert library.default == ("push.safetensors", "layers.safetensors") and library.axis == "axis"
    assert (library.loaded["axis"].arrays["blocks.2.hook_resid_post"] == direction(1)).all()
    twice = parse(["serve", "--steer", str(push), "--steer", str(push)])
    with pytest.raises(UserError, match="two files"):
        twice._library(model)
