"""Numbers as people see them: a dash for what is not known, changes in points, six digits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxsteer.cli.tables import direction_table
from jaxsteer.cli.vector import vector_table
from jaxsteer.display import points
from jaxsteer.evals.rates import Difference
from jaxsteer.personas import Direction
from jaxsteer.report.templates import flat
from jaxsteer.steer import Vectors

SITE = "blocks.0.hook_resid_post"
ROW = np.ones(3, np.float32)
DIRECTION = Direction(
    delta={SITE: ROW}, mean_resid_norm={}, n=4, read_position="decision", metadata={},
    diagnostics={SITE: {"norm": 1.7, "split_half_cosine": 0.91, "letter_cosine": math.nan}},
)  # fmt: skip
VECTORS = Vectors(arrays={SITE: ROW}, mean_resid_norm={}, sign="away", metadata={"diagnostics": "[0.12]" * 200})


@pytest.mark.parametrize(
    ("text", "shown", "never"),
    [
        (points(Difference(value=-0.756, ci95=(-0.83, 0.001))), "-75.6 (-83.0 to +0.1)", "%"),
        (points(None), "–", "nan"),
        (direction_table(DIRECTION), "0.910", "nan"),
        (vector_table(VECTORS), "sign: away", "0.12"),
        (vector_table(VECTORS), "of stream norm\n", "value"),
        (str(flat({"load_s": 0.05383273900000063, "seeds": [0.1 + 0.2]})), "('load_s', '0.0538327')", "0000"),
    ],
)
def test_numbers_as_people_see_them(text: str, shown: str, never: str) -> None:
    assert shown in text and never not in text
