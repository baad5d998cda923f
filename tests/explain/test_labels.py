"""Labels and their scores by writers who know the truth, toss a coin, or answer nonsense; and the whole pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import jaxsteer
from jaxsteer import explain
from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import Contexts
from jaxsteer.explain.judged_detection import judge_labels
from jaxsteer.explain.labels import Label, Labels, write_labels
from jaxsteer.explain.result import ExplainResult, word_use
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.models.model import Model
from jaxsteer.sae import load_sae
from jaxsteer.sae.dictionary import SAE
from jaxsteer.sae.texts import documents_of
from jaxsteer.writers.writer import Messages, Rule


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxsteer.load("organism:persona")


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae("organism:persona")


@pytest.fixture(scope="module")
def found(model: Model, sae: SAE) -> explain.Explanations:
    texts = [model.tokenizer.decode(documents_of(model, seed=5)(i), skip_special_tokens=True) for i in range(100)]
    return explain.explain_words(model, sae, Vocabulary.of_text(model, texts, size=100))


def distinct(model: Model, count: int) -> np.ndarray:
    """Tokens whose texts are no part of each other."""
    kept: list[tuple[int, str]] = []
    for token in range(len(model.tokenizer) - 1, 0, -1):
        text = model.tokenizer.decode([token])
        if len(text) > 3 and text.strip().isalpha() and not any(text in one or one in text for _, one in kept):
            kept.append((token, text))
    return np.asarray([token for token, _ in kept[:count]], np.int32)


def world(model: Model, latents: int, count: int = 300) -> tuple[Contexts, Labels]:
    """Every latent fires at one token, and its label is that token's text."""
    rng, known = np.random.default_rng(0), distinct(model, 120)
    assert len(known) == 120
    tokens = rng.choice(known, (count, 12)).astype(np.int32)
    hit = tokens[:, :, None] == known[:latents]
    contexts = Contexts(
        tokens=tokens, values=hit.any(1).astype(np.float32), places=hit.argmax(1).astype(np.int16)
    )  # fmt: skip
    labels = tuple(Label(latent=i, label=f"<{model.tokenizer.decode([known[i]])}>") for i in range(latents))
    return contexts, Labels(writer="w", based="words", prompts={}, labels=labels, unread=0, nothing=0)


def blocks(request: str) -> tuple[str, list[str]]:
    """The label and the numbered texts of a request."""
    label = re.search(r"Idea: <(.*?)>\n", request, re.DOTALL)
    assert label is not None
    texts = re.findall(r"^\d+\. (.*)$", request, re.MULTILINE)
    return label[1], texts


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_a_writer_who_knows_is_right_and_a_coin_is_not(model: Model, kind: str) -> None:
    contexts, labels = world(model, 12)

    def knows(messages: Messages) -> str:
        label, texts = blocks(messages[0]["content"])
        looked = [f"<<{label}>>" if kind == "fuzzing" else label] * len(texts)
        return str([int(wanted in text) for wanted, text in zip(looked, texts, strict=True)])

    truth = judge_labels(model, labels, contexts, Rule(write=knows), kind=kind)
    assert truth.accuracy == pytest.approx(1.0, abs=0.02) and truth.unread == 0

    def coin(messages: Messages) -> str:
        _, texts = blocks(messages[0]["content"])
        seed = int.from_bytes(hashlib.sha256(messages[0]["content"].encode()).digest()[:4], "big")
        return str(np.random.default_rng(seed).integers(0, 2, len(texts)).tolist())

    many, more = world(model, 80, count=2000)
    chance = judge_labels(model, more, many, Rule(write=coin), kind=kind)
    assert sum(score.read for score in chance.scores) >= 1500
    assert chance.accuracy == pytest.approx(0.5, abs=0.04)


def test_replies_that_cannot_be_read_are_counted(model: Model) -> None:
    contexts, labels = world(model, 4)
    asked = iter(range(1000))

    def sometimes(messages: Messages) -> str:
        _, texts = blocks(messages[0]["content"])
        return str([1] * len(texts)) if next(asked) % 2 else "I would say the first one"

    some = judge_labels(model, labels, contexts, Rule(write=sometimes))
    assert some.unread == sum(score.read for score in some.scores) > 0
    with pytest.raises(UserError, match="list of 0 and 1"):
        judge_labels(model, labels, contexts, Rule(write=lambda _: "no"))


