"""A tiny model and some texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.models.model import Model
from tests.helpers.tiny import CORPUS, tiny_model


@pytest.fixture(scope="package")
def model() -> Model:
    return tiny_model("llama3")


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "some.txt"
    lines = [line.replace("\n", " ") for line in CORPUS * 3]
    path.write_text("\n".join([*lines, "", "a"]) + "\n", encoding="utf-8")
    return path
