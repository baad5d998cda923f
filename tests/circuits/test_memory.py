"""Memory: rows are halved until XLA's own count fits, and what is found does not depend on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxsteer import UserError
from jaxsteer.circuits import memory
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import random_edges, run_circuits
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.memory import program_bytes, rows_at_once
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.paths import patch_edges
from jaxsteer.circuits.rows import make_rows
from jaxsteer.models import sharding
from jaxsteer.objectives import LogitDifference
from tests.helpers.checkpoints import random_model, tiny_config

MODEL = random_model(tiny_config(n_layers=2))
RNG = np.random.default_rng(0)
ROWS, SOURCE = (make_rows(MODEL, list(RNG.integers(0, 67, (4, 12)))) for _ in range(2))
METRIC = LogitDifference(plus=np.asarray([3, 5, 7, 9]), minus=np.asarray([4, 60, 2, 1]))
GRAPH = Graph.of(MODEL.config)


class Lowered:
    """A program of so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def compile(self) -> Lowered:
        return self

    def memory_analysis(self) -> Any:
        return type("Memory", (), dict(
            argument_size_in_bytes=0, output_size_in_bytes=0, alias_size_in_bytes=0, temp_size_in_bytes=self.size
        ))()  # fmt: skip


def test_rows_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def lower(size: int) -> Lowered:
        asked.append(size)
        return Lowered(100 * size)

    for free, guess, expected, compiled in (
        (1000, 2, 40, []),  # far below: nothing is compiled
        (1000, 100, 10, [40, 20, 10]),  # the guess is right
        (1000, 50, 10, [40, 20, 10]),  # too small: XLA's count decides
        (4000, 300, 40, [40]),  # too large: likewise
        (1000, 2000, 2, [2]),  # far too large: what cannot be is not even compiled
    ):
        monkeypatch.setattr(sharding, "free_memory", lambda free=free: free)
        asked.clear()
        assert rows_at_once("It", MODEL, guess, 40, lower) == expected and asked == compiled
    monkeypatch.setattr(sharding, "free_memory", lambda: 90)
    with pytest.raises(UserError, match="It of one row needs .* are free: shorten the texts"):
        rows_at_once("It", MODEL, 100, 40, lower)


CALLS = {
    "patch": lambda: patch(MODEL, ROWS, METRIC, "attn.hook_z", SOURCE, heads="each").effects,
    "attribution": lambda: attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=2).matrix,
    "edges": lambda: patch_edges(MODEL, ROWS, METRIC, SOURCE, ["input->logits", "a0.h1->a1.h2<q>", "m0->m1"]),
    "circuits": lambda: (
        run_circuits(MODEL, ROWS, METRIC, SOURCE, GRAPH, [random_edges(GRAPH, 30, seed) for seed in range(3)]).scores
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_little_memory_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes, asked = CALLS[name](), [], 0
    needed = program_bytes

    def noted(lowered: Any, model: Any) -> int:
        sizes.append(needed(lowered, model))
        return sizes[-1]

    monkeypatch.setattr(memory, "program_bytes", noted)
    for free in (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 10):
        monkeypatch.setattr(sharding, "free_memory", lambda free=free: free)
        sizes.clear()
        try:
            parts = CALLS[name]()
        except UserError:
            break
        np.testing.assert_allclose(parts, whole, atol=2e-5)
        asked += len(sizes)
        assert not sizes or sizes[-1] <= free
    else:
        pytest.fail("nothing was ever too large")
    assert asked
