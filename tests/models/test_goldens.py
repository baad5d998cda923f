"""Numbers that transformers gave once (tests/make_goldens.py), checked without torch."""

from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from tests.helpers.parity import VARIANTS, check

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_transformers(variant: str) -> None:
    model = jaxsteer.load(GOLDENS / variant, dtype="float32")
    check(model, dict(np.load(GOLDENS / variant / "golden.npz")))


def test_goldens_are_small() -> None:
    for directory in GOLDENS.iterdir():
        assert sum(file.stat().st_size for file in directory.iterdir()) <= 150_000, directory
