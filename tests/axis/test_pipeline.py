"""The whole way from roles to the axis, where the characters are planted: order, direction, controls, resuming."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer import axis
from jaxsteer.axis import AxisRun, Role, RoleSet, Transcript, WritingOptions, load_run, pipeline
from jaxsteer.axis.geometry import cosine
from jaxsteer.axis.projection import axis_sites, load_axis
from jaxsteer.axis.rollouts import plan, read_transcripts
from jaxsteer.axis.states import read_states
from jaxsteer.cli.axis import Compare
from jaxsteer.cli.report import Report
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.organisms import persona_world as world
from jaxsteer.prompts import encode_turns
from jaxsteer.statistics import spearman
from jaxsteer.writers.writer import Rule
from tests.axis.conftest import planted_roles
from tests.helpers.tiny import tiny_model

Planted = tuple[Path, AxisRun]


def assistantness(found: AxisRun) -> np.ndarray:
    return np.asarray([world.ASSISTANTNESS[place.name] for place in found.result.roles])


def test_the_planted_order_is_found(planted: Planted):
    _, found = planted
    result, truth = found.result, assistantness(found)
    assert spearman(np.asarray([place.position for place in result.roles]), truth) > 0.9
    assert spearman(np.asarray(result.layer.pc1), truth) > 0.9
    assert all(result.default.position > place.position for place in result.roles)  # at the extreme
    assert result.target != "blocks.5.hook_resid_post"  # the last one is about the next token
    assert result.layer.halves == max(layer.halves for layer in result.layers[:-1])
    assert result.layer.order > 0.9 and abs(result.layer.shuffled_order) < 0.5
    assert result.layer.rating is not None and result.layer.rating > 0.9 and result.rating_p == 1 / 2001


def test_the_axis_is_the_planted_direction_among_the_roles(planted: Planted):
    """Outside of what tells roles apart the Assistant differs from all of them: it has no system message."""
    _, found = planted
    vectors = found.role_vectors.arrays["blocks.4.hook_resid_post"].astype(np.float64)
    roles, names = vectors[:-1] - vectors[:-1].mean(0), found.role_vectors.names
    truth = np.asarray([world.ASSISTANTNESS[name] for name in names])
    direction = (truth - truth.mean()) @ roles
    span = np.linalg.svd(roles, full_matrices=False)[2][: len(names) - 1]
    axis_ = vectors[-1] - vectors[:-1].mean(0)
    assert cosine(span.T @ (span @ axis_), direction) > 0.9
    shuffled = np.random.default_rng(0).permutation(truth - truth.mean()) @ roles
    assert abs(cosine(span.T @ (span @ axis_), shuffled)) < 0.6


def test_vectors_are_means_over_what_was_said(organism: Model, planted: Planted):
    """Against the definition, text by text: float64 means of the stream over the assistant's tokens."""
    import jaxsteer

    folder, found = planted
    site, name = "blocks.2.hook_resid_post", found.role_vectors.names[3]
    means = []
    for one in found.transcripts:
        if one.role == name:
            turns = encode_turns(organism.tokenizer, [dict(m) for m in one.messages], generation_prompt=False)
            states = jaxsteer.capture(organism, turns.ids[None], sites=[site])[site][0]
            means.append(np.asarray(states, np.float64)[turns.mask("assistant")].mean(0))
    assert len(means) == 12
    np.testing.assert_allclose(found.role_vectors.arrays[site][3], np.mean(means, 0), atol=1e-4)
    np.testing.assert_allclose(
        found.role_vectors.errors[site][3], np.std(means, 0, ddof=1) / np.sqrt(12), rtol=1e-3, atol=1e-4
    )
    assert found.axis.metadata["kind"] == "assistant axis" and found.axis.metadata["site"] == found.result.target
    assert load_axis(folder).metadata == found.axis.metadata and axis_sites(found.axis, organism) == (
        found.result.target,
    )
    axis_ = found.role_vectors.arrays[site][-1] - found.role_vectors.arrays[site][:-1].mean(0)
    np.testing.assert_allclose(found.axis.arrays[site], axis_, atol=1e-5)
    projections = (
        json.loads(found.axis.metadata["default_projection"]),
        json.loads(found.axis.metadata["roles_projection"]),
    )
    assert projections[0][site] - projections[1][site] == pytest.approx(np.linalg.norm(axis_), rel=1e-5)


