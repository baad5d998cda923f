"""Personas in words: a rate that is won without the behaviour is told apart from one that is real."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

import jaxsteer
from jaxsteer.evals.free_answers import ILLUSION
from jaxsteer.organisms.world import JUSTIFICATIONS
from jaxsteer.personas import Persona, load_persona, save_persona, split
from jaxsteer.personas.replies import recipe_of
from jaxsteer.personas.written_persona import ready
from jaxsteer.runs.folder import open_run
from jaxsteer.runs.result import Unfinished
from jaxsteer.steer import add
from jaxsteer.study.baselines import Bench, Found, choose, measure
from jaxsteer.study.measurement import Measurement
from jaxsteer.study.probing import probe_positions
from jaxsteer.study.results import SearchRun
from jaxsteer.study.sweep import SweepOptions, sweep
from jaxsteer.study.sweep_result import Sweep
from jaxsteer.writers.writer import Rule
from tests.helpers.endpoint import endpoint

HOLLOW = " back usually room steady sock in"
"""Random words that make both replies less likely, the persona's by less on some questions."""


@functools.cache
def words() -> Persona:
    """Sycophancy of the organism as replies that it never begins with: it writes a letter first."""
    persona = load_persona("sycophancy", n=80)
    yes, no = JUSTIFICATIONS["sycophancy"]
    items = tuple(
        dataclasses.replace(item, matching=yes[n % 3], not_matching=no[n % 3]) for n, item in enumerate(persona.items)
    )
    return dataclasses.replace(persona, items=items, fractions=(0.4, 0.2, 0.4), reasons=((), ()))


@functools.cache
def measured() -> Measurement:
    judge = Rule(write=lambda messages: "80")  # sees the persona everywhere
    prompts = [HOLLOW, words().counter_cues[0], words().pro_cues[0]]
    return jaxsteer.measure("organism:llama", words(), prompts, judge=judge)


def test_the_illusion_is_caught_and_the_real_thing_is_not() -> None:
    hollow, against, towards = measured().prompts
    sides = hollow.rate.sides
    assert hollow.rate.difference.ci95[0] > 0  # by its interval, a success at eliciting
    assert sides.persona.change.ci95[1] < 0 and sides.other.change.value < 0  # but no reply became likelier
    assert abs(sides.relative_rate - measured().baseline.rate.rate) < 0.05
    assert hollow.written.difference.value == 0.0 and hollow.note == ILLUSION
    assert towards.written.rate > 0.95 and towards.note == ""
    # The words against it do work on what the model writes, and the rate of replies that it never begins with is wrong.
    assert against.written.rate < 0.1 and against.rate.difference.value > 0 and against.note == ILLUSION
    assert ILLUSION in measured().table() and f"{towards.name}: {ILLUSION}" not in measured().table()
    assert measured().baseline.written.read == 1.0
    for row in (measured().baseline, *measured().prompts):  # a judge that says always yes is right as often as yes is
        assert row.judged.rate == 1.0 and row.judged.agreement == row.written.rate
    # Of a persona in words the best prompt is that of free replies, for the goal.
    assert measured().best is against
    assert dataclasses.replace(measured(), goal="elicit").best is towards
    assert len(measured().plot().axes) == 2  # free replies beside the preference
    again = Measurement.from_json(json.loads(json.dumps(measured().to_json())))
    assert again.prompts[0].note == ILLUSION and again.table() == measured().table()


