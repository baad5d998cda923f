"""Plans of rollouts: two programs on one mesh, how often they run, and what crosses the rows."""

from __future__ import annotations

import dataclasses

import pytest

from jaxsteer.planning import Workload, topology
from jaxsteer.planning.axis_plan import AxisPlan, make_axis_plan
from tests.helpers.tiny import tiny_model

WORK = Workload(
    what="axis", problems=16, context_length=16, new_tokens=8, roles=10, rollouts=20, dtype="float32"
)  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> AxisPlan:
    return make_axis_plan("tiny", tiny_model().config, topology("cpu:8"), WORK, mesh=(4, 2), say=lambda _: None)


def test_rollouts_states_and_hours_follow_from_the_two_programs(plan: AxisPlan):
    config = tiny_model().config
    assert plan.rollouts == 11 * 20
    assert plan.states == plan.rollouts * config.n_layers * config.d_model * 4
    assert plan.read.work.context_length == 24 and plan.write.work.context_length == 16
    assert plan.fits and plan.hours is None  # no peaks of a CPU are published
    chip = dataclasses.replace(plan.write.chip, flops=1e9, hbm_bandwidth=1e9, link_bandwidth=1e9)
    timed = dataclasses.replace(
        plan, write=dataclasses.replace(plan.write, chip=chip), read=dataclasses.replace(plan.read, chip=chip)
    )
    write, read = timed.write.roofline, timed.read.roofline
    assert timed.hours is not None and write is not None and read is not None
    assert timed.hours["write"] == pytest.approx(write * 8 * 220 / 16 / 3600)
    assert timed.hours["read"] == pytest.approx(read * 220 / timed.read.work.problems / 3600)
    assert timed.hours["prefill"] == pytest.approx(timed.hours["read"] * 16 / 24)
    assert "220; prompts of 16 tokens" in timed.text().replace("\n", " ") and "together" in timed.text()
    assert timed.to_json()["hours_estimate"]["total"] == pytest.approx(sum(timed.hours.values()))


def test_nothing_but_whether_all_rows_have_ended_crosses_prompts(plan: AxisPlan):
    assert plan.read.costs is not None and plan.write.costs is not None
    assert {axis for _, axis in plan.read.costs.collectives} == {"model"}
    crossing = [given for (_, axis), (_, given, _) in plan.write.costs.collectives.items() if "prompts" in axis]
    assert sum(crossing) <= 2  # bytes


def test_rows_are_halved_until_their_states_fit():
    """A model whose states of many rows would not fit where its decoding does."""
    target = topology("cpu:8")
    config = tiny_model().config
    small = dataclasses.replace(target, chip=dataclasses.replace(target.chip, hbm_bytes=3_200_000))
    work = dataclasses.replace(WORK, problems=256, context_length=8, new_tokens=56)
    found = make_axis_plan("tiny", config, small, work, mesh=(8, 1), say=lambda _: None)
    assert found.read.work.problems < 256