def test_labels_are_phrases_votes_and_classes(model: Model, found: explain.Explanations, tmp_path: Path) -> None:
    requests: list[str] = []

    def writes(messages: Messages) -> str:
        text = messages[0]["content"]
        requests.append(text)
        if "Which of these" in text:
            return "2"
        if "Do these speak" in text:
            return "Probably." if len(requests) % 2 else "perhaps"
        return (
            '"nothing"' if found.of(3, 1)[0] in text.split("Words: ")[1].split(",")[0] else '"Ships at sea."\nBecause'
        )

    log = tmp_path / "replies.jsonl"
    made = write_labels(model, found, Rule(write=writes), [0, 1, 3], classes=("calm", "sea"), log=log)
    by = {label.latent: label for label in made.labels}
    assert by[3].label == "" and by[3].votes == () and made.nothing >= 1
    assert by[0].label == "Ships at sea" and by[0].group == "sea"
    assert set(by[0].votes) <= {"probably", ""} and by[0].support in (None, 0.75)
    assert made.unread == sum(vote == "" for label in made.labels for vote in label.votes)
    told = explain.Explained(table=found, result=ExplainResult.of(found, uses=(), labels=made))
    assert [hit.latent for hit in told.find("label:ships SEA")] == [i for i in (0, 1) if by[i].label]
    assert [hit.latent for hit in told.find(["class:Sea"])] == [i for i in (0, 1, 3) if by[i].group == "sea"]
    word = found.of(40, 1)[0]
    assert [hit.latent for hit in told.find([word, "label:ships"])][:2] == [0, 1]
    assert told.find(word) == found.find(word)
    with pytest.raises(UserError, match="no class 'land'|unknown class"):
        told.find("class:land")
    with pytest.raises(UserError, match="give the directory"):
        found.find(["label:ships"])
    with pytest.raises(UserError, match="give `sae explain` a writer"):
        dataclasses.replace(told, result=ExplainResult.of(found, uses=())).find("label:ships")
    before = len(requests)
    again = write_labels(model, found, Rule(write=writes), [0, 1, 3], classes=("calm", "sea"), log=log)
    assert again == made and len(requests) == before
    with pytest.raises(UserError, match="need contexts"):
        write_labels(model, found, Rule(write=writes), [0], based="both")
    with pytest.raises(UserError, match="holds a phrase"):
        write_labels(model, found, Rule(write=lambda _: " "), [0])


def test_shares_of_words() -> None:
    """Diversity, lexical and dominate by hand: 300 words, of which 250 are common and 10 of the rest are short."""
    words = tuple([f"common{i}" for i in range(250)] + ["abc"] * 10 + [f"rare{i}" for i in range(40)])
    vocabulary = Vocabulary(words=words, tokens=tuple((i,) for i in range(300)), source="given")
    told = np.full((20, 10), -1)
    told[:, 0] = 0  # a superficial word that dominates
    told[:10, 1] = np.arange(260, 270)  # ten rare words, each once
    use = word_use("w", told, vocabulary)
    assert (use.diversity, use.lexical) == (10 / 40, 1 / 260)
    assert use.dominate == pytest.approx(1 / 11)


def test_the_whole_run_goes_on_where_it_was_cut(
    model: Model, sae: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut while a writer labels, the same call gives the same files; each stage is done once."""

    def writes(messages: Messages) -> str:
        text = messages[0]["content"]
        if "A text in" in text:
            return str([len(line) % 11 for line in re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)])
        if "[1, 0, 0, 1, 0]" in text:
            return str([len(line) % 2 for line in re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)])
        return "Yes" if "Do these speak" in text else f"idea {len(text) % 7}"

    count = 0

    def cut(messages: Messages) -> str:
        nonlocal count
        count += 1
        if count > 7:
            raise KeyboardInterrupt
        return writes(messages)

    def go(out: Path, write: object) -> explain.Explained:
        return explain.run(
            model, sae, documents_of(model, seed=3), name="organism:persona", words="text", size=150, contexts=400,
            writer=Rule(write=write), label=(0, 5, 9, 40), based="both", simulation="all", out=out,  # type: ignore[arg-type]
        )  # fmt: skip

    whole = go(tmp_path / "a", writes)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b", cut)
    monkeypatch.setattr("jaxsteer.explain.pipeline.explain_words", None)
    go(tmp_path / "b", writes)
    for name in ("explanations.safetensors", "detection.json", "labels.json", "replies.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    one, two = (json.loads((tmp_path / d / "metrics.json").read_text()) for d in "ab")
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert whole.result.labels is not None and len(whole.result.label_scores) == 2
    assert whole.result.simulation is not None and whole.result.simulation.unread == 0
    assert "simulation by rule: correlation" in whole.result.table()
    assert "mutual information" in whole.result.table() and "detection by rule" in whole.result.table()
    assert explain.load_explained(tmp_path / "a").result == go(tmp_path / "a", writes).result


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``sae explain`` without a writer, then ``sae find``."""
    out = tmp_path / "x"
    words = tmp_path / "words.txt"
    words.write_text("ghost\ncapital\nfounder\nmarket\nriver\nnightmares\n", encoding="utf-8")
    asked = ["sae", "explain", "--sae", "organism:persona", "--out", str(out), "--contexts", "200", "--json"]
    assert main([*asked, "--vocabulary", str(words)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["vocabulary"] == 6 and told["detection"]["latents"] > 0
    assert main(["sae", "find", "ghost", "--explanations", str(out), "--json", "--top", "3"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert 0 < len(hits) <= 3 and all("ghost" in hit["words"] for hit in hits)
    assert main(["sae", "find", "zzz", "--explanations", str(out)]) == 2
    assert main([*asked[:-1], "--label", "999999"]) == 2
    assert "no latent 999999" in capsys.readouterr().err