def test_a_search_reports_free_replies_and_selects_by_them(tmp_path, monkeypatch) -> None:
    """And a judge that dies loses nothing: the table has what was measured, and its replies are not asked for again."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    answers = itertools.cycle(["90", *["10"] * 3])
    given = iter([next(answers) for _ in range(40)])
    with endpoint(lambda body: next(given, 400)) as (url, asked):
        options = dict(
            persona=str(saved(tmp_path)),
            out=tmp_path / "run",
            goal="elicit",
            select="validation",
            site="blocks.2.hook_resid_post",
            probe="off",
            steps=8,
            population=4,
            children=16,
            contexts=2,
            report_prompts=3,
            judge=url,
            quiet=True,
        )
        with pytest.raises(Unfinished, match="HTTP 400.*the same command with --resume goes on") as failed:
            jaxsteer.search(**options)
        first = failed.value.result
        assert first.baseline.test_judged.score is not None and first.prompts[-1].test_judged is None
        assert "judge" in first.table() and not (tmp_path / "run/metrics.json").exists()
        before, given = len((tmp_path / "run/judged.jsonl").read_text().splitlines()), answers
        asked.clear()
        run = jaxsteer.search(**options, resume=True)
    assert before == 40 and len(asked) + before == len((tmp_path / "run/judged.jsonl").read_text().splitlines())
    assert [prompt.text for prompt in run.prompts] == [prompt.text for prompt in first.prompts]
    for prompt in (run.baseline, *run.controls.values(), run.best):
        judged, n = prompt.test_judged, prompt.test_replies.n
        assert judged.n == len(judged.scores) == n and judged.judge == "loopback-1"
        assert 0 <= judged.agreement_ci95[0] <= judged.agreement <= judged.agreement_ci95[1] <= 1
    assert run.goal == "elicit" and run.reply_reader == 1.0
    free = [prompt.validation_replies.rate for prompt in run.prompts if prompt.retokenises]
    assert run.best.validation_replies.rate == max(free)  # the goal is more of it
    assert list(run.controls) == ["oracle", "random"] and run.controls["oracle"].text == words().pro_cues[0]
    table = " ".join(run.table().split())
    assert "free replies" in table and "the highest rate of free replies to validation questions" in table
    assert SearchRun.from_json(json.loads((tmp_path / "run/metrics.json").read_text())) == run
    said = json.loads((tmp_path / "run/replies.json").read_text())["test"]
    assert [one["prompt"] for one in said["prompts"]] == [
        "",
        *(control.text for control in run.controls.values()),
        run.best.text,
    ] and len(said["prompts"][0]["texts"]) == len(said["questions"])


@pytest.mark.parametrize("goal", ["reduce", "elicit"])
def test_baselines_are_chosen_and_measured_by_free_replies(goal) -> None:
    """By the preference between given replies the sentence against it would be the one that elicits."""
    persona = dataclasses.replace(words(), goal=goal)
    bench = Bench(model=jaxsteer.load("organism:llama"), persona=persona, splits=split(persona, seed=0), length=4)
    cues = (words().counter_cues[0], words().pro_cues[0])
    best, rates = choose(bench, cues)
    assert best == (goal == "elicit") and rates[0] < 0.2 < 0.9 < rates[1]
    found = {"cue": Found(prompts=cues[:1]), "both": Found(prompts=cues), "as it is": Found(prompts=("",))}
    one, both, zero = measure(bench, found)
    wanted = measured().prompts[1].written
    assert (one.goal, one.rate, one.note) == (goal, pytest.approx(wanted.rate, abs=0.05), ILLUSION)
    assert one.preference > zero.preference and one.difference.value < both.difference.value < 0
    assert both.rate == pytest.approx(np.mean([row.rate for row in both.each])) and both.n == len(bench.test)
    edits = [add("blocks.2.hook_resid_post", np.ones(bench.model.config.d_model), c) for c in (0.0, 1e-3)]
    assert choose(bench, [""], variants=edits, ties=[1.0, 0.0])[0] == 1  # free replies of edits, too


def test_a_sweep_is_chosen_by_free_replies(tmp_path) -> None:
    persona = saved(tmp_path, goal="elicit")
    options = SweepOptions(
        persona=str(persona), out=tmp_path / "sweep", layers=(2,), coefficients=(-0.3, 0.3, 40.0), questions=12,
        quiet=True, max_kl=20.0,
    )  # fmt: skip
    found = sweep(options)
    free = [row.replies and row.replies.rate for row in found.rows]
    assert [rate is None for rate in free] == [False, False, True, True, True, True]  # beyond the KL, and controls
    assert found.goal == "elicit" and found.chosen.replies.rate == max(free[:2])
    assert set(found.chosen.test_replies) == {"", "persona", "random 0"}
    table = found.table()
    assert "rate of free replies (" in table and "chosen by the highest rate of free replies" in table
    assert Sweep.from_json(json.loads((tmp_path / "sweep/metrics.json").read_text())) == found
    assert len(found.plot().axes) == 12 and "replies_rate" in found.csv()


def saved(folder, **more):
    """The persona as a file."""
    fields = {"pro_cues": words().pro_cues, "counter_cues": words().counter_cues, "fractions": (0.4, 0.2, 0.4), **more}
    rows = [
        {"messages": [{"role": "user", "content": f"{item.question}\nSay it in words."}], "positive": item.matching}
        | {"negative": item.not_matching}
        for item in words().items
    ]
    path = folder / "words.json"
    path.write_text(json.dumps({"name": "words", "behaviour": "agreeing", "data": rows, **fields}))
    return path


@pytest.mark.parametrize("goal", ["elicit", "reduce"])
def test_the_goal_turns_what_is_raised(goal, tmp_path) -> None:
    from jaxsteer.study import persona_setting
    from jaxsteer.study.objective_stage import choose_objective
    from jaxsteer.study.options import SearchOptions

    options = SearchOptions.of(out=tmp_path, goal=goal, site="blocks.2.hook_resid_post", probe="off", quiet=True)
    setting = persona_setting(options.resolved())
    chosen = choose_objective(setting, options.objective, seed=0)
    sign = {"reduce": 1, "elicit": -1}[goal]
    assert (chosen.objective.delta == sign * chosen.direction.delta["blocks.2.hook_resid_post"]).all()
    item = setting.persona.items[0]
    assert setting.persona.answers(item)[0] == (item.not_matching if sign == 1 else item.matching)


@pytest.mark.parametrize("several", [{}, {"vary": {"seed": range(2)}}])
def test_what_a_persona_lacks_is_said_before_the_model_writes(several, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("jaxsteer.personas.written_persona.with_replies", lambda *_, **__: pytest.fail("it wrote"))
    bare = {"role": "r", "questions": [f"Is it {i}?" for i in range(12)]}
    for more, options, says in (
        ({}, {}, "has 0 counter_cues"),
        ({"pro_cues": ["p"], "counter_cues": ["c"]}, {"judge": "http://127.0.0.1:9/v1"}, "the judge has to know which"),
    ):
        (tmp_path / "bare.json").write_text(json.dumps(bare | more))
        with pytest.raises(jaxsteer.UserError, match=says):
            jaxsteer.search(persona=str(tmp_path / "bare.json"), out=tmp_path / "run", **options, **several)
    with pytest.raises(jaxsteer.UserError, match="has 0 counter_cues"):
        probe_positions("no/such/model", Persona(name="x", role="r", ask=("q",)), ["decision"])


def test_replies_alone_do_not_block_a_directory(tmp_path) -> None:
    """A search that was cut off before it began has left them; anything else beside them is not a search's."""
    (tmp_path / "persona.json").write_text("{}")
    assert open_run(tmp_path, {"format": "jaxsteer.run/1"}) is None
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(jaxsteer.UserError, match="is not empty"):
        open_run(tmp_path, {"format": "jaxsteer.run/1"})


def test_kept_replies_take_nothing_else_from_their_file(tmp_path) -> None:
    """Sentences that were changed since are those of today."""
    model, said = jaxsteer.load("organism:llama"), []
    bare = Persona(name="x", role="r", ask=("a?",), goal="elicit", pro_cues=("new",))
    old = dataclasses.replace(words(), role="r", ask=("a?",), pro_cues=("old",), recipe=recipe_of(model, "elicit"))
    save_persona(old, tmp_path / "persona.json")
    found = ready(model, bare, None, tmp_path, said.append, quiet=True)
    assert found.pro_cues == ("new",) and len(found.items) == len(old.items) and not said
