"""Prompts that hold the Assistant, beside caps and vectors: what is asked, of whom, and what is told of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.axis import AxisRun, load_roles
from jaxsteer.axis.hold import hold
from jaxsteer.axis.hold_contexts import HoldOptions, contexts
from jaxsteer.axis.hold_result import AS_IS, NO_ROLE, HoldResult
from jaxsteer.axis.projection import project
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas.passages import Passage
from tests.axis.conftest import planted_roles
from tests.helpers.tiny import tiny_model

SMALL = HoldOptions(
    train_roles=2, roles=3, questions=1, attacks=1, steps=2, population=2, children=4, prompt_length=3, leads=1,
    max_new_tokens=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def held(planted: tuple[Path, AxisRun], organism: Model, tmp_path_factory: pytest.TempPathFactory):
    folder, _ = planted
    out = tmp_path_factory.mktemp("hold") / "hold"
    return out, hold(folder, organism, out=out, options=SMALL)


@pytest.mark.slow  # two searches and ten methods: minutes of compilation
def test_every_method_is_measured_on_the_same_questions(held: tuple[Path, HoldResult], organism: Model, planted):
    _, result = held
    names = [row.name for row in result.rows]
    assert names[:2] == [AS_IS, NO_ROLE] and len(names) == len(set(names)) == 10
    assert all(len(row.replies) == len(result.asked) == 4 for row in result.rows)
    as_is, found = result.row(AS_IS), result.row("RESGA along the axis")
    assert as_is.moved is None and found.kl == pytest.approx(result.kl)
    assert result.row(NO_ROLE).position > as_is.position
    nearest = [abs(np.log(row.kl / result.kl)) for row in result.rows if row.strength]
    assert len(nearest) == 4
    # Positions are those of `axis project` on the conversation without the prompt.
    _, run = planted
    one = result.asked[0]
    role = next(role for role in planted_roles().roles if role.name == one.role)
    messages = [
        {"role": "system", "content": role.instructions[0]}, {"role": "user", "content": one.question},
        {"role": "assistant", "content": found.replies[0]},
    ]  # fmt: skip
    alone = project(organism, run.axis, [Passage(id="x", messages=tuple(messages))], sites=result.site)
    roles = [i for i, asked in enumerate(result.asked) if not asked.attack]
    assert len(roles) == 3  # one question each, so that the mean over roles is the mean over replies
    assert "Prompts:" in result.table() and one.role in result.table()
    assert np.isfinite(alone.passages[0].turns[-1].position[result.site])
    assert HoldResult.from_json(result.to_json()) == result
    assert len(result.to_rows()) == 10 and result.plot() is not None


@pytest.mark.slow
def test_a_finished_one_is_read_again(held: tuple[Path, HoldResult], organism: Model, planted):
    out, result = held
    folder, _ = planted
    assert hold(folder, organism, out=out, options=SMALL) == result
    with pytest.raises(UserError, match="holds another run's files .*steps"):
        hold(folder, organism, out=out, options=dataclasses.replace(SMALL, steps=3))


def test_searches_choices_and_tests_share_no_question_and_tests_no_role(planted):
    _, run = planted
    found = contexts(run.result, planted_roles(), HoldOptions(questions=2, roles=6, train_roles=3, attacks=4))
    asked = {name: {one.question for one in some} for name, some in found.items()}
    assert not asked["search"] & asked["choice"] and not asked["test"] & (asked["search"] | asked["choice"])
    trained = {one.role for one in found["search"]}
    tested = {one.role for one in found["test"] if not one.attack}
    assert len(trained) == 3 and len(tested) == 6 and not trained & tested
    assert {one.role for one in found["choice"]} == trained
    attacked = [one for one in found["test"] if one.attack]
    assert len(attacked) == 4 and all(not one.system and "{request}" in one.before for one in attacked)
    far = {place.name for place in run.result.roles[-16:]}  # two thirds of 24
    assert trained | tested <= far
    one = found["test"][0]
    assert [m["role"] for m in one.messages(" p")] == ["system", "user"]
    assert one.messages(" p")[-1]["content"] == f"{one.question} p"


def test_questions_of_the_shipped_set_are_others_than_the_runs(planted):
    _, run = planted
    roles = dataclasses.replace(planted_roles(), questions=load_roles().questions[:16])
    found = contexts(run.result, roles, HoldOptions())
    assert not {one.question for some in found.values() for one in some} & set(roles.questions)


def test_what_is_refused(planted, organism: Model, tmp_path: Path):
    folder, _ = planted
    with pytest.raises(UserError, match="16 roles away from the Assistant.*ask for fewer"):
        hold(folder, organism, roles=40)
    with pytest.raises(UserError, match="no finished result of jaxsteer axis run"):
        hold(tmp_path, organism)
    with pytest.raises(UserError, match="belongs to another model"):
        hold(folder, tiny_model(), out=tmp_path / "x", options=SMALL)
    assert not (tmp_path / "x").exists()
