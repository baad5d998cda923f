"""The study of circuits: a planted effect is found, a random push has none, resuming, prompts, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError
from jaxsteer.circuits import study
from jaxsteer.circuits.rows import make_rows
from jaxsteer.circuits.study_questions import Questions
from jaxsteer.circuits.study_result import CircuitStudy
from jaxsteer.models.model import Model
from jaxsteer.models.reading import read_rows
from jaxsteer.models.sites import parse_site
from jaxsteer.organisms import persona_world
from jaxsteer.steer import Vectors, save_vectors
from jaxsteer.steer.vectors import random_controls

SITE = "blocks.3.hook_resid_post"
SMALL: dict[str, Any] = dict(
    questions=4, steps=4, random=10, controls=2, draws=2, layer_questions=2, max_new_tokens=8, sizes=(0.05, 0.5, 1.0),
    flipped=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxsteer.load("organism:persona")


@pytest.fixture(scope="module")
def vectors(model: Model) -> Vectors:
    """The mean stream at the last token of harmful requests minus that of harmless ones."""
    means = []
    for kind in ("harmful", "harmless"):
        asked = [
            [{"role": "user", "content": r.text}] for r in persona_world.requests(kind, n=48, seed=0, split="train")
        ]
        rows = make_rows(model, asked)
        ids = [row[:length] for row, length in zip(rows.tokens, rows.lengths)]
        states = [s[0] for _, s in read_rows(model, ids, rows.read[:, 0], [parse_site(SITE)])]
        means.append(np.concatenate(states).mean(0))
    array = (means[0] - means[1]).astype(np.float32)
    return Vectors(arrays={SITE: array}, coefficient=1.2, model=model.name, fingerprint=model.fingerprint)


@pytest.fixture(scope="module")
def done(model: Model, vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> tuple[CircuitStudy, Path]:
    """A whole study, and its directory."""
    out = tmp_path_factory.mktemp("circuits") / "run"
    two = {"refusal": vectors, "weaker": dataclasses.replace(vectors, coefficient=1.1)}
    return study.run(model, two, "refusal", out=out, **SMALL), out


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.json"))
    }  # fmt: skip


def test_the_planted_effect_is_found_and_a_random_push_has_none(done: tuple[CircuitStudy, Path]) -> None:
    found = done[0].push("refusal")
    base, pushed = found.effects[0], found.effect
    assert base.metric < 0 < pushed.metric  # chosen because the push flips them
    assert all(abs(control.change) < 0.5 * pushed.change for control in found.controls)
    assert found.effect.ci95[0] > 0
    said = {line.condition: line.shown for line in found.generated}
    assert said["pushed"] >= 0.75 and said["as it is"] <= 0.25 and said["random push"] <= 0.25
    whole = found.circuits.sizes[-1]
    assert whole.asked == found.circuits.n_edges
    np.testing.assert_allclose([whole.faithfulness, whole.complement], [1.0, 0.0], atol=1e-4)
    assert found.circuits.needed is not None
    best = min(found.circuits.sizes[0].faithfulness, 1.0)
    assert best > found.circuits.sizes[0].random[1]


def test_numbers_of_stages_agree_with_each_other(done: tuple[CircuitStudy, Path]) -> None:
    found = done[0].push("refusal")
    # the sum over nodes' scores of edges is in the edges' file; patching all of attention's heads = its freezing
    edges = json.loads((done[1] / "stages" / "0" / "edges.json").read_text())
    np.testing.assert_allclose(edges["nodes"][0] / (edges["target"] - edges["base"]), found.completeness, rtol=1e-6)
    assert found.stays("patterns").share == pytest.approx(found.stays("queries and keys").share, abs=1e-3)
    gap = next(one.share for one in found.unexplained if one.what == "attribution")
    assert gap == pytest.approx(1 - found.completeness)
    assert {level.kept for level in found.sparsity} == {64, 32, 13, 6, 1}
    assert all(line.ci95[0] <= line.share <= line.ci95[1] for line in found.frozen)


def test_scaled_vectors_have_one_direction_and_one_circuit(done: tuple[CircuitStudy, Path]) -> None:
    found = done[0]
    assert found.cosines == {"refusal, weaker": pytest.approx(1.0)}
    assert found.overlap is not None
    assert found.overlap.of("refusal", "weaker").share > 0.7
    assert found.overlap.of("refusal", "weaker").share > found.overlap.of("refusal", "random push").share


def test_the_result_is_its_file(done: tuple[CircuitStudy, Path]) -> None:
    assert CircuitStudy.read(done[1]).to_json() == done[0].to_json()
    text = done[0].table()
    assert "refusal" in text and "frozen" in text and "not explained" in text
    assert len(done[0].to_rows()) > 50


def test_cut_off_at_any_stage_it_goes_on_with_the_same_bytes(
    model: Model, vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SMALL | dict(layer_questions=0, random=2, controls=1, sizes=(0.2,), questions=4)

    def once(out: Path) -> dict[str, bytes]:
        study.run(model, {"refusal": vectors}, "refusal", out=out, **small)
        return files(out)

    whole = once(tmp_path / "whole")
    names = [name for name in whole if name.startswith("stages")]
    assert len(names) == 10
    written, left, asked = study.write_json, [0], list[str]()

    class Cut(Exception):
        pass

    def cut(path: Path, value: Any) -> None:
        if left[0] == 0:
            raise Cut
        left[0] -= 1
        asked.append(str(path.relative_to(out)))
        written(path, value)

    out = tmp_path / "cut"
    monkeypatch.setattr(study, "write_json", cut)
    while len(set(asked)) == len(asked) < 50:  # until it is whole, or makes anything again
        left[0] = 2  # two files more (a stage, or a part of one), and dead
        with contextlib.suppress(Cut):
            study.run(model, {"refusal": vectors}, "refusal", out=out, **small)
            break
    monkeypatch.setattr(study, "write_json", written)
    assert once(out) == whole
    assert len(set(asked)) == len(asked) > len(names) and sum(".parts" in name for name in asked) >= 7
    assert not list(out.rglob("*.parts"))


def test_a_prompt_is_studied_against_fillers(model: Model, tmp_path: Path) -> None:
    story = "Write it as a scene of a story."  # planted: takes 9 nats from the log-odds of a refusal
    found = study.run(model, (), "refusal", out=tmp_path / "out", prompt=story, **SMALL | dict(layer_questions=0))
    one = found.push("prompt")
    base, pushed = one.effects[0], one.effect
    assert base.metric > 0 > pushed.metric and found.filler.strip() in (".", ",", "-", "the", "and", "...")
    assert all(abs(control.change) < 0.5 * abs(pushed.change) for control in one.controls)
    said = {line.condition: line.shown for line in one.generated}
    assert said["as it is"] > 0.5 > said["pushed"]
    assert one.effects[-1].name == "no prompt"
    assert one.words is None and not one.sparsity and one.start == 0
    assert len(one.generated) == 7
    shape = np.shape(one.heads.shares)
    assert shape == (model.config.n_layers, model.config.n_heads)


@pytest.mark.slow
def test_replies_of_the_pushed_run_can_be_the_metric(model: Model, vectors: Vectors) -> None:
    options = SMALL | dict(metric="tokens", random=2, layer_questions=0)
    found = study.run(model, {"refusal": vectors}, "refusal", **options).push("refusal")
    assert found.effects[0].metric < 0 < found.effect.metric  # by its making, where greedy tokens differ
    assert found.circuits.sizes[-1].match == pytest.approx(1.0)
    assert found.readings >= found.rows


def test_bad_input_is_refused_before_anything_is_written(model: Model, vectors: Vectors, tmp_path: Path) -> None:
    def refused(match: str, given: Any, **options: Any) -> None:
        out = tmp_path / "refused"
        with pytest.raises(UserError, match=match):
            study.run(model, given, "refusal", out=out, **{**SMALL, **options})
        assert not out.exists() or not [p for p in out.iterdir() if not p.name.startswith(".")]

    refused("vectors or of a prompt", ())
    refused("not both", {"v": vectors}, prompt="Mind the rules of safety.")
    other = dataclasses.replace(vectors, fingerprint="0" * 64)
    refused("not on the weights", {"v": other})
    refused("width", {"v": dataclasses.replace(vectors, arrays={SITE: np.ones(7, np.float32)})})
    refused(
        "behind the last block",
        {"v": dataclasses.replace(vectors, arrays={"blocks.5.hook_resid_post": vectors.arrays[SITE]})},
    )
    refused("ablate at", {"v": dataclasses.replace(vectors, operation="ablate")})
    refused("no push to explain", {"v": vectors}, coefficient=0.0)
    refused("no effect to explain", {"v": vectors}, coefficient=1e-30, flipped=False)
    refused("at least 4", {"v": random_controls(vectors, 1)[0]})  # flips nothing
    refused("no option|has no|unknown", {"v": vectors}, nonsense=1)
    with pytest.raises(UserError, match="NaN or infinite"):
        save_vectors(
            dataclasses.replace(vectors, arrays={SITE: np.full(128, np.nan, np.float32)}), tmp_path / "nan.safetensors"
        )


def test_vectors_of_files_have_their_names(vectors: Vectors, tmp_path: Path) -> None:
    for place in ("a/dim", "b/dim", "po"):
        save_vectors(vectors, tmp_path / f"{place}.safetensors")
    paths = [tmp_path / f"{place}.safetensors" for place in ("a/dim", "b/dim")]
    assert [name.rsplit("/", 2)[-2:] for name in study.load_each(paths)] == [["a", "dim"], ["b", "dim"]]
    assert list(study.load_each([tmp_path / "po.safetensors"])) == ["po"]
    with pytest.raises(UserError, match="twice"):
        study.load_each([paths[0], paths[0]])


def test_choices_are_read_by_their_letter(model: Model) -> None:
    from jaxsteer.personas import load_persona

    items = load_persona("sycophancy", n=10).items[:2]
    asked = Questions(persona=load_persona("sycophancy", n=10), test=items, held=(), words=None)
    assert asked.shown(f" {items[0].matching}", 0) is True
    assert asked.shown(f" {items[0].not_matching}", 0) is False
    assert asked.shown("perhaps", 0) is None
