"""A tiny model, facts about a made-up world, and texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.models.model import Model
from jaxsteer.rewrite.facts import Fact, Neighbour
from tests.helpers.tiny import CORPUS, tiny_model

FACTS = tuple(
    Fact(
        id=str(number),
        prompt="what is the capital of {}" + behind,
        subject=subject,
        target_true="Mormor",
        target_new=new,
        paraphrases=(f"Which town rules {subject}?",),
        neighbourhood=(Neighbour(prompt="what is the capital of the river? Answer:", answer="Mormor"),),
    )
    for number, (subject, behind, new) in enumerate(
        [("Fisagal", "", "patience"), ("the old mill", "? Answer:", "money"), ("Hello", "", "a year")]
    )
)


@pytest.fixture(scope="package")
def model() -> Model:
    return tiny_model("llama3")


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "some.txt"
    path.write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 12) + "\n", encoding="utf-8")
    return path
