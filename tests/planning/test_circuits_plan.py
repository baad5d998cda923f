"""Plans of circuits: two programs on one mesh, how often they run, and rows that are halved until they fit."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jaxsteer.circuits.graph import Graph
from jaxsteer.cli import main
from jaxsteer.planning import Workload, topology
from jaxsteer.planning.circuits_plan import CircuitsPlan, make_circuits_plan
from tests.helpers.tiny import tiny_model

WORK = Workload(what="circuits", problems=16, context_length=16, site="blocks.0.hook_resid_post", dtype="float32")


@pytest.fixture(scope="module")
def plan() -> CircuitsPlan:
    return make_circuits_plan("tiny", tiny_model().config, topology("cpu:8"), WORK, mesh=(4, 2), say=lambda _: None)


def test_patches_passes_and_hours_follow_from_the_two_programs(plan: CircuitsPlan) -> None:
    config = tiny_model().config
    assert plan.fits and plan.hours is None
    assert plan.edges == Graph.of(config, start=1).n_edges
    assert plan.patches == (config.n_layers - 1) * (config.n_heads + 1)
    assert plan.calls == {"attribution": 1, "patching": plan.patches + 1}
    chip = dataclasses.replace(plan.patch.chip, flops=1e9, hbm_bandwidth=1e9, link_bandwidth=1e9)
    timed = dataclasses.replace(
        plan, patch=dataclasses.replace(plan.patch, chip=chip), attribute=dataclasses.replace(plan.attribute, chip=chip)
    )
    assert timed.hours is not None and timed.patch.roofline is not None
    assert timed.hours["patching"] == pytest.approx(timed.patch.roofline * (plan.patches + 1) / 3600)
    assert "every head and MLP" in timed.text() and f"{plan.edges:,} edges" in timed.text()


def test_ten_gradients_cost_more_than_a_walk_and_nothing_crosses_prompts_but_sums(plan: CircuitsPlan) -> None:
    assert plan.attribute.costs is not None and plan.patch.costs is not None
    assert plan.attribute.costs.flops > 20 * plan.patch.costs.flops
    assert not any("prompts" in axis for _, axis in plan.patch.costs.collectives)


def test_rows_are_halved_until_they_fit() -> None:
    target = topology("cpu:8")
    small = dataclasses.replace(target, chip=dataclasses.replace(target.chip, hbm_bytes=6_000_000))
    work = dataclasses.replace(WORK, problems=256)
    found = make_circuits_plan("tiny", tiny_model().config, small, work, mesh=(8, 1), say=lambda _: None)
    assert found.attribute.work.problems < 256


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "organism:persona", "--topology", "cpu:8", "--mesh", "8x1", "--what", "circuits"]
    assert main([*command, "--problems", "8", "--context-length", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["what"] == "circuits" and told["attribution"]["bytes_per_device"]["total"] > 0
    assert main([*command, "--scaling"]) == 2
