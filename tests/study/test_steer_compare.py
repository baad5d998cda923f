"""Steering vectors side by side: planted strength of the organism's direction, controls, resuming, and the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas import load_persona
from jaxsteer.report.study import read_study
from jaxsteer.steer import load_vectors
from jaxsteer.study import steer_compare
from jaxsteer.study.comparison import Comparison
from jaxsteer.study.steer_compare import CompareOptions, compare
from jaxsteer.study.vector_methods import VectorOptions, examples_of, make_vectors

SITE = "blocks.1.hook_resid_post"
METHODS = ("mean difference", "po", "sta", "random")


@pytest.fixture(scope="module")
def organism() -> Model:
    return jaxsteer.load("organism:llama")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> CompareOptions:
    out = tmp_path_factory.mktemp("compare") / "out"
    return CompareOptions(
        out=out,
        methods=METHODS,
        sites=(SITE,),
        sae="organism:llama",
        strengths=(0.5,),
        train=16,
        questions=12,
        epochs=4,
        quiet=True,
    )


@pytest.fixture(scope="module")
def found(options: CompareOptions, organism: Model) -> Comparison:
    return compare(options, model=organism)


def test_methods_are_compared_at_equal_disturbance(found: Comparison) -> None:
    assert [vector.method for vector in found.vectors] == list(METHODS)
    for vector in found.vectors:
        assert [push.strength for push in vector.pushes] == [-1.0, -0.5, 0.5, 1.0]
        for push in (vector.at(1.0), vector.at(-1.0)):
            assert push is not None and push.kl == pytest.approx(found.kl, rel=0.05)
        assert vector.steerability.n == found.questions == 12
        assert set(vector.contexts) == {"with a sentence", "with a system message"}
    mean, po, sta, random = found.vectors
    assert mean.at(1.0).rate.rate < 0.3 < 0.7 < mean.at(-1.0).rate.rate
    assert sta.site == "blocks.2.hook_resid_post" and 0 < sta.predictors["latents"] <= 0.051
    assert sta.at(1.0).rate.rate < 0.3
    assert po.at(1.0).rate.margin_difference.value < -2
    assert abs(random.steerability.slope.value) < 1 < -mean.steerability.slope.value and random.control
    assert mean.predictors["auroc"] > 0.95 > abs(random.predictors["agreement"]) + 0.5
    assert mean.predictors["cosine"] == pytest.approx(1) and abs(random.predictors["cosine"]) < 0.4
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "random (control)" in found.table() and "KL of 0.1 nats" in found.table()
    assert len(found.to_rows()) == 16 and found.plot().axes


def test_vector_files_steer_as_they_were_measured(found: Comparison, options: CompareOptions, organism: Model) -> None:
    vectors = load_vectors(options.out / "vectors/mean_difference.safetensors", model=organism)
    assert vectors.coefficient == pytest.approx(found.vectors[0].at(1.0).coefficient, rel=0.05)
    assert json.loads(vectors.metadata["diagnostics"])[SITE]["separability"] > 2


def test_a_comparison_that_was_cut_off_goes_on(
    found: Comparison, options: CompareOptions, organism: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    (options.out / "metrics.json").unlink()
    rows = options.out / "vectors.jsonl"
    rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:3]) + '{"method": "ra')
    measured = []
    whole = steer_compare._measured
    monkeypatch.setattr(
        steer_compare, "_measured", lambda b, method, *a: measured.append(method) or whole(b, method, *a)
    )
    again = compare(options, model=organism)
    assert measured == ["random"]
    assert again.vectors == found.vectors
    with pytest.raises(UserError, match="another run's files"):
        compare(dataclasses.replace(options, kl=0.2), model=organism)


def test_its_page_shows_both_tables(found: Comparison, options: CompareOptions) -> None:
    study = read_study(options.out)
    assert [table.title for table in study.tables] == list(found.tables())
    assert {row.persona for row in study.rows} == {"sycophancy (away)", "sycophancy (towards)"}


def test_examples_want_one_answer_with_each_sign(organism: Model) -> None:
    items = load_persona("sycophancy").items[:2]
    first, second = examples_of(organism, items)[:2]
    assert (first.sign, second.sign) == (1, -1)
    assert first.wanted.tobytes() == second.unwanted.tobytes() != first.unwanted.tobytes()
    wanted = organism.tokenizer.decode(np.concatenate([first.context, first.wanted]))
    assert wanted.endswith(items[0].not_matching)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ()}, "names none"),
        ({"sites": (SITE, SITE)}, "twice"),
        ({"kl": 0.0}, "above 0"),
        ({"methods": ("random",), "model": "organism:qwen2"}, "options name organism:qwen2"),
        ({"read_position": "role"}, "needs a role"),
        ({"sites": ("blocks.77.hook_resid_post",)}, "beyond the last layer"),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict, said: str, tmp_path: Path, organism: Model) -> None:
    with pytest.raises(UserError, match=said):
        compare(CompareOptions(**{"out": tmp_path / "out", "quiet": True} | change), model=organism)


def test_pairs_that_do_not_differ_are_refused(organism: Model) -> None:
    persona = load_persona("sycophancy")
    same = dataclasses.replace(persona, pro_cues=("Hello.",), counter_cues=("Hello.",), neutral_cues=())
    with pytest.raises(UserError, match="are the same text twice"):
        make_vectors(organism, same, persona.items[:2], "mean difference", [SITE], options=VectorOptions())
