"""Caps on the organism: they hold the Assistant's words at little cost, and random axes do not; their identities."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.axis import cap_study
from jaxsteer.axis.cap_result import CapResult
from jaxsteer.axis.cap_study import Capping, cap
from jaxsteer.axis.caps import calibrate_caps, cap_sites, mean_displacement
from jaxsteer.axis.projection import along, encoded, project, units
from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.organisms import persona_world
from jaxsteer.prompts.generate import generate
from jaxsteer.runs.result import Unfinished
from jaxsteer.steer import load_vectors, save_vectors
from jaxsteer.steer.vectors import random_arrays
from jaxsteer.writers.writer import Rule
from tests.axis.planted import planted, professional
from tests.helpers.tiny import tiny_model

HOW = {
    "layers": (0, 5),
    "roles": 6,
    "questions": 2,
    "max_new_tokens": 24,
    "percentiles": (75.0,),
    "strengths": (0.3,),
    "items": 6,
    "random": 1,
    "ordinary": 8,
    "dataset": "refusal",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The directory of an axis, and that of its caps, written by the command."""
    world, folder = planted(), tmp_path_factory.mktemp("caps")
    save_vectors(world.axis, folder / "axis.safetensors")
    world.roles.save(folder / "role_vectors.safetensors")
    lines = [{"role": one.group, "messages": [dict(m) for m in one.messages]} for one in world.rollouts]
    (folder / "transcripts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["axis", "cap", "--axis", str(folder), "--out", str(folder / "whole"), "--layers", "0", "5", "--roles", "6"]
    argv += ["--questions", "2", "--max-new-tokens", "24", "--percentiles", "75", "--strengths", "0.3"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*argv, "--dataset", "refusal", "--items", "6", "--random", "1", "--ordinary", "8"]) == 0
    assert "percentile 25 of 12 rollouts of default" in " ".join(printed.getvalue().split())
    (folder / "whole" / "caps.png").unlink()
    return folder, folder / "whole"


@pytest.fixture(scope="module")
def found(whole: tuple[Path, Path]) -> Capping:
    """What stands in the directory."""
    return cap(planted().model, whole[0], out=whole[1], **HOW)


def drifted() -> list[list[dict[str, str]]]:
    """Conversations with two turns about drifting topics behind them, and a calm question."""
    rng, chats = np.random.default_rng(0), []
    for calm in persona_world.CALM_TOPICS[:12]:
        turns: list[dict[str, str]] = []
        for drifts in (1, 2):
            topic = persona_world.DRIFTING_TOPICS[int(rng.integers(len(persona_world.DRIFTING_TOPICS)))]
            asked, said = persona_world.topic_turn(rng, topic, drifts=drifts)
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        chats.append([*turns, {"role": "user", "content": f"Tell me about {calm}."}])
    return chats


def test_caps_restore_the_assistants_words_and_random_axes_do_not(found: Capping) -> None:
    """When it was made: 59 % of the way back, in conversations that had drifted, at 0.001 nats."""
    world, result, chats = planted(), found.result, drifted()
    random = dataclasses.replace(world.axis, arrays=random_arrays(world.axis.arrays, 0))
    other = calibrate_caps(world.model, random, world.rollouts, layers=(0, 5)).caps(random, 25)

    def words(chats: list, edits: object) -> float:
        how = {"samples": 6, "seed": 3, "temperature": 1.0, "max_new_tokens": 24, "edits": edits}
        return professional(list(generate(world.model, chats, **how).texts))

    fresh = words([chat[-1:] for chat in chats], None)
    plain, held, moved = (words(chats, edits) for edits in (None, found.caps.edits(), other.edits()))
    assert fresh - plain > 0.35, "there is drift to be held"
    assert held - plain > 0.4 * (fresh - plain) and abs(moved - plain) < 0.1 * (fresh - plain)
    row = result.row("cap, percentile 25")
    assert row.kl < 0.01 and row.kl <= result.row("cap, percentile 75").kl
    assert result.row("cap on PC2").vectors == world.roles.component(2).sign, "taken from the directory by itself"
    assert row.moved_ci95[0] > 0 and result.row("").kl is None and result.row("").changed is None
    assert row.position == pytest.approx(result.row("").position + row.moved, abs=1e-6)
    for one in result.rows:
        if one.name.startswith("cap on random"):
            assert one.moved < row.moved / 2
    pushed, other = result.row("axis x 0.3"), result.row("random axis 1 x 0.3")
    assert pushed.moved > other.moved and other.vectors == "random" and other.kl > 0, "beside a random one of its size"


def test_what_is_reported_is_what_the_parts_give(found: Capping) -> None:
    world, result = planted(), found.result
    caps = found.caps
    assert caps.operation == "floor" and caps.sites == result.sites == cap_sites(world.model, world.axis, (0, 5))
    own = project(world.model, world.axis, world.rollouts, sites=caps.sites).passages
    for site in caps.sites:
        expected = np.percentile([p.along(site) for p in own if p.group == "default"], 25)
        assert caps.values[site] == pytest.approx(expected, abs=1e-3)
    held = result.row("cap, percentile 25")
    texts = [[{"role": "user", "content": text}] for text in result.ordinary]
    made = generate(world.model, texts, temperature=0, max_new_tokens=24, edits=caps.edits()).texts
    assert tuple(text.strip() for text in made) == held.answers
    moved = [a != b for a, b in zip(held.answers, result.row("").answers, strict=True)]
    assert held.changed == pytest.approx(np.mean(moved))
    assert CapResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert "addition, equal mean" in result.table() and len(result.to_rows()) == len(result.rows)
    assert result.plot().axes


