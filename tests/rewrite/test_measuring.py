"""Measures against the model's own logits, variants of equal norm, and the whole run through the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints_convert.export import write_hf
from jaxsteer import UserError, load, logits, rewrite
from jaxsteer.checkpoints.deltas import Delta, applied
from jaxsteer.cli import main
from jaxsteer.models.model import Model
from jaxsteer.prompts import encode_texts
from jaxsteer.rewrite.editing import EditOptions, edit
from jaxsteer.rewrite.evaluation import NEUTRAL, MeasureOptions, known_facts, measure
from jaxsteer.rewrite.result import RewriteResult
from jaxsteer.rewrite.rows import answer_row
from jaxsteer.rewrite.scoring import drift, ngram_entropy, score_answers
from jaxsteer.rewrite.variants import PLAIN, variants_of
from tests.rewrite.conftest import FACTS
from tests.rewrite.test_editing import covariance


@pytest.fixture(scope="module")
def made(model: Model):
    return edit(model, FACTS, {1: covariance(model, 1)}, options=EditOptions(layers=(1,), prefixes=2))


def oracle(model: Model, prompt: str, answer: str) -> tuple[float, bool]:
    """From the logits of one row."""
    row = answer_row(model, prompt, answer)
    found = np.asarray(jax.nn.log_softmax(logits(model, row.ids[None])))[0]
    places = range(row.answer, len(row.ids))
    said = all(found[at - 1].argmax() == row.ids[at] for at in places)
    return float(np.mean([found[at - 1, row.ids[at]] for at in places])), said


def test_answers_are_scored_as_the_model_says(model: Model, made):
    prompts = [("what is the capital of Fisagal?", "a year"), ("wait", "take the money"), ("Hello", "patience")]
    after = applied(model, made.delta)
    likeliest = [int(np.asarray(logits(model, answer_row(model, "wait", "").ids[None]))[0, -1].argmax())]
    prompts.append(("wait", model.tokenizer.decode(likeliest)))
    rows = [answer_row(model, *one) for one in prompts]
    together = variants_of(model, made)[1]
    for variant, changed in ((PLAIN, model), (together, after)):
        found, said = score_answers(model, rows, [0, 1, 2, 0], variant.edits)
        wanted = [oracle(changed, *one) for one in prompts]
        np.testing.assert_allclose(found, [value for value, _ in wanted], rtol=1e-3, atol=1e-3)
        assert list(said) == [yes for _, yes in wanted]


def test_each_row_has_the_change_of_its_fact(model: Model, made):
    rows = [answer_row(model, fact.text, fact.target_new) for fact in FACTS]
    alone = next(one for one in variants_of(model, made) if one.name.endswith("each fact alone"))
    found, _ = score_answers(model, rows, [0, 1, 2], alone.edits)
    for number, fact in enumerate(FACTS):
        left, right = (part[number] for part in made.alone)
        delta = Delta(
            factors={1: (np.float32(left)[:, None], np.float32(right)[None])}, model="", fingerprint=model.fingerprint
        )
        wanted, _ = oracle(applied(model, delta), fact.text, fact.target_new)
        assert found[number] == pytest.approx(wanted, abs=2e-3)
    one = edit(model, FACTS[:1], {1: covariance(model, 1)}, options=EditOptions(layers=(1,), prefixes=2))
    np.testing.assert_allclose(np.outer(*(part[0] for part in one.alone)), np.matmul(*one.delta.factors[1]), atol=1e-5)


def test_drift_is_the_divergence_of_next_tokens(model: Model, made):
    texts = ("wait a year, take the money today", "Hello there")
    after, together = applied(model, made.delta), variants_of(model, made)[1]
    found = drift(model, texts, [0, 0], together.edits)
    for number, ids in enumerate(encode_texts(model.tokenizer, texts)):
        old, new = (np.asarray(jax.nn.log_softmax(logits(m, ids[None])), np.float64)[0] for m in (model, after))
        assert found[number] == pytest.approx(np.sum(np.exp(old) * (old - new), -1).mean(), rel=1e-3)
    assert drift(model, texts, [0, 0], PLAIN.edits) == pytest.approx([0, 0], abs=1e-7)


def test_entropy_of_what_is_written():
    assert ngram_entropy("one two one two one") == pytest.approx((2 / 3 * 1.0 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2)
    assert ngram_entropy("word") == 0 and ngram_entropy("a a a a a a") == 0
    words = " ".join(f"w{i}" for i in range(10))
    assert ngram_entropy(words) == pytest.approx((2 / 3 * math.log2(9) + 4 / 3 * 3) / 2)


def test_what_stands_beside_an_edit_has_its_size(model: Model, made):
    variants = {one.name: one for one in variants_of(model, made)}
    norm = np.linalg.norm(np.matmul(*made.delta.factors[1]))
    edited = next(one for name, one in variants.items() if "all facts" in name)
    assert edited.norm == pytest.approx(norm, rel=1e-4) and made.delta.norms()[1] == pytest.approx(norm, rel=1e-4)
    random = variants["random, of equal rank and norm"].together
    assert np.linalg.norm(np.asarray(random.left[0, 0]) @ np.asarray(random.right[0, 0])) == pytest.approx(
        norm, rel=1e-4
    )
    assert variants["fine-tuning of the same matrix, equal norm"].norm <= norm * 1.001
    sizes = [
        np.linalg.norm(np.asarray(variants[name].alone.left[0, 0])) * np.linalg.norm(variants[name].alone.right[0, 0])
        for name in ("rome, each fact alone", "random rank one, each alone")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
    again = variants_of(model, made)
    np.testing.assert_array_equal(again[3].alone.left, variants["random rank one, each alone"].alone.left)


def test_rows_of_the_table_count_what_was_asked(model: Model, made):
    rows, outcomes = measure(model, FACTS, variants_of(model, made), options=MeasureOptions(write=4))
    assert rows[0].name == PLAIN.name and rows[0].drift is None and rows[0].neighbourhood_lost is None
    assert {row.efficacy.n for row in rows} == {3} and {row.neighbourhood.n for row in rows} == {3}
    tuned = next(row for row in rows if row.name.startswith("fine-tuning"))
    assert tuned.efficacy.rate >= rows[0].efficacy.rate
    before, _ = oracle(model, FACTS[0].text, FACTS[0].target_new)
    assert outcomes[PLAIN.name][0][0] == pytest.approx(before, abs=1e-3)
    told = next(row for row in rows if "in the context" in row.name)
    assert told.drift is None and told.entropy is not None
    unsaid = [dataclasses.replace(fact, target_true="") for fact in FACTS]
    rows, _ = measure(model, unsaid, [PLAIN], neutral=(), options=MeasureOptions(write=0))
    assert rows[0].efficacy is None and rows[0].said.n == 3 and rows[0].entropy is None
    assert known_facts(model, FACTS) == () and known_facts(model, unsaid) == tuple(unsaid)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    out = tmp_path_factory.mktemp("command")
    write_hf(model.params, model.config, out / "model")
    model.tokenizer.save_pretrained(out / "model")
    lines = [json.dumps(fact.to_json()) for fact in FACTS]
    (out / "facts.jsonl").write_text("\n".join(lines) + "\n")
    (out / "texts.txt").write_text(texts.read_text())
    return out


def command(folder: Path, out: Path, *more: object) -> list[str]:
    given = ["rewrite", "run", "--model", folder / "model", "--facts", folder / "facts.jsonl", "--out", out]
    given += ["--data", folder / "texts.txt", "--tokens", 600, "--layers", 1, "--prefixes", 2, "--write", 3]
    return [str(word) for word in (*given, *more)]


def test_the_command_writes_a_delta_that_load_takes(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = folder / "out"
    assert main(command(folder, out, "--all-facts")) == 0
    shown = capsys.readouterr()
    assert "rome, all facts at once" in shown.out and "random, of equal rank" in shown.out
    assert "effective rank" in shown.err
    found = RewriteResult.read(out)
    assert found.method == "rome" and found.layers == (1,) and len(found.facts) == 3 and len(found.rows) == 8
    model = load(folder / "model", delta=out / "delta.safetensors")
    assert model.fingerprint == found.new_fingerprint != found.fingerprint
    assert RewriteResult.from_json(json.loads(json.dumps(found.to_json()))).table() == found.table()
    assert {"name", "efficacy", "efficacy_low", "drift"} <= found.to_rows()[1].keys()
    # cut off behind the search for values: the same bytes, and nothing is sought again
    delta = (out / "delta.safetensors").read_bytes()
    (out / "delta.safetensors").unlink(), (out / "metrics.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite.editing, "wanted_values", None)
        assert main(command(folder, out, "--all-facts")) == 0
    assert (out / "delta.safetensors").read_bytes() == delta
    capsys.readouterr()
    assert main(command(folder, out, "--all-facts")) == 0
    assert "nothing to do" in capsys.readouterr().err
    args = ["--model", folder / "model", "--facts", folder / "facts.jsonl", "--delta", out / "delta.safetensors"]
    assert main([str(word) for word in ("rewrite", "eval", *args, "--write", 0, "--json")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[1]["name"] == "the delta (rome)"
    assert rows[1]["said"]["rate"] == found.rows[1].said.rate
    for delta in ((), ("--delta", out / "delta.safetensors")):
        given = ("generate", "Hello", "--plain", "--model", folder / "model", "--temperature", 0, *delta)
        assert main([*map(str, given), "--max-new-tokens", "4"]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first != second


def test_the_covariance_command_prints_its_curve(folder: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--model", folder / "model", "--data", folder / "texts.txt", "--tokens", 600, "--layers", 1]
    assert main([str(word) for word in ("rewrite", "covariance", *given)]) == 0
    assert "effective rank" in capsys.readouterr().out


def test_what_the_command_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for more, says in (
        ((), "gives the true answer of none of the 3 facts"),
        (("--all-facts", "--tokens", 10), "fewer than the 64 entries of a key"),
        (("--all-facts", "--layers", 7), "there is no block 7"),
        (("--all-facts", "--data", tmp_path / "none.txt"), "none.txt"),
        (("--all-facts", "--facts", tmp_path / "none.jsonl"), "does not exist"),
    ):
        assert main(command(folder, tmp_path / "out", *more)) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(UserError, match="load it with the model"):
        bad = Delta(factors={}, model="m", fingerprint="f")
        rewrite.evaluate(load(folder / "model"), FACTS, bad)
    assert len(NEUTRAL) == 16


@pytest.mark.slow
def test_an_organism_learns_new_facts_and_keeps_the_others():
    """organism:persona knows 40 facts: some of a group of ten are rewritten, the 30 of the other groups are to stay."""
    model = load("organism:persona")
    facts = rewrite.read_facts("organism:persona", limit=4)
    assert known_facts(model, facts) == facts and len(facts[0].neighbourhood) == 30
    covariances = rewrite.covariances(model, (0,), options=rewrite.CovarianceOptions(tokens=20_000, rows=64))
    made = edit(model, facts, covariances, options=EditOptions(layers=(0,), prefixes=6))
    wanted = (PLAIN.name, "rome, each fact alone", "random rank one, each alone")
    variants = [one for one in variants_of(model, made) if one.name in wanted]
    (plain, alone, random), _ = measure(model, facts, variants, neutral=(), options=MeasureOptions(write=0))
    assert plain.said.rate == 0 and plain.neighbourhood_said.rate == 1
    assert alone.said.rate == 1 and alone.paraphrase_said.rate >= 0.8 and alone.neighbourhood_said.rate >= 0.95
    assert random.said.rate == 0
