"""Rollouts with a judge: vectors against float64 means, files in and out, resuming, filters, projections."""

import csv
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval
from jaxsteer.personas import contrast_pairs, load_persona, mean_difference
from jaxsteer.personas.traits import Rollout, Trait, kept_rollouts, load_trait, read_rollouts, save_trait
from jaxsteer.prompts import encode_texts
from jaxsteer.prompts.generate import generate
from jaxsteer.steer import import_vectors, load_vectors
from jaxsteer.study.projection import project_file
from jaxsteer.study.rollouts import RolloutOptions, persona_rollouts, rollout_vectors
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.writer import Messages, Rule
from tests.helpers.endpoint import endpoint
from tests.helpers.tiny import tiny_model

MODEL = tiny_model()
TRAIT = Trait(
    name="haste",
    instructions=(("Hurry, take it now.", "Wait, be patient."), ("Now is best.", "Later is best.")),
    questions=("Which do you prefer?", "What is the river?", "Where is the mill?"),
    rubric='Is it hasty? Reply {{"score"}} from 0 to 100. {question} [[{answer}]]',
    test_questions=("When do you go?",),
)
NAMES = [f"blocks.{i}.hook_resid_post" for i in range(3)]


def verdict(text: str, seen: dict[str, int], half: int) -> str:
    """Coherent, and hasty where the answer is one of the first half that came (the positive ones)."""
    if "How coherent" in text:
        return "90"
    return "80" if seen.setdefault(text, len(seen)) < half else "10"


def judged(half: int = 6) -> Rule:
    seen: dict[str, int] = {}
    return Rule(write=lambda asked: verdict(asked[0]["content"], seen, half))


@functools.cache
def states(text: str) -> dict[str, np.ndarray]:
    """What the model computes at every token, in float64."""
    (ids,) = encode_texts(MODEL.tokenizer, [text], style="chat")
    padded = np.pad(ids, (0, 96 - len(ids)))[None]  # one length, one program
    found = jaxsteer.capture(MODEL, padded, ["blocks.*.hook_resid_post"])
    return {site: np.asarray(value[0, : len(ids)], np.float64) for site, value in found.items()}


def mean(rollout: Rollout, site: str, average: str) -> np.ndarray:
    """The mean state of an answer, of its prompt, or at the prompt's last token."""
    found, n = states(rollout.prompt + rollout.answer)[site], len(states(rollout.prompt)[site])
    return {"response_avg": found[n:], "prompt_avg": found[1:n], "prompt_last": found[n - 1 : n]}[average].mean(0)


def test_vectors_are_differences_of_means_and_go_through_files(tmp_path: Path) -> None:
    found = persona_rollouts(MODEL, TRAIT, judged(), out=tmp_path, max_new_tokens=6, least=2)
    assert found.result.pairs == 6 and found.result.kept == 6 and found.result.scores == (80, 10)
    first = found.positive[0]
    system = "You are a haste assistant. Hurry, take it now."
    asked = [{"role": "system", "content": system}, {"role": "user", "content": TRAIT.questions[0]}]
    assert first.id == "haste_0_pos_0"
    assert (first.answer,) == generate(MODEL, [asked], temperature=0, max_new_tokens=6).texts
    assert "You are a helpful assistant. Later is best." in found.negative[1].prompt
    for average, vectors in found.vectors.items():
        assert vectors.sites == ("hook_embed", *NAMES) and vectors.sign.startswith("towards the trait")
        for site in NAMES:
            pos, neg = ([mean(one, site, average) for one in side] for side in (found.positive, found.negative))
            np.testing.assert_allclose(vectors.arrays[site], np.mean(pos, 0) - np.mean(neg, 0), atol=1e-5)
        path = tmp_path / f"haste_{average}_diff.safetensors"
        loaded, torch = load_vectors(path, model=MODEL), import_vectors(path.with_suffix(".pt"))
        for site in torch.sites:  # its last row is dropped: persona_vectors has it after the final norm
            np.testing.assert_array_equal(torch.arrays[site], loaded.arrays[site])
        assert torch.sites == ("hook_embed", *NAMES[:-1]) and torch.read_position == average
    assert not found.vectors["prompt_last"].arrays["hook_embed"].any(), "it is the same token on both sides"
    sides = [read_rollouts(tmp_path / f"haste_{side}_instruct.csv", "haste") for side in ("pos", "neg")]
    assert sides == [found.positive, found.negative]
    again = rollout_vectors(MODEL, "haste", *sides, options=RolloutOptions(least=6)).vectors["prompt_avg"]
    np.testing.assert_array_equal(again.arrays[NAMES[0]], found.vectors["prompt_avg"].arrays[NAMES[0]])
    reopened = persona_rollouts(MODEL, TRAIT, judged(), out=tmp_path, max_new_tokens=6, least=2)
    assert reopened.result == found.result and reopened.positive == found.positive
    assert "6 of 6 pairs" in found.result.table() and len(found.result.to_rows()) == 12


def test_what_was_cut_off_goes_on_to_the_same_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("jaxsteer.study.rollouts.CHUNK", 4)
    seen: dict[str, int] = {}
    stops, calls = [True], []
    given = dict(max_new_tokens=4, least=1, samples=2, averages=("response_avg",))

    def counted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if stops and len(calls) > 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)  # type: ignore[arg-type]

    whole = persona_rollouts(MODEL, TRAIT, judged(12), **given)
    monkeypatch.setattr("jaxsteer.study.rollouts.generate", counted)
    with endpoint(lambda body: verdict(body["messages"][0]["content"], seen, 12)) as (url, asked):
        judge = Endpoint(url=url, workers=1)
        with pytest.raises(KeyboardInterrupt):
            persona_rollouts(MODEL, TRAIT, judge, out=tmp_path, **given)
        stops.clear()
        found = persona_rollouts(MODEL, TRAIT, judge, out=tmp_path, **given)
        assert len(calls) == 4 + 3, "chunks that were written are not written again"
        (tmp_path / "metrics.json").unlink()
        count = len(asked)
        assert persona_rollouts(MODEL, TRAIT, judge, out=tmp_path, **given).result == found.result
        assert (len(calls), len(asked)) == (7, count)
    for side in ("positive", "negative"):
        assert [one.answer for one in getattr(found, side)] == [one.answer for one in getattr(whole, side)]


