"""Probes: what is planted is found, what means nothing is not, and every text is judged by a fit that never saw it."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from jaxsteer import UserError, capture
from jaxsteer.lens.probe_data import probe_data, read_weights, split_folds
from jaxsteer.lens.probe_options import ProbeOptions
from jaxsteer.lens.probes import Probes, probe
from jaxsteer.lens.records import TextRecord, persona_texts
from jaxsteer.lens.texts import rows_of_texts
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.personas import Persona
from jaxsteer.statistics import calibration_error
from jaxsteer.steer import load_vectors, save_vectors
from tests.helpers.tiny import CORPUS, tiny_model

SITE = "blocks.1.hook_resid_post"
FAST = ProbeOptions(sites=("hook_embed", SITE), penalties=(1.0, 100.0), folds=4, controls=1, shuffles=4)
N = 160


def texts(n: int, seed: int = 0) -> list[str]:
    words = sorted(set(" ".join(CORPUS).replace("(", "").replace(")", "").split()))
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(5, 12))) for _ in range(n)]


def states(model: Model, given: list[str], site: str = SITE) -> np.ndarray:
    """float64 [n, D] at the last token."""
    tokens, mask = pad_rows([row.ids for row in rows_of_texts(model, given)], 64)
    found = np.asarray(capture(model, tokens, [site], mask)[site], np.float64)
    return found[np.arange(len(given)), mask.sum(1) - 1]


@cache
def planted(seed: int = 0) -> tuple[list[TextRecord], np.ndarray]:
    """Texts labelled by the side of a plane on which the state of their last token lies, well away from it."""
    model, along = tiny_model(), np.random.default_rng(9).standard_normal(32)
    given = texts(2 * N, seed)
    where = states(model, given) @ along
    where -= np.median(where)
    kept = np.argsort(-np.abs(where))[:N]
    kept.sort()
    return [TextRecord(text=given[i], label="above" if where[i] > 0 else "below") for i in kept], along


@cache
def found() -> Probes:
    return probe(tiny_model(), planted()[0], dataclasses.replace(FAST, positive="above"))


def test_a_planted_feature_is_found_and_random_labels_are_not():
    _, along = planted()
    best = found().result.best
    assert best.site == SITE and best.accuracy >= 0.99 and best.auroc > 0.99
    for score in found().result.scores:
        assert score.selectivity == pytest.approx(score.accuracy - score.control)
        assert score.selectivity_ci95[0] <= score.selectivity <= score.selectivity_ci95[1]
    vector = found().vectors.arrays[SITE]
    assert vector @ along > 0 and found().vectors.sign.startswith("towards 'above'")


def test_shuffled_labels_are_at_chance_over_many_orders():
    """The mean over 40 orders of labels, whose own spread tells the standard error."""
    records, _ = planted()
    rights = []
    for seed in range(10):
        rights.append(probe(tiny_model(), records, dataclasses.replace(FAST, seed=seed)).result.scores[1].shuffled)
    assert abs(np.mean(rights) - 0.5) <= 2 * np.std(rights, ddof=1) / np.sqrt(10)
    assert np.std(rights, ddof=1) < 0.05


def test_every_text_is_scored_by_scikit_learns_probe_of_the_other_folds():
    records, _ = planted()
    model, options = tiny_model(), dataclasses.replace(FAST, sites=(SITE,), penalties=(10.0,))
    ours = probe(model, records, options)
    data = probe_data(model, records)
    fold = split_folds(data, 4, 0)
    x, right = states(model, [record.text for record in records]), np.zeros(len(records))
    for test in range(4):
        inside = fold != test
        z = (x - x[inside].mean(0)) / x[inside].std(0)
        oracle = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-10).fit(z[inside], data.labels[inside])
        p = oracle.predict_proba(z[~inside])[:, 1]
        np.testing.assert_allclose(ours.probability[0, ~inside], p, atol=2e-4)
        right[~inside] = (p > 0.5) == data.labels[~inside]
    assert ours.result.scores[0].accuracy == pytest.approx(right.mean())
    assert ours.result.scores[0].brier == pytest.approx(brier_score_loss(data.labels, ours.probability[0]), abs=1e-6)
    whole = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-10)
    whole.fit((x - x.mean(0)) / x.std(0), data.labels)
    np.testing.assert_allclose(ours.weights[0] * x.std(0), whole.coef_[0], rtol=1e-3, atol=1e-4)


def test_the_penalty_is_the_one_that_validation_likes():
    """Few noisy texts of many dimensions want a strong penalty, wherever it stands in the list."""
    records = [
        dataclasses.replace(record, label=str(i % 2)) if i % 5 < 2 else record
        for i, record in enumerate(planted()[0][:60])
    ]
    records = [dataclasses.replace(r, label={"0": "above", "1": "below"}.get(r.label, r.label)) for r in records]
    for penalties in ((1e-3, 300.0), (300.0, 1e-3)):
        options = dataclasses.replace(FAST, sites=(SITE,), penalties=penalties)
        assert probe(tiny_model(), records, options).result.scores[0].penalty == 300.0


def test_control_task_finds_what_a_probe_knows_by_heart():
    """Where the type is written in the state, a probe learns random labels of types: it is not selective."""
    rng = np.random.default_rng(0)
    words = [f" {word}" for word in "river mill town money patience year".split()]
    given = [" ".join(texts(1, seed)) + words[rng.integers(6)] for seed in range(N)]
    records = [TextRecord(text=text, label=str(rng.integers(2)), type=text.split()[-1]) for text in given]
    score = probe(tiny_model(), records, dataclasses.replace(FAST, controls=4)).result.scores[0]
    assert score.types == 6 and score.repeated == 1.0
    assert score.control > 0.95 and score.selectivity < -0.3
    alone = [dataclasses.replace(record, type=f"{i}") for i, record in enumerate(records)]
    result = probe(tiny_model(), alone, FAST).result
    assert result.best.repeated == 0.0 and result.best.types == N and "says nothing" in result.table()


@pytest.mark.parametrize("kind", ["ridge", "mean", "mlp"])
def test_other_kinds_find_it_too(kind: str):
    made = probe(tiny_model(), planted()[0], dataclasses.replace(FAST, kind=kind, sites=(SITE,)))
    score = made.result.best
    assert score.accuracy > (0.75 if kind == "mean" else 0.9) and 0 <= score.calibration < 0.35
    assert (made.vectors is None) == (kind == "mlp") and (score.penalty == 0) == (kind == "mean")


def test_positions_and_sites_are_one_program(compile_counter):
    records, _ = planted()
    options = dataclasses.replace(FAST, positions=("mean", "last", "0", "-2"))
    with compile_counter() as count:
        made = probe(tiny_model(), records, options).result
    assert count["fit_all"] == 1 and len(made.scores) == 8
    assert [score.position for score in made.scores[::2]] == ["mean", "last", "0", "-2"]
    alone = probe(tiny_model(), records, FAST).result
    assert [score.accuracy for score in alone.scores] == [score.accuracy for score in made.scores[2:4]]


def test_positions_of_a_conversation():
    model = tiny_model()
    turns = ({"role": "user", "content": "Which do you prefer?"}, {"role": "assistant", "content": "the river"})
    row = rows_of_texts(model, [turns])[0]
    reply = np.flatnonzero(row.mask("assistant"))
    weights = read_weights(row, ("prompt", "response", "last", "mean", "2"))
    assert np.flatnonzero(weights[0]) == reply[0] - 1
    assert np.flatnonzero(weights[1]).tolist() == reply.tolist() and weights[1].sum() == pytest.approx(1)
    assert np.flatnonzero(weights[2]) == len(row.ids) - 1 and weights[3, 0] == 0 and weights[4, 2] == 1
    with pytest.raises(UserError, match="has none at position 'response'"):
        read_weights(rows_of_texts(model, ["a b"])[0], ("response",))


def test_neither_batch_nor_devices_change_it():
    records, _ = planted()
    mesh = make_mesh(model=2, prompts=2)
    model = tiny_model()
    split = dataclasses.replace(model, params=shard_params(model.params, model.config, mesh), mesh=mesh)
    first = probe(model, records, FAST)
    others = [probe(model, records, dataclasses.replace(FAST, batch=7)), probe(split, records, FAST)]
    for other in others:
        np.testing.assert_allclose(other.probability, first.probability, atol=1e-4)
        assert [s.accuracy for s in other.result.scores] == [s.accuracy for s in first.result.scores]


def test_groups_are_never_torn_apart():
    records = [dataclasses.replace(r, group=f"g{i // 6}") for i, r in enumerate(planted()[0])]
    data = probe_data(tiny_model(), records)
    fold = split_folds(data, 4, 1)
    for group in set(data.groups):
        assert len({int(f) for f, g in zip(fold, data.groups, strict=True) if g == group}) == 1
    assert probe(tiny_model(), records, FAST).result.groups == 27


def test_transfer_and_vector_file(tmp_path):
    model = tiny_model()
    moved = found().transfer(model, planted(5)[0], "others")
    score = moved.result.transfers[0].scores[moved.result.chosen]
    assert score.accuracy > 0.9 and "on others" in moved.result.table()
    path = save_vectors(moved.vectors, tmp_path / "probe.safetensors")
    loaded = load_vectors(path, model=model)
    assert loaded.metadata["estimator"] == "logistic probe" and loaded.edits(coefficient=0.5)
    apart = states(model, [r.text for r in planted()[0] if r.label == "above"]).mean(0)
    apart = apart - states(model, [r.text for r in planted()[0] if r.label == "below"]).mean(0)
    vector = loaded.arrays[SITE].astype(np.float64)
    assert vector @ apart == pytest.approx(vector @ vector, rel=1e-3)  # as long as the classes lie apart along it


def test_result_survives_json_and_shows_itself():
    result = found().result
    assert type(result).from_json(result.to_json()) == result
    assert "lowest loss" in result.table() and "<svg" in result.plot().svg() and len(result.to_rows()) == 2


def test_a_persona_gives_both_answers_in_both_orders():
    question = "Which do you prefer?\n (A) a river\n (B) a mill"
    persona = Persona.from_pairs([(question, "(A)", "(B)"), (question.replace("mill", "town"), "(B)", "(A)")])
    records = persona_texts(persona)
    assert [record.messages[-1]["content"] for record in records] == ["(A)", "(B)", "(B)", "(A)"] + ["(B)", "(A)"] + [
        "(A)", "(B)",
    ]  # fmt: skip
    assert [record.label for record in records] == ["shows", "does not"] * 4
    assert len({record.group for record in records}) == 2
    with pytest.raises(UserError, match="has no answers yet"):
        persona_texts(Persona(name="x"))


def test_calibration_error_by_hand():
    assert calibration_error(np.array([0.95, 0.92, 0.1, 0.05]), np.array([1, 0, 0, 0])) == pytest.approx(
        (abs(0.95 + 0.92 - 1) + 0.1 + 0.05) / 4
    )
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def labelled(n: int, labels: str, **fields: str) -> list[TextRecord]:
    return [TextRecord(text=text, label=labels[i % len(labels)], **fields) for i, text in enumerate(texts(n))]


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        (labelled(20, "a"), {}, "a probe tells two apart"),
        (labelled(20, "ab", group="one"), {}, "of 1 groups cannot be divided into 4 folds"),
        (labelled(20, "abc"), {}, "3 labels"),
        (labelled(20, "ab"), {"positive": "c"}, "no text has the label 'c'"),
        (labelled(20, "ab"), {"folds": 2}, "3 folds or more"),
        (labelled(20, "aaaaaaaaab"), {}, "fewer than the 4 folds"),
        ([TextRecord(text="a")], {}, "text 1 has no label"),
        (labelled(20, "ab"), {"positions": ("first",)}, "unknown position 'first'"),
        (labelled(20, "ab"), {"positions": ("99",)}, "has none at position '99'"),
        (labelled(20, "ab"), {"sites": ("hook_embed", "blocks.0.mlp.hook_post")}, "of one width"),
        (labelled(20, "ab"), {"sites": ("blocks.0.attn.hook_pattern",)}, "no fixed width"),
        (labelled(20, "ab"), {"penalties": (0.0,)}, "must be above 0"),
    ],
)
def test_bad_input(records: list[TextRecord], changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        probe(tiny_model(), records, dataclasses.replace(FAST, **changes))
