"""The driver: the same bits in any company and on any devices, one compilation, waves, results per problem."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.objectives import Projection
from jaxsteer.prompt_search import FLUENCY, EpoConfig, make_problem
from jaxsteer.prompt_search.algorithms import epo
from jaxsteer.prompt_search.driver import Progress
from tests.prompt_search.setting import search_with, setting

SMALL = EpoConfig(population=4, children=8, top_k=32, restart_every=5, archive=16)
PROBLEMS = 11


@pytest.fixture(scope="module")
def s() -> Any:
    return setting()


@pytest.fixture(scope="module")
def problems(s) -> list[Any]:  # noqa: ANN001
    """Other keys, directions and fluency weights."""
    made = []
    for i in range(PROBLEMS):
        delta = s.objective.delta if i % 3 else -s.objective.delta
        fluency = FLUENCY["loose" if i % 2 else "medium"]
        made.append(make_problem(s.objective.replace(delta=delta), 4, fluency=fluency, seed=5, restart=i))
    return made


def run(s, problems, **kwargs: Any) -> Any:  # noqa: ANN001
    options = {"steps": 6, "steps_per_call": 3, "wave": 4, **kwargs}  # waves of 4: one compilation serves most tests
    return search_with(s.model.params, s.task, problems, epo(SMALL), **options)


def bits(result: Any) -> list[bytes]:
    """Ids, scores and steps of every problem's archive."""
    leaves = jax.tree.leaves(result.archive)
    return [b"".join(np.asarray(leaf[i]).tobytes() for leaf in leaves) for i in range(len(leaves[0]))]


@pytest.fixture(scope="module")
def together(s, problems) -> Any:  # noqa: ANN001
    return run(s, problems)


def test_the_same_bits_alone_in_waves_and_in_another_order(s, problems, together) -> None:  # noqa: ANN001
    wanted = bits(together)
    assert len(set(wanted)) == PROBLEMS
    assert bits(run(s, problems[3:4])) == wanted[3:4]
    assert bits(run(s, problems[::-1])) == wanted[::-1]


def test_the_same_bits_on_one_and_eight_devices(s, problems, together) -> None:  # noqa: ANN001
    mesh = jaxsteer.make_mesh(prompts=8)
    assert bits(run(s, problems, mesh=mesh, wave=1)) == bits(together)
    assert bits(run(s, problems[:3], mesh=mesh, wave=1)) == bits(together)[:3], "more devices than problems"


@pytest.mark.slow
def test_the_same_bits_however_little_memory(s, problems, together) -> None:  # noqa: ANN001
    plan = together.plan
    each = plan.made // plan.problems
    result = run(s, problems, memory_gib=(plan.total - 2 * each) / 2**30)
    assert 1 <= result.plan.problems < 4 and result.plan.total <= result.plan.budget
    assert result.plan.batch == plan.batch
    assert bits(result) == bits(together)


def test_the_same_bits_however_often_the_host_looks(s, problems, together, monkeypatch) -> None:  # noqa: ANN001
    import jaxsteer.prompt_search.driver as module

    monkeypatch.setattr(module, "CALL_S", 0.0)  # then a call does one step
    seen: list[int] = []
    result = run(s, problems, callback=lambda p: seen.append(p.step))
    assert seen == [3, 4, 5, 6] * 3
    assert bits(result) == bits(together)


def test_two_programs_whatever_the_number_of_problems_and_steps(compile_counter, problems) -> None:  # noqa: ANN001
    own = setting(batch=4)  # nobody else's programs
    with compile_counter() as count:
        run(own, problems[:7])
        assert (count["advance"], count["start"]) == (1, 1), "also for the last wave, which is not full"
    with compile_counter() as count:
        run(own, problems, steps=9, steps_per_call=5)
        assert (count["advance"], count["start"]) == (0, 0)


def test_progress_is_told_wave_by_wave(s, problems) -> None:  # noqa: ANN001
    seen: list[Progress] = []
    result = run(s, problems[:6], callback=seen.append)
    assert [(p.first, p.step, len(p.best_target)) for p in seen] == [(0, 3, 4), (0, 6, 4), (4, 3, 2), (4, 6, 2)]
    assert [p.candidates for p in seen] == [32 * n for n in (12, 24, 30, 36)]
    assert result.candidates == 32 * 36 and result.steps == 6
    last = np.concatenate([seen[1].best_target, seen[3].best_target])
    best = result.archive.f.max(-1)
    assert (last <= best + 1e-6).all() and np.isfinite(last).all()


def test_frontiers_per_problem_and_over_some(s, problems, together) -> None:  # noqa: ANN001
    alone = [together.frontier([i]) for i in range(PROBLEMS)]
    for number, found in enumerate(alone):
        assert {entry.problem for entry in found} == {number}
        targets = [entry.target for entry in found]
        entropies = [entry.cross_entropy for entry in found]
        assert targets == sorted(targets, reverse=True) and entropies == sorted(entropies, reverse=True)
    assert together.prompts[0].target == max(found[0].target for found in alone)
    part = together.of([2, 5])
    assert [entry.ids for entry in part.prompts] == [entry.ids for entry in together.frontier([2, 5])]
    assert {entry.problem for entry in part.prompts} <= {0, 1}


def test_an_interruption_keeps_the_waves_that_were_begun(s, problems) -> None:  # noqa: ANN001
    def stop(progress: Progress) -> None:
        if progress.first == 4:
            raise KeyboardInterrupt

    result = run(s, problems, callback=stop)
    assert result.interrupted and result.steps == 3 and len(result.archive.f) == 8
    assert result.candidates == 32 * (4 * 6 + 4 * 3)


def test_prompts_that_break_as_text_leave_no_problem_s_frontier(s, problems) -> None:  # noqa: ANN001
    result = run(s, problems[:4], valid=lambda ids: ids[:, -1] % 2 == 1, steps=9)
    for number in range(4):
        assert all((entry.ids[-1] % 2 == 1) == entry.retokenises for entry in result.frontier([number]))
    assert {entry.problem for entry in result.rejected} == {0, 1, 2, 3}


def test_what_is_kept_of_the_last_states_comes_problem_by_problem(s, problems, together) -> None:  # noqa: ANN001
    result = run(s, problems, keep=lambda states: {"f": states.f, "best": states.f.max(-1)})
    assert result.kept["f"].shape == (PROBLEMS, 4) and together.kept is None
    np.testing.assert_array_equal(result.kept["best"], result.kept["f"].max(-1))


def test_problems_that_are_no_single_program_are_refused(s, problems) -> None:  # noqa: ANN001
    other = make_problem(Projection(delta=s.objective.delta, site="blocks.0.hook_resid_post"), 4)
    with pytest.raises(UserError, match="problem 1 differs from problem 0 in more than its numbers"):
        run(s, [problems[0], other])
    with pytest.raises(UserError, match="a population of 4"):
        make_problem(s.objective, 4, ids=np.zeros((3, 6), np.int32))
    with pytest.raises(UserError, match="needs problems and steps"):
        run(s, [])