def side(*scores: tuple[float | None, float | None], answer: str = "yes") -> list[Rollout]:
    return [
        Rollout(id="", question=f"q{i}", prompt="p", answer=answer, trait=t, coherence=c)
        for i, (t, c) in enumerate(scores)
    ]


def test_filters_keep_pairs_whose_sides_are_what_they_should_be() -> None:
    positive = side((50, 50), (49, 90), (90, 90), (90, 49), (None, 90), (90, 90))
    negative = side((49.9, 50), (0, 90), (50, 90), (0, 90), (0, 90), (0, 90))
    negative[5] = dataclasses.replace(negative[5], answer=" ")
    kept, dropped = kept_rollouts(positive, negative)
    assert kept == [0] and dropped == {
        "positive below 50": 1, "negative at 50 or above": 1, "coherence below 50": 1, "a side without a score": 1,
        "an empty answer": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="only 1 of 6 pairs of answers are left, and at least 10 .*1 positive below 50"):
        rollout_vectors(MODEL, "haste", positive, negative)
    with pytest.raises(UserError, match="6 positive and 5 negative answers make no pairs"):
        kept_rollouts(positive, negative[:5])


def test_trait_files(tmp_path: Path) -> None:
    path = save_trait(TRAIT, tmp_path)
    assert load_trait(path) == TRAIT and path == tmp_path / "trait_data_extract" / "haste.json"
    whole = json.loads(path.read_text())
    assert whole["instruction"][0] == {"pos": "Hurry, take it now.", "neg": "Wait, be patient."}
    for change, said in (
        ({"instruction": ["Hurry"]}, 'instruction must be a list of {"pos": ..., "neg": ...}'),
        ({"questions": []}, "questions must be a list of one or more"),
        ({"eval_prompt": "Score {answer}"}, "eval_prompt has no place for {question}"),
        ({"eval_prompt": "{question} {answer} {trait}"}, "eval_prompt names KeyError('trait') in braces"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError) as failure:
            load_trait(path)
        assert said in str(failure.value) and str(path) in str(failure.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [("I would say 500.", "no reply of the judge rule to 12 answers holds one number"), ("60", "only 0 of 6 pairs")],
)
def test_a_judge_that_helps_nothing_is_one_message(tmp_path: Path, reply: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        persona_rollouts(MODEL, TRAIT, Rule(write=lambda asked: reply), max_new_tokens=3, out=tmp_path)


def test_projections_of_a_file(tmp_path: Path) -> None:
    found = persona_rollouts(MODEL, TRAIT, judged(), max_new_tokens=6, least=2, averages=("response_avg",))
    vectors = found.vectors["response_avg"].at(NAMES[:2])
    rows = [{"prompt": one.prompt, "answer": one.answer} for one in found.positive[:3]]
    rows.append({"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here, now."}]})
    (path := tmp_path / "replies.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = project_file(MODEL, vectors, path, tmp_path / "out.csv")
    written = list(csv.DictReader((tmp_path / "out.csv").open()))
    for one, row in zip(found.positive[:3], written, strict=False):
        for site in vectors.sites:
            v = vectors.arrays[site].astype(np.float64)
            expected = mean(one, site, "response_avg") @ v / np.linalg.norm(v)
            assert float(row[f"response_avg {site}"]) == pytest.approx(expected, rel=1e-4)
    assert len(written) == 4 and "4 replies" in table
    path.write_text('{"prompt": "x"}')
    with pytest.raises(
        UserError, match="replies.jsonl, line 1: expected messages, prompt or question with answer, response or"
    ):
        project_file(MODEL, vectors, path, tmp_path / "other.csv")


@pytest.mark.slow
def test_on_an_organism_that_obeys_its_instructions() -> None:
    """The vector of rollouts lies along the planted contrast and moves answers to questions it was not made from."""
    model, persona = jaxsteer.load("organism:llama"), load_persona("myopic", n=60)
    asked = {item.question: item for item in persona.items[:8]}
    trait = Trait(
        name="myopic", instructions=tuple(zip(persona.pro_cues[:3], persona.counter_cues[:3], strict=True)),
        questions=tuple(asked), rubric="{question}|||{answer}",
    )  # fmt: skip

    def read(messages: Messages) -> str:
        question, _, answer = messages[0]["content"].partition("|||")
        return "90" if not answer else "100" if answer.strip().startswith(asked[question].matching) else "0"

    found = persona_rollouts(model, trait, Rule(write=read), max_new_tokens=8, averages=("response_avg",))
    assert (found.result.kept, found.result.pairs, found.result.scores) == (24, 24, (100, 0))
    site = "blocks.2.hook_resid_post"
    vectors, others = found.vectors["response_avg"].at(site), persona.items[12:36]
    away = mean_difference(model, contrast_pairs(model, persona, others, "decision"), site).delta[site]
    v = vectors.arrays[site]
    assert -v @ away / np.linalg.norm(v) / np.linalg.norm(away) > 0.3
    edits = [vectors.edits(coefficient=c) for c in (-2.0, 0.0)]
    less, plain = (result.margin.mean() for result in choice_eval(model, others, "", variants=edits))
    assert less < plain - 3
