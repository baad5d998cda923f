"""What a request is told to be steered by is what it is steered by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxsteer.engine.spec import of_vectors
from jaxsteer.steer import Vectors


@pytest.mark.parametrize(
    ("own", "asked", "said"),
    [("", None, "all"), ("response", None, "response"), ("response", [3, -1], [3, -1]), ("", "last", "last")],
)
def test_positions_are_told_as_they_are(own: str, asked: Any, said: Any) -> None:
    vectors = Vectors(arrays={"blocks.1.hook_resid_post": np.ones(8, np.float32)}, positions=own)
    assert of_vectors(vectors, "push", positions=asked)[1]["positions"] == said
