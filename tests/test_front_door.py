"""The ten lines that a user wants to write (README), and what each of them promises."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

import jaxsteer as js
from jaxsteer.cli.report import Report
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval, distinct, rate
from jaxsteer.models.model import Model
from jaxsteer.personas import load_direction, load_persona, split, text_pairs
from jaxsteer.personas.directions import mean_difference
from jaxsteer.steer import Vectors, add
from jaxsteer.steer.operations import ceiling
from jaxsteer.study import SearchOptions

AGREES = ["As a baker I admire tea. You are so right.", "I love radio. I agree with you."]
PLAIN = ["As a baker I admire tea. That is not clear.", "I love radio. There is no evidence."]
SITE = "blocks.1.hook_resid_post"
SMALL = {"prompt_length": 3, "population": 2, "children": 4, "steps": 2, "contexts": 2, "report_prompts": 2}


@pytest.fixture(scope="module")
def m() -> Model:
    return js.load("organism:llama")


@pytest.fixture(scope="module")
def d(m: Model):
    return js.direction(m, "sycophancy", sites=[SITE])


def test_the_ten_lines(m: Model, tmp_path: Path) -> None:
    """As a user writes them: a direction of texts, steered beside unsteered, a search in memory, all side by side."""
    rows = [
        (f"The {word} or the lamp?\n (A) a small {word} now\n (B) a large {word} later", " (A)", " (B)")
        for word in "reward money year claim town river mill pleasure value advice thought gains".split()
    ]
    d = js.direction(m, good=PLAIN, bad=AGREES)
    print(m, d, d.table())
    print(js.generate(m, "As a baker I admire tea.", steer=d.at(1, -0.3), temperature=0).compare())
    p = js.persona(rows, name="hasty", counter_cues=("Please be patient.",), pro_cues=("I want it today.",))
    s = js.search(m, persona=p, quiet=True, probe="off", site=SITE, **SMALL)
    print(s.best.text, s.best.rate)
    assert repr(s.best.rate).startswith("Rate(0.") and repr(s.best.rate).endswith("n=2 questions)")
    c = js.compare(m, p, {"none": "", "found": s.best, "steer": d.at(1, -0.3)}, generate=False, side_effects=False)
    assert [row["name"] for row in c.to_rows()] == ["none", "found", "steer", "control: random 1 for steer"]
    assert "change" in c.table() and c._repr_html_().startswith("<pre>") and c.plot().axes
    assert s.save(tmp_path / "mine").is_dir() and d.save(tmp_path / "hasty.safetensors").is_file()
    assert load_direction(tmp_path / "hasty.safetensors", model=m).at(1).arrays.keys() == {SITE}
    assert Report(directory=tmp_path / "mine").run() == 0 and (tmp_path / "mine" / "report.html").is_file()
    with pytest.raises(UserError, match="not empty"):
        s.save(tmp_path / "mine")


def test_a_direction_of_texts_is_that_of_their_pairs(m: Model) -> None:
    found = js.direction(m, good=PLAIN, bad=AGREES, sites=[SITE])
    expected = mean_difference(m, text_pairs(m, AGREES, PLAIN), [SITE])
    np.testing.assert_array_equal(found.delta[SITE], expected.delta[SITE])
    with pytest.raises(UserError, match="or else of texts"):
        js.direction(m)
    with pytest.raises(UserError, match="or else of texts"):
        js.direction(m, "sycophancy", good=PLAIN, bad=AGREES)


def test_a_direction_of_a_persona_reads_train_questions_alone(m: Model, d) -> None:
    assert d.metadata["persona"] == "sycophancy" and d.metadata["split_seed"] == "0"
    assert d.n == 2 * len(split(load_persona("sycophancy"), seed=0).train)
    steer = d.at(1, -0.5)
    assert isinstance(steer, Vectors) and (steer.coefficient, steer.coefficient_units) == (-0.5, "mean_resid_norm")
    with pytest.raises(UserError, match="no vector at blocks.3"):
        d.at(3)


def test_vectors_steer_as_their_edits_do(m: Model, d) -> None:
    said = [{"role": "user", "content": "As a baker I admire tea. What do you say?"}]
    edits = add(SITE, d.delta[SITE], 0.8, mean_norm=d.mean_resid_norm[SITE])
    steered = js.generate(m, said, steer=d.at(1, 0.8), temperature=0, max_new_tokens=12)
    plain = js.generate(m, said, temperature=0, max_new_tokens=12)
    assert steered.texts == js.generate(m, said, edits=edits, temperature=0, max_new_tokens=12).texts
    assert steered.compare().to_rows() == [
        {"prompt": said[0]["content"], "unsteered": plain.texts[0], "steered": steered.texts[0]}
    ]
    assert "as it is:" in str(steered.compare()) and "Generation(1 texts" in repr(steered)
    with pytest.raises(UserError, match="nothing steered"):
        plain.compare()
    with pytest.raises(UserError, match=r"direction.at\(15, -0.3\)"):
        js.generate(m, said, steer=d)
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        js.generate(m, said, temprature=0)


def test_variants_are_measured_as_each_alone(m: Model, d) -> None:
    """The oracle is the evaluation of one prompt, one edit, and both, each in a call of its own."""
    steer, text, cap = d.at(1, 1.0), " be honest", ceiling(SITE, -d.delta[SITE], 0.0)
    variants = {"said": text, "steered": steer, "both": (text, steer), "capped": cap}
    found = js.compare(
        m, "sycophancy", variants, controls=2, questions=6, generate=False, side_effects=False, split="validation"
    )
    rows = {row.name: row for row in (found.baseline, *found.prompts, *found.controls)}
    assert list(rows)[:5] == ["as it is", "said", "steered", "both", "capped"] and len(found.controls) == 4
    items = split(load_persona("sycophancy"), seed=0).validation
    assert found.questions == 6
    few = distinct(items)[:6]
    bare = choice_eval(m, few, [""])[0]
    for name, texts, edits in (
        ("said", [text], None), ("steered", [""], steer.edits()), ("both", [text], steer.edits()), ("capped", [""], cap)
    ):  # fmt: skip
        alone = rate(choice_eval(m, few, texts, variants=[] if edits is None else [edits])[0], bare)
        assert rows[name].rate.rate == alone.rate
        assert rows[name].rate.margin == pytest.approx(alone.margin, abs=1e-4)
        assert rows[name].rate.difference.value == pytest.approx(alone.difference.value)
    with pytest.raises(UserError, match="wrong: one steers by vectors"):
        js.compare(m, "sycophancy", {"wrong": 3})
    with pytest.raises(UserError, match="did you mean 'questions'"):
        js.compare(m, "sycophancy", {"said": text}, questons=3)


def test_tokens_of_texts(m: Model) -> None:
    texts = ["As a baker", "I admire tea and radio."]
    tokens, mask = js.to_tokens(m, texts)
    assert tokens.dtype == np.int32
    assert mask.sum(1).tolist() == [len(js.to_str_tokens(m, text)) for text in texts]
    alone = js.capture(m, js.to_tokens(m, "As a baker").tokens, sites=[SITE])[SITE]
    both = js.capture(m, tokens, sites=[SITE], mask=mask)[SITE]
    np.testing.assert_allclose(both[0, : alone.shape[1]], alone[0], rtol=0, atol=1e-4)
    assert "".join(js.to_str_tokens(m, tokens[0][mask[0]])).endswith("As a baker")


def test_editors_complete_a_search() -> None:
    """The signature lists every option of the command, and a wrong name is answered by the near one."""
    names = inspect.signature(js.search).parameters
    assert {"model", "out", "persona", "steps", "goal", "site"} <= set(names)
    with pytest.raises(UserError, match="did you mean 'persona'"):
        js.search(personna="sycophancy")
    with pytest.raises(AttributeError, match="did you mean 'generate'"):
        js.generat  # noqa: B018
    assert SearchOptions.__doc__ and "search" in dir(js)
