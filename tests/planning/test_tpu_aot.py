"""Proved by compiling: search steps of real models on TPU slices that are not here. Run by ``make tpu-aot``.

A step of 8B or 70B takes minutes to compile: those are ``slow`` too, and ``make tpu-aot-one`` leaves them out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import pytest

from jaxsteer.checkpoints.inspect import parameters
from jaxsteer.checkpoints.published import published_config
from jaxsteer.planning import Plan, Workload, make_plan, topology
from jaxsteer.planning.chips import GIB
from jaxsteer.planning.programs import _TAIL as TAIL

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"),
    pytest.mark.filterwarnings("ignore"),
]

SMALL = Workload(problems=64, population=4, children=8, prompt_length=8, contexts=2, context_length=32)
WORK = Workload(problems=256, contexts=8, context_length=64)
CASES = {
    "1b-v5e": ("llama-3.2-1b", "v5e:2x4", (2, 4), SMALL),
    "8b-v5e": ("llama-3.1-8b", "v5e:4x4", (2, 8), WORK),
    "70b-v5p": ("llama-3.1-70b", "v5p:4x4x4", (8, 8), WORK),
    "70b-v5e": ("llama-3.1-70b", "v5e:16x16", (16, 16), WORK),
}


def cases(*names: str) -> list[Any]:
    """Parameters of a test or fixture; large ones are slow."""
    return [pytest.param(name, marks=() if CASES[name][-1] is SMALL else pytest.mark.slow) for name in names]


@functools.cache
def planned(case: str, times: int = 1) -> Plan:
    """The plan of a case, of ``times`` its problems. Compiled once, whatever the number of tests."""
    model, slice_, mesh, work = CASES[case]
    work = dataclasses.replace(work, problems=times * work.problems)
    return make_plan(model, published_config(model), topology(slice_), work, mesh=mesh, micro_batch=16)


@pytest.fixture(scope="module", params=cases(*CASES))
def plan(request: pytest.FixtureRequest) -> Plan:
    return planned(request.param)


def test_the_step_fits_and_its_weights_are_split(plan: Plan):
    assert plan.fits and plan.total <= plan.chip.hbm_bytes
    whole = 2 * parameters(published_config(plan.model))["total"]
    assert plan.weights == pytest.approx(whole / plan.mesh["model"], rel=0.05)
    # What the compiler lays out for its arguments is that and little more.
    assert plan.temporaries is not None
    assert plan.total - plan.temporaries < 1.05 * (plan.weights + plan.caches) + GIB / 4


def test_nothing_crosses_prompts(plan: Plan):
    assert plan.costs is not None and plan.costs.collectives
    assert {axis for _, axis in plan.costs.collectives} == {"model"}


def test_products_are_those_of_the_model(plan: Plan):
    """Twice the weights for every token that runs. Children run from where they may differ from their parent, half of
    the prompt on average; parents run once for them, and three times for the gradient (forward, again, backward)."""
    work, config = plan.work, published_config(plan.model)
    assert plan.costs is not None
    count, depth, s = parameters(config), work.depth(config), work.prompt_length

    def row(slot: float) -> float:
        tokens = depth * (slot + TAIL) + (config.n_layers - depth) * slot
        return count["per_layer"] * tokens + count["embedding"] * slot

    rows = work.contexts * (work.population * work.children * row(s / 2) + 4 * work.population * row(s - 1))
    devices = plan.mesh["prompts"] * plan.mesh["model"]
    assert plan.costs.flops == pytest.approx(2 * rows * work.problems / devices, rel=0.1)
    assert not plan.costs.unknown_loops


@pytest.mark.parametrize("case", cases("1b-v5e", "8b-v5e"))
def test_twice_the_problems_are_twice_the_work_and_no_other_collectives(case: str):
    once, twice = planned(case), planned(case, times=2)
    assert once.costs is not None and twice.costs is not None
    assert twice.costs.flops == pytest.approx(2 * once.costs.flops, rel=0.001)
    assert twice.costs.collectives.keys() == once.costs.collectives.keys()
    for key, (count, given, _) in once.costs.collectives.items():
        assert twice.costs.collectives[key][:2] == pytest.approx((2 * count, 2 * given))
