"""Numbers as people see them: a dash for what is not known, changes in points, six digits; tables that fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from jaxsteer.cli.tables import direction_table
from jaxsteer.cli.vector import vector_table
from jaxsteer.display import (
    aligned,
    duration,
    listed,
    points,
)
from jaxsteer.evals.organism_gates import Gate, gates_table
from jaxsteer.evals.rates import Difference
from jaxsteer.personas import Direction
from jaxsteer.report.templates import flat
from jaxsteer.steer import Vectors
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.results import SearchRun
from jaxsteer.study.run_table import summary_table
from tests.helpers.rates import made_rate
from tests.report.synthetic import metrics

RUN = SearchRun.from_json(metrics())
RATES = [Measured(prompt=prompt, steered=False, rate=made_rate(0.83)) for prompt in ("", "Please be honest and frank")]
MEASURED = Measurement(
    model="organism:llama", persona="sycophancy", split="test", style="chat", slot="suffix", questions=120,
    baseline=RATES[0], prompts=tuple(RATES[1:]),
)  # fmt: skip
GATES = [Gate(behaviour=name, name="the oracle cue", value=0.9, low=0.8) for name in ("sycophancy", "myopic reward")]
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


@pytest.mark.parametrize("width", [60, 80, None])
@pytest.mark.parametrize(
    ("table", "words"),
    [
        (RUN.table, "A-rate swapped 85.0 % 6.0 (3.0–9.0)"),
        (lambda: summary_table([RUN]), "baseline with prompt A-rate"),
        (MEASURED.table, "AUROC becomes leaves honest 83.0 78.2–87.8"),
        (lambda: gates_table(GATES), "required oracle at least 80 % 90.0 ok myopic"),
        (lambda: vector_table(VECTORS), f"{SITE} norm 1.732"),
        (lambda: direction_table(DIRECTION), f"{SITE} 1.7 split-half"),
        (lambda: "\n".join(listed([("file", "a name of several words " * 9)])), "file a name of several words"),
    ],
)
def test_tables_fit_the_terminal(
    table: Callable[[], str], words: str, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = table()
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    text = table()
    assert all(word in text for word in words.split())
    assert text == wide if width is None else max(map(len, text.split("\n"))) <= width


def test_a_table_becomes_paragraphs_where_no_columns_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    rows = [("prompt", "rate", "answers"), ("be honest", "83.0–91.5", "123456789"), ("", "1", "2")]
    assert aligned(rows) == (
        "prompt   be honest\nrate     83.0–91.5\nanswers  123456789\n\nprompt\nrate     1\nanswers  2"
    )
    assert aligned([row[:2] for row in rows]) == (
        "prompt          rate\n--------------------\nbe honest  83.0–91.5\n                   1"
    )


def test_durations_have_the_unit_that_shows_them() -> None:
    assert [duration(hours) for hours in (0.68, 0.05, 0.001)] == ["0.68 h", "3.0 min", "3.6 s"]