def test_the_projection_never_falls_below_a_cap_and_capping_twice_is_capping_once(found: Capping) -> None:
    world, caps = planted(), found.caps
    rows = [ids for ids, _ in encoded(world.model, world.rollouts[-20:])]
    held = along(world.model, rows, units(caps, caps.sites)[:, None], caps.sites, edits=caps.edits())
    for values in held:
        for site, own in zip(caps.sites, values[:, 0, 1:], strict=True):
            assert own.min() > caps.values[site] - 1e-3 * abs(caps.values[site])
    twice = jaxsteer.steer.Edits((caps.edits(), caps.edits()))
    once = [jaxsteer.logits(world.model, row[None], edits=caps.edits()) for row in rows[:3]]
    again = [jaxsteer.logits(world.model, row[None], edits=twice) for row in rows[:3]]
    for a, b in zip(once, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_addition_adds_what_the_caps_add_on_average(found: Capping) -> None:
    """With one site, the mean of what a floor lifts; with several, each with the caps below it in force."""
    world, caps = planted(), found.caps
    some = world.rollouts[-30:]
    rows = [ids for ids, _ in encoded(world.model, some)]
    addition = mean_displacement(world.model, caps, some)
    first = caps.sites[0]
    free = along(world.model, rows, units(caps, [first])[:, None], [first])
    expected = np.concatenate([np.maximum(caps.values[first] - v[0, 0, 1:], 0) for v in free]).mean()
    assert addition.norm(first) == pytest.approx(expected, rel=1e-4)
    second = caps.sites[1]
    under = along(world.model, rows, units(caps, [second])[:, None], [second], edits=caps.at(first).edits())
    expected = np.concatenate([np.maximum(caps.values[second] - v[0, 0, 1:], 0) for v in under]).mean()
    assert addition.norm(second) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    cosine = addition.arrays[first] @ units(caps, [first])[0] / addition.norm(first)
    assert addition.operation == "add" and cosine == pytest.approx(1, abs=1e-5)


def test_divergence_on_some_tokens_is_that_of_these_tokens(found: Capping) -> None:
    world, caps = planted(), found.caps
    rows = [ids for ids, _ in encoded(world.model, world.rollouts[-3:])]
    masks = [spans[0].mask for _, spans in encoded(world.model, world.rollouts[-3:])]
    one = side_effects(world.model, rows, [caps.edits()], counted=masks)
    total, tokens = 0.0, 0
    for row, mask in zip(rows, masks, strict=True):
        plain, held = (
            np.asarray(jaxsteer.logits(world.model, row[None], edits=edits), np.float64)[0]
            for edits in (None, caps.edits())
        )
        plain, held = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (plain, held))
        before = np.flatnonzero(mask) - 1
        total += float((np.exp(plain) * (plain - held)).sum(-1)[before].sum())
        tokens += len(before)
    assert one.kl[0] == pytest.approx(total / tokens, rel=1e-4) and one.tokens == tokens


def test_what_was_cut_off_goes_on_with_the_same_bytes(
    whole: tuple[Path, Path], found: Capping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run is the command's."""
    world, calls, (axis, complete) = planted(), [], whole

    def stops(*given: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(cap_study, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        cap(world.model, axis, out=tmp_path / "cut", **HOW)
    log = tmp_path / "cut" / "written.jsonl"
    log.write_bytes(log.read_bytes()[:-9])  # a line that was cut
    cap(world.model, axis, out=tmp_path / "cut", **HOW)
    names = sorted(path.name for path in complete.iterdir() if not path.name.startswith("."))
    assert names == ["caps.safetensors", "config.json", "metrics.json", "written.jsonl"]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (complete / name).read_bytes()
    again = cap(world.model, axis, out=tmp_path / "cut", **HOW)
    assert again.result == found.result and again.caps.values == found.caps.values
    caps = load_vectors(tmp_path / "cut" / "caps.safetensors", model=world.model)
    assert caps.operation == "floor" and caps.positions == "all"


def test_a_judge_and_a_dataset_stand_beside(found: Capping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged was measured before."""
    monkeypatch.setattr(cap_study._Bench, "measured", lambda bench, pc2: found)
    world, says = planted(), Rule(write=lambda asked: "2")
    judged = cap(world.model, world.axis, world.rollouts, judge=says, out=tmp_path / "out", **HOW).result
    row = judged.row("cap, percentile 25")
    assert row.judged.score == 2 and row.judged.rate == 1 and 0 <= row.persona <= 1
    assert "assistant, judged" in judged.table() and "persona's answer" in judged.table()
    with pytest.raises(Unfinished, match="no reply of the judge rule") as stopped:
        cap_study._judged(found.result, Rule(write=lambda asked: "well"), None)
    assert stopped.value.result == found.result


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": (3, 9)}, "caps from block 3 to 9: organism:persona has blocks 0 to 5"),
        ({"group": "sailer"}, "there are 0 rollouts of sailer to calibrate caps on"),
        ({"percentil": 3.0}, "there is no option of cap 'percentil': did you mean 'percentile'"),
    ],
)
def test_bad_input_is_one_message(given: dict, said: str) -> None:
    world = planted()
    with pytest.raises(UserError, match=said):
        cap(world.model, world.axis, world.rollouts, **given)


def test_rollouts_and_axes_of_others_are_refused() -> None:
    world = planted()
    with pytest.raises(UserError, match="give a file of them, or the directory of `axis run`"):
        cap(world.model, world.axis)
    other = dataclasses.replace(world.axis, fingerprint="0" * 64)
    with pytest.raises(UserError, match="not on the weights"):
        calibrate_caps(world.model, other, world.rollouts)
    with pytest.raises(UserError, match="belongs to another model"):
        calibrate_caps(tiny_model(), world.axis, world.rollouts)