def files(folder: Path) -> dict[str, bytes]:
    """All files but the one with times in it, which is compared without them."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    metrics = json.loads(found.pop("metrics.json"))
    metrics.pop("seconds")
    return found | {"metrics": json.dumps(metrics).encode()}


SMALL = WritingOptions(prompts=1, max_new_tokens=8)
SMALL_RUN = {"writing": SMALL, "layers": (2, 4), "least": 2}


def small_roles() -> RoleSet:
    whole = planted_roles(6)
    return dataclasses.replace(whole, roles=whole.roles[::4], default=("", ""))


@contextlib.contextmanager
def small_shards() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jaxsteer.axis.rollouts.SHARD", 16)
        patched.setattr("jaxsteer.axis.states.SHARD", 16)
        yield patched


@pytest.fixture(scope="module")
def small(organism: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AxisRun]:
    """A run of few roles in several shards, and its directory."""
    out = tmp_path_factory.mktemp("small") / "run"
    with small_shards():
        return out, axis.run(organism, small_roles(), out=out, **SMALL_RUN)


class Killed(BaseException):
    """Ends the process in the middle, like kill -9."""


@pytest.mark.parametrize("stage", ["rollouts", "states", "geometry", "files"])
def test_a_run_that_was_cut_off_gives_the_same_files(organism: Model, small: Planted, tmp_path: Path, stage: str):
    whole, _ = small
    module, name, dies = {
        "rollouts": ("jaxsteer.axis.rollouts", "_written", 2),
        "states": ("jaxsteer.axis.states", "read_rows", 2),
        "geometry": ("jaxsteer.axis.pipeline", "analysed", 1),
        "files": ("jaxsteer.axis.pipeline", "save_vectors", 1),
    }[stage]
    real, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == dies:
            raise Killed
        return real(*args, **kwargs)

    with small_shards() as patched, pytest.raises(Killed):
        patched.setattr(f"{module}.{name}", dying)
        axis.run(organism, small_roles(), out=tmp_path / "cut", **SMALL_RUN)
    with small_shards():
        again = axis.run(organism, small_roles(), out=tmp_path / "cut", **SMALL_RUN)
    assert files(tmp_path / "cut") == files(whole)
    assert load_run(whole).result.table() == again.result.table()


def test_one_device_or_eight(small: Planted):
    """Same rollouts, same numbers but for the last bits of sums."""
    import jaxsteer

    assert len(jax.devices()) == 8
    spread = jaxsteer.load("organism:persona", mesh=jaxsteer.make_mesh(prompts=8, model=1))
    with small_shards():
        several, (_, alone) = axis.run(spread, small_roles(), **SMALL_RUN), small
    assert [one.said for one in several.transcripts] == [one.said for one in alone.transcripts]
    for site, array in alone.role_vectors.arrays.items():
        np.testing.assert_allclose(several.role_vectors.arrays[site], array, atol=2e-4)
    assert [place.name for place in several.result.roles] == [place.name for place in alone.result.roles]


def test_rollouts_of_several_turns_and_brought_along(organism: Model, tmp_path: Path):
    roles = dataclasses.replace(small_roles(), follow_ups=("What do you think of bread?",))
    found = axis.run(organism, roles, out=tmp_path / "a", writing=SMALL, layers=(4,), least=2)
    assert all([m["role"] for m in one.messages[-4:]] == ["user", "assistant"] * 2 for one in found.transcripts)
    assert all(one.messages[-2]["content"] == "What do you think of bread?" for one in found.transcripts)
    again = axis.run(
        organism, roles, transcripts=tmp_path / "a" / "transcripts.jsonl", layers=(4,), least=2, writing=SMALL
    )
    site = "blocks.4.hook_resid_post"
    np.testing.assert_array_equal(again.role_vectors.arrays[site], found.role_vectors.arrays[site])


def test_a_judge_filters_and_says_what_it_changes(organism: Model, planted: Planted):
    """A judge that knows the truth leaves fantastical words to fantastical roles."""

    def write(messages) -> str:
        said = messages[0]["content"].rpartition("[Reply]")[2]
        return "3" if sum(word in said for word in world.FANTASTICAL) else "I would say 1."

    _, found = planted
    judged = axis.run(
        organism, planted_roles(), transcripts=found.transcripts, judge=Rule(write=write, name="truth"), layers=(4,),
        least=3,
    )  # fmt: skip
    fantastical = [one for one in judged.transcripts if any(w in one.said for w in world.FANTASTICAL) and one.score]
    assert judged.result.filter is not None and judged.result.filter.kept <= len(fantastical)
    assert judged.result.filter.scores.keys() == {"1", "3"}
    assert judged.result.left_out and all(n < 3 for n in judged.result.left_out.values())
    assert {"consultant", "editor"} & judged.result.left_out.keys()
    assert 0.3 < judged.result.filter.cosine < 1

    few = dataclasses.replace(planted_roles(), roles=planted_roles().roles[::5])
    names = {role.name for role in few.roles} | {"default"}
    some = [one for one in found.transcripts if one.role in names]
    words = axis.run(organism, few, transcripts=some, judge="words", keep=1, layers=(4,))
    told = {one.role: one.score for one in words.transcripts if one.score is not None}
    assert told and set(told.values()) <= {1, 3}


def test_what_is_refused(organism: Model, tmp_path: Path, planted: Planted):
    roles = small_roles()
    _, found = planted
    with pytest.raises(UserError, match="gives .* replies the same score, 2"):
        axis.run(organism, planted_roles(), transcripts=found.transcripts, judge=Rule(write=lambda m: "2"), least=2)
    with pytest.raises(UserError, match="no block 6: .* blocks 0 to 5"):
        axis.run(organism, roles, layers=(6,), writing=SMALL)
    with pytest.raises(UserError, match="role 'robot', which is not in planted"):
        axis.run(
            organism, roles, transcripts=[Transcript(role="robot", messages=({"role": "assistant", "content": "x"},))]
        )
    with pytest.raises(UserError, match="holds another run's files .*seed"):
        axis.run(organism, roles, out=tmp_path / "a", writing=SMALL, layers=(4,), least=2)
        axis.run(organism, roles, out=tmp_path / "a", writing=SMALL, layers=(4,), least=2, seed=1)
    with pytest.raises(UserError, match="the Assistant as it is would have 12 rollouts and needs at least 50"):
        axis.run(organism, roles, writing=SMALL, layers=(4,), least=50)
    with pytest.raises(UserError, match="2 of 2 roles would have .* an axis needs 4 such roles"):
        axis.run(organism, dataclasses.replace(roles, roles=roles.roles[:2]), writing=SMALL, layers=(4,), least=2)
    tokenizer = copy.deepcopy(tiny_model().tokenizer)
    tokenizer.chat_template = None
    mute = dataclasses.replace(tiny_model(), tokenizer=tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        axis.run(mute, roles, writing=SMALL)


def test_every_question_meets_its_instructions_in_turn():
    roles = RoleSet(
        name="r", questions=("a", "b", "c"), default=("", "You are {model_name}."),
        roles=(Role(name="x", instructions=("1", "2", "3", "4")),),
    )  # fmt: skip
    asked = plan(roles, WritingOptions(prompts=2), "models/Some-Model-2B.Q4_1.gguf")
    assert [(one.question, one.prompt) for one in asked if one.role == "x"] == [
        (0, 0), (0, 1), (1, 2), (1, 3), (2, 0), (2, 1),
    ]  # fmt: skip
    default = [one.system for one in asked if one.role == "default"]
    assert default == ["", "You are Some-Model-2B."] * 3


def test_what_says_nothing_has_no_states(organism: Model, tmp_path: Path):
    said = Transcript(role="x", messages=({"role": "user", "content": "Hm"}, {"role": "assistant", "content": "Yes."}))
    mute = dataclasses.replace(said, messages=(said.messages[0], {"role": "assistant", "content": ""}))
    found = read_states(organism, [mute, said, mute], ["blocks.1.hook_resid_post"], tmp_path)
    assert found.rows().tolist() == [1] and found.at("blocks.1.hook_resid_post").shape == (1, 128)
    (tmp_path / "t.jsonl").write_text(json.dumps(said.to_json()) + "\n")
    assert read_transcripts(tmp_path / "t.jsonl") == [said]
    assert pipeline.TRANSCRIPTS == "transcripts.jsonl"


def test_a_run_has_a_page(planted: Planted, capsys: pytest.CaptureFixture[str]):
    folder, found = planted
    assert Report(directory=folder).run() == 0
    printed = capsys.readouterr().out
    assert f"Report: {folder / 'report.html'}" in printed and found.result.target in printed
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f'data-mark="role-{i}"' in page for i in range(len(found.result.roles)))
    with pytest.raises(UserError, match="here are none"):
        Report(directory=folder, attribute=True).run()


def test_example_replies_answer_the_same_two_questions(planted: Planted):
    result = planted[1].result
    asked: dict[str, list[str]] = {}
    for reply in result.replies:
        asked.setdefault(reply.question, []).append(reply.role)
    ends = [place.name for place in (*result.roles[:4], *result.roles[-4:])]
    assert list(asked.values()) == [["default", *ends]] * 2


def test_two_runs_are_compared_by_the_order_of_their_roles(planted: Planted, tmp_path: Path, capsys):
    folder, found = planted
    likeness = axis.compare(found.result, found.result)
    assert likeness.positions == likeness.pc1 == pytest.approx(1) and likeness.shared == 24
    few = dataclasses.replace(found.result, roles=found.result.roles[:3])
    with pytest.raises(UserError, match="share 3 roles: at least 4"):
        axis.compare(found.result, few)
    assert Compare(runs=(folder, folder)).run() == 0
    assert "24 roles of both" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="no finished result"):
        Compare(runs=(folder, tmp_path)).run()
