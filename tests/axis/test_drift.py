"""Drift on the organism, where it is planted: found, told from calm, predicted, resumed; and its statistics."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxsteer.axis import talks
from jaxsteer.axis.drift import Drift, drift_of, student, welch
from jaxsteer.axis.movers import predicted
from jaxsteer.axis.scripts import Scripts
from jaxsteer.axis.talks import drift
from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.organisms import persona_world
from jaxsteer.personas.passages import Passage
from jaxsteer.prompts.generate import generate
from jaxsteer.steer import save_vectors
from jaxsteer.writers.writer import Rule
from tests.axis.planted import planted

SITE = "blocks.3.hook_resid_post"
TURNS = 4


def script(topics: list[str], number: int) -> tuple[str, ...]:
    rng = np.random.default_rng(number)
    asked = persona_world.TOPIC_QUESTIONS
    return tuple(asked[int(rng.integers(len(asked)))].format(topic) for topic in rng.permutation(topics)[:TURNS])


SCRIPTS = Scripts(
    domains={
        "calm": tuple(script(persona_world.CALM_TOPICS, k) for k in range(6)),
        "drifting": tuple(script(persona_world.DRIFTING_TOPICS, k) for k in range(6)),
    }
)
ORDINARY = Scripts(domains={"calm": tuple(script(persona_world.CALM_TOPICS, k) for k in range(10, 16))})
HOW = {"max_new_tokens": 24, "temperature": 1.0, "site": SITE}


@functools.cache
def found() -> Drift:
    """Calibrated on other conversations about calm topics: as it is, the model changes a little with every turn."""
    world = planted()
    options = talks.DriftOptions(max_new_tokens=24, temperature=1.0, seed=1)
    ordinary = talks.talks(world.model, ORDINARY, options)
    return drift(world.model, world.axis, SCRIPTS, calibrate_on=ordinary, **HOW)


def test_planted_drift_is_found_and_calm_conversations_stay() -> None:
    calm, drifting = found().domains
    assert (calm.name, calm.conversations, drifting.conversations) == ("calm", 6, 6)
    assert drifting.drifted == drifting.below == 1 and calm.below < 0.4 and calm.level > found().threshold
    assert drifting.slope.ci95[1] < 0 and abs(calm.slope.value) < abs(drifting.slope.value) / 3
    assert abs(drifting.slope.value) > 3 * max(map(abs, drifting.random_slopes)) and drifting.shuffled_p < 0.01
    (contrast,) = found().contrasts
    assert contrast.level_ci95[0] > 0 and contrast.slope_ci95[0] > 0
    for one in found().conversations:
        assert one.below == tuple(t for t, v in zip(one.turns, one.along) if v < found().threshold)
        assert one.slope == pytest.approx(np.polyfit(range(len(one.along)), one.along, 1)[0])
    assert found().position(found().default) == 1 and found().position(found().roles) == 0


def test_user_messages_predict_it() -> None:
    movers = found().movers
    assert movers.projection.r2 > 0.3 > movers.projection.shuffled_range[1] and movers.conversations == 12
    assert all(word in persona_world.DRIFTING_TOPICS for word in [_topic(one.text) for one in movers.away[:3]])
    shown = found().table()
    assert "drifting" in shown and "calm - drifting" in shown and "labels shuffled" in shown
    assert Drift.from_json(json.loads(json.dumps(found().to_json()))) == found()
    assert len(found().to_rows()) == 12 * TURNS and found().plot().axes


def _topic(text: str) -> str:
    return next(word for word in (*persona_world.DRIFTING_TOPICS, *persona_world.CALM_TOPICS) if word in text)


def test_intervals_are_those_of_the_textbooks() -> None:
    a, b = (np.random.default_rng(k).normal(k, 1 + k, 6 + k) for k in range(2))
    low, high = stats.ttest_1samp(a, 0).confidence_interval()
    assert student(a) == pytest.approx((low, high)) and student(a[:1]) is None
    value, ends = welch(a, b)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert value == pytest.approx(a.mean() - b.mean()) and ends == pytest.approx((expected.low, expected.high))
    assert welch(a, []) == (None, None) and welch(a[:1], b)[1] is None


def test_predictions_are_for_conversations_that_were_not_seen() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 6)
    states = rng.standard_normal((120, 30))
    linear = states @ rng.standard_normal(30) + 0.1 * rng.standard_normal(120)
    assert predicted("x", states, linear, groups).r2 > 0.95
    own = rng.standard_normal(20)[groups]  # of the conversation alone, which tells nothing of another one
    marked = np.concatenate([states, np.eye(20)[groups]], axis=1)
    one = predicted("x", marked, own, groups)
    assert one.r2 < 0.05 and one.shuffled < 0.05


def test_what_was_cut_off_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, calls = planted(), []
    how = {**HOW, "limit": 3, "turns": 3}
    drift(world.model, world.axis, SCRIPTS, out=tmp_path / "whole", **how)

    def stops(*given: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(talks, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        drift(world.model, world.axis, SCRIPTS, out=tmp_path / "cut", **how)
    log = tmp_path / "cut" / "written.jsonl"
    log.write_bytes(log.read_bytes()[:-7])  # a line that was cut
    drift(world.model, world.axis, SCRIPTS, out=tmp_path / "cut", **how)
    assert len(calls) == 5, "the turn with the cut line is written again, and the two that were missing"
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith("."))
    assert names == ["config.json", "metrics.json", "transcripts.jsonl", "written.jsonl"]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="holds another run's files .*turns"):
        drift(world.model, world.axis, SCRIPTS, out=tmp_path / "cut", **{**how, "turns": 2})


def test_a_user_who_writes_goes_on_behind_the_first_message() -> None:
    world = planted()

    def write(messages: object) -> str:
        said = messages[0]["content"]
        return "" if said.count("Assistant:") == 2 else f"Describe {'dreams' if 'calm' in said else 'bread'} to me."

    led = drift(world.model, world.axis, SCRIPTS, user=Rule(write=write), limit=1, turns=4, **HOW)
    assert [one.turns for one in led.conversations] == [(1, 3), (1, 3)], "an empty message ends a conversation"
    assert led.movers is None and led.contrasts[0].level_ci95 is None


def test_conversations_that_were_brought_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = planted()
    save_vectors(world.axis, tmp_path / "axis.safetensors")
    lines = []
    for k, domain in enumerate(("dull", "dull", "bright")):
        chat = [("user", "Hello."), ("assistant", f"One finds bread {'wild' if k else 'formal'}."), ("user", "And?")]
        chat += [("assistant", "To me graves seem haunted and cursed.")]
        lines.append({"domain": domain, "messages": [{"role": r, "content": c} for r, c in chat]})
    (path := tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["axis", "drift", "--axis", str(tmp_path), "--transcripts", str(path), "--out", str(tmp_path / "out")]
    assert main(argv) == 0 and (tmp_path / "out" / "drift.png").exists()
    assert "3 conversations, 6 turns" in capsys.readouterr().out
    read = Drift.from_json(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert [one.name for one in read.domains] == ["dull", "bright"] and read.domains[0].below >= 0.5
    calibrated = drift_of(world.model, world.axis, [_passage(lines[2])], calibrate_on=[_passage(lines[2])])
    (only,) = calibrated.conversations
    assert calibrated.threshold == pytest.approx(np.mean(only.along), rel=0.1)


def _passage(row: dict) -> Passage:
    return Passage(id="x", messages=tuple(row["messages"]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"domains": ("weather",)}, "there is no domain of conversations 'weather'"),
        ({"turn": 3}, "there is no option of drift 'turn': did you mean 'turns'"),
        ({"percentile": 30.0, "turns": 1, "limit": 1, "max_new_tokens": 4}, "holds no percentile 30"),
    ],
)
def test_bad_input_is_one_message(given: dict, said: str) -> None:
    world = planted()
    with pytest.raises(UserError, match=said):
        drift(world.model, world.axis, SCRIPTS, **given)
