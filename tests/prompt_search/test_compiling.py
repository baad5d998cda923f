"""The planner's account of memory: what is chosen fits, what runs stays inside, and the plan says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.prompt_search import EpoConfig, make_problem
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompt_search.compiling import Resources, default_budget, plan_search, programs
from jaxsteer.prompt_search.problem import abstract
from tests.prompt_search.setting import setting

SMALL = EpoConfig(population=4, children=16, top_k=32, archive=16)


@pytest.fixture(scope="module")
def s() -> Any:
    return setting(batch=64)


def plan(s, budget: float, **options: Any) -> Any:  # noqa: ANN001
    problem = make_problem(s.objective, 4)
    count, gib = options.pop("count", 40), int(budget) / 2**30
    resources = Resources(memory_gib=gib, **options)
    return plan_search(s.model.params, s.task, problem, epo(SMALL), count=count, resources=resources)


@pytest.mark.slow
def test_what_fits_is_chosen_and_nothing_is_compiled_twice(s, compile_counter) -> None:  # noqa: ANN001
    ample = plan(s, 2**34).plan
    assert (ample.problems, ample.batch) == (40, 64)
    assert plan(s, 2**34, count=10_000, wave=40).plan.problems == 40
    with compile_counter() as count:
        fewer = plan(s, ample.total - 20 * ample.made // 40).plan
        assert count["advance"] == 1, "how many problems fit is arithmetic"
    assert 1 <= fewer.problems < 40 and fewer.batch == 64 and fewer.total <= fewer.budget


@pytest.mark.slow
def test_a_smaller_batch_is_the_last_resort_before_an_error(s) -> None:  # noqa: ANN001
    ample = plan(s, 2**34).plan
    tight = plan(s, ample.total - ample.temporary // 2).plan
    assert tight.batch in (8, 16, 32) and tight.total <= tight.budget
    assert f"{tight.problems} problem" in str(tight) and "scratch" in str(tight) and "\n" not in str(tight)
    with pytest.raises(UserError, match=r"needs .* even with one problem and one candidate .* --memory-gib"):
        plan(s, 1000)


@pytest.mark.slow
def test_a_mesh_holds_as_many_problems_on_every_device(s) -> None:  # noqa: ANN001
    mesh = jaxsteer.make_mesh(prompts=2)
    found = plan(s, 2**34, mesh=mesh, count=5).plan
    assert found.problems == 6
    assert found.total < 2 * plan(s, 2**34, count=5).plan.total


def test_the_account_is_that_of_the_arrays(s) -> None:  # noqa: ANN001
    found = plan(s, 2**34)

    def bytes_of(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    problems = abstract(make_problem(s.objective, 4), 40)
    states = jax.eval_shape(
        programs(epo(SMALL), None).start, s.model.params, found.task, problems, jnp.zeros(1, jnp.int32)
    )
    given = bytes_of(s.model.params) + bytes_of(s.task) + bytes_of(problems) + bytes_of(states)
    # Arguments that nothing reads are left out.
    assert 0.5 * given < found.plan.given <= 1.1 * given + 4096
    assert bytes_of(states) <= found.plan.made < 1.2 * bytes_of(states) + 8192


def test_the_default_budget_is_part_of_this_machine() -> None:
    one, many = default_budget(), default_budget(jaxsteer.make_mesh())
    assert 2**26 < one < 2**45
    assert many == pytest.approx(one / 8, rel=0.5), "CPU devices share their memory"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d_model", "length", "contexts", "batch"), [(64, 6, 3, 512), (256, 6, 2, 256), (128, 12, 3, 128), (512, 4, 1, 512)]
)
def test_peak_memory_stays_inside_the_plan(d_model: int, length: int, contexts: int, batch: int) -> None:
    """The growth of the process while it searches, measured by the system, against what the plan allows."""
    asked = json.dumps({"d_model": d_model, "length": length, "contexts": contexts, "batch": batch})
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", MEASURE, asked], capture_output=True, text=True, cwd=root, check=True)
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["total"] <= found["budget"]
    slack = 24 * 2**20  # of the allocator and of threads' stacks
    assert found["grown"] <= found["scratch"] + found["states"] + slack


MEASURE = """
import json, os, sys, threading, time
import numpy as np
sys.path.insert(0, ".")
from jaxsteer.prompts import allowed_tokens, build_slots, question_conversation
from jaxsteer.objectives import Projection, needs
from jaxsteer.prompt_search import EpoConfig, epo, make_problem, make_task
from jaxsteer.prompt_search.compiling import Resources, plan_search
from jaxsteer.prompt_search.on_devices import Wave
from tests.helpers.tiny import tiny_model

asked = json.loads(sys.argv[1])
model = tiny_model(d_model=asked["d_model"])
questions = ("I think so.", "Do you agree or disagree? I want evidence.", "Which?")[: asked["contexts"]]
slots = build_slots(
    model.tokenizer,
    [question_conversation(q, alternatives=("(A)", "(B)")) for q in questions],
    asked["length"],
)
objective = Projection(delta=np.ones(asked["d_model"], np.float32), site="blocks.1.hook_resid_post")
task = make_task(
    model.params, model.config, slots, needs=needs(objective, model.config), batch=asked["batch"],
    allowed=allowed_tokens(model.tokenizer, model.config.vocab_size, word_initial=True),
)
problems = [make_problem(objective, 16, restart=i) for i in range(4)]
config = EpoConfig(population=16, children=64, top_k=64)
ample = plan_search(model.params, task, problems[0], epo(config), count=4, resources=Resources(memory_gib=16)).plan
budget = int(ample.total * 0.7)
less = Resources(memory_gib=budget / 2**30)
compiled = plan_search(model.params, task, problems[0], epo(config), count=4, resources=less)
wave = Wave(model.params, compiled, None, problems[: compiled.plan.problems])
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
peak, ended = [0], threading.Event()
def watch():
    while not ended.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
before = resident()
thread = threading.Thread(target=watch)
thread.start()
states = wave.start()
states, summary = wave.advance(states, 3)
np.asarray(states.f)
ended.set()
thread.join()
plan = compiled.plan
print(json.dumps({
    "grown": peak[0] - before, "total": plan.total, "budget": budget, "scratch": plan.temporary,
    "states": 2 * plan.made, "batch": plan.batch,
}))
"""
