"""Steering vectors side by side: planted strength of the organism's direction, controls, resuming, and the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.calibration import Unreached
from jaxsteer.models.model import Model
from jaxsteer.personas import load_persona
from jaxsteer.report.study import read_study
from jaxsteer.steer import Vectors, load_vectors
from jaxsteer.study import compared_vectors, steer_compare
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
        draws=2,
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
    assert [vector.name for vector in found.vectors] == [*METHODS, "random 2"]
    for vector in found.vectors:
        assert [push.strength for push in vector.pushes] == [-1.0, -0.5, 0.5, 1.0]
        for push in (vector.at(1.0), vector.at(-1.0)):
            assert push is not None and push.kl == pytest.approx(found.kl, rel=0.05)
        assert vector.steerability.n == found.questions == 12
        assert set(vector.contexts) == {"with a sentence", "with a system message"}
    mean, po, sta, random, other = found.vectors
    assert random.site == other.site and random.at(1.0).rate.margin != other.at(1.0).rate.margin
    assert mean.at(1.0).rate.rate < 0.3 < 0.7 < mean.at(-1.0).rate.rate
    assert sta.site == "blocks.2.hook_resid_post" and 0 < sta.predictors["latents"] <= 0.051
    assert sta.at(1.0).rate.rate < 0.3
    assert po.at(1.0).rate.margin_difference.value < -2
    assert abs(random.steerability.slope.value) < 1 < -mean.steerability.slope.value and random.control
    assert mean.predictors["auroc"] > 0.95 > abs(random.predictors["agreement"]) + 0.5
    assert mean.predictors["cosine"] == pytest.approx(1) and abs(random.predictors["cosine"]) < 0.4
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "random (control, 2 draws)" in found.table() and "KL of 0.1 nats" in found.table()
    assert len(found.to_rows()) == 20 and found.plot().axes


def test_the_spread_of_a_control_is_shown(found: Comparison) -> None:
    drawn = found.vectors[3:]
    pushed, _ = found.tables().values()
    (row,) = (row for row in pushed if row["method"].startswith("random") and row["push"] == "away")
    rates = [100 * vector.at(1.0).rate.rate for vector in drawn]
    assert row["rate"].startswith(f"{np.mean(rates):.1f} % ({min(rates):.1f} % to {max(rates):.1f} %)")
    slopes = [vector.steerability.slope.value for vector in drawn]
    assert found.facts(drawn)["slope"] == f"{np.mean(slopes):.2f} ({min(slopes):.2f} to {max(slopes):.2f})"
    alone = dataclasses.replace(found, vectors=(*found.vectors[:3], dataclasses.replace(drawn[0], draw=None)))
    record = json.loads(json.dumps(alone.to_json()))
    assert all("draw" not in one and "unreached" not in one for one in record["vectors"])  # as older files are
    assert "random (control)" in Comparison.from_json(record).table()


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
    whole = steer_compare.measured
    monkeypatch.setattr(
        steer_compare,
        "measured",
        lambda b, method, draw, *a: measured.append((method, draw)) or whole(b, method, draw, *a),
    )
    again = compare(options, model=organism)
    assert measured == [("random", 0), ("random", 1)]
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
        ({"sae": "organism:gemma3"}, "was trained on organism:gemma3, not on organism:llama"),
        ({"sites": ("blocks.77.hook_resid_post",)}, "beyond the last layer"),
        ({"sites": (SITE, "blocks.1.hook_mlp_out")}, "several kinds .hook_mlp_out, hook_resid_post.*a command each"),
        ({"sites": ("blocks.1.attn.hook_q",)}, "cannot be read at"),
        ({"methods": ("random",), "draws": 1, "kl": 1e6, "questions": 2, "train": 2}, "none of these vectors reaches"),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict, said: str, tmp_path: Path, organism: Model) -> None:
    """And leave nothing behind that stands in the way of the corrected command, also in a directory that was there."""
    for out in (tmp_path / "out", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=said):
            compare(CompareOptions(**{"out": out, "quiet": True} | change), model=organism)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


def test_a_vector_that_cannot_reach_the_disturbance_is_a_row(
    tmp_path: Path, organism: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second method's vector is zero; the third's does as asked with one sign only."""
    make, approach = steer_compare.make_vectors, compared_vectors.approach

    def made(model: Model, persona: object, train: object, method: str, *given: object, **how: object) -> list[Vectors]:
        (vector,) = make(model, persona, train, method, *given, **how)
        array = vector.arrays[SITE]
        return [dataclasses.replace(vector, arrays={SITE: array * (method != "pca")})]

    def near(model: Model, vectors: list[Vectors], kl: float, **how: object) -> list[object]:
        found = approach(model, vectors, kl, **how)
        short = Unreached(sign=-1, coefficient=-0.5, kl=0.07, why="")
        if vectors[0].metadata["estimator"] == "logistic" and len(found) == 2:
            found[1] = short
        return found

    monkeypatch.setattr(steer_compare, "make_vectors", made)
    monkeypatch.setattr(compared_vectors, "approach", near)
    options = CompareOptions(
        out=tmp_path / "out", methods=("mean difference", "pca", "logistic"), sites=(SITE,), strengths=(0.5, 1e30),
        train=8,
        questions=6, quiet=True,
    )  # fmt: skip
    found = compare(options, model=organism)
    whole, none, half = found.vectors
    assert len(whole.pushes) == 4 and whole.steerability is not None and not whole.unreached
    assert not none.pushes and [(one.sign, one.kl) for one in none.unreached] == [(1, 0.0), (-1, 0.0)]
    assert [push.strength for push in half.pushes] == [0.5, 1.0] and half.steerability is None
    assert (whole.not_finite, none.not_finite, half.not_finite) == ((-1e30, 1e30), (), (1e30,))
    assert "mean difference: the model's logits were not finite at strengths -1e+30, 1e+30" in found.table()
    again = Comparison.from_json(json.loads((options.out / "metrics.json").read_text()))
    rows = again.tables()["At a KL of 0.1 nats on neutral text"]
    told = [(row["method"], row["push"], row["strength"], row["KL"]) for row in rows if "reach" in row["rate"]]
    assert told == [("pca", "away", "0", "0"), ("pca", "towards", "0", "0"), ("logistic", "towards", "-0.5", "0.07")]
    assert "cannot reach 0.1" in found.table() and found.plot().axes
    assert "cannot reach 0.1" in json.dumps([table.rows for table in read_study(options.out).tables])
    assert len(found.to_rows()) == 6


def test_pairs_that_do_not_differ_are_refused(organism: Model) -> None:
    persona = load_persona("sycophancy")
    same = dataclasses.replace(persona, pro_cues=("Hello.",), counter_cues=("Hello.",), neutral_cues=())
    with pytest.raises(UserError, match="are the same text twice"):
        make_vectors(organism, same, persona.items[:2], "mean difference", [SITE], options=VectorOptions())
