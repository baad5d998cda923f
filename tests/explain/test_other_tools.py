"""Explanations in the files of Neuronpedia and delphi: as these tools write them, and what is none of theirs."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.cli import main
from jaxsteer.errors import UserError
from jaxsteer.explain.explanations import Explanations
from jaxsteer.explain.labels import Label, Labels
from jaxsteer.explain.other_tools import OtherLabels, read_labels, write_delphi, write_neuronpedia
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.sae import load_sae
from jaxsteer.sae.dictionary import SAE

SOURCE = "3-res-jb"
ROW = {
    "id": "clx0", "modelId": "gpt2-small", "layer": SOURCE, "index": "7", "description": " words about the sea\n",
    "authorId": "u", "triggeredByUserId": None, "notes": None, "scoreV1": 0, "scoreV2": None, "umap_x": 0.0,
    "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini", "createdAt": "2024-05-01T00:00:00Z",
}  # fmt: skip
ROWS = [ROW, ROW | {"index": "3", "description": 'ships, "sails"; and masts'}, ROW | {"description": "another"}]


@pytest.fixture(scope="module")
def sae() -> SAE:
    """1,024 latents at blocks.3.hook_resid_post."""
    return load_sae("organism:persona")


def write_export(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_results(folder: Path, hookpoint: str = "layers.2") -> Path:
    """A folder as delphi leaves it, with a text that its judge could not read."""
    for name in ("explanations", "scores/detection", "scores/fuzz", "latents"):
        (folder / name).mkdir(parents=True)
    (folder / "run_config.json").write_text('{"model": "EleutherAI/pythia-160m", "explainer_model": "llama"}')
    for latent, text in ((0, "the sea"), (12, "numbers")):
        (folder / "explanations" / f"{hookpoint}_latent{latent}.txt").write_text(json.dumps(text))
    sample = {"str_tokens": ["a", " b"], "activations": [0.0, 1.0], "distance": 1, "probability": None, "correct": True}
    said = [(True, True), (True, False), (False, False), (False, None)]
    rows = [sample | {"activating": truth, "prediction": answer} for truth, answer in said]
    (folder / "scores/detection" / f"{hookpoint}_latent12.txt").write_text(json.dumps(rows))
    return folder


def read_as_neuronpedia(found: OtherLabels) -> None:
    assert {one.latent: one.label for one in found.labels.labels} == {
        7: "words about the sea", 3: 'ships, "sails"; and masts'
    }  # fmt: skip
    assert (found.format, found.source, found.model, found.repeated) == ("neuronpedia", SOURCE, "gpt2-small", 1)
    assert found.labels.writer == "gpt-4o-mini"


@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz", "e.json", "e.csv", "folder"])
def test_an_export_of_neuronpedia_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        write_export(path / "batch-0.jsonl.gz", ROWS[:1])
        write_export(path / "batch-1.jsonl.gz", ROWS[1:])
    elif name == "e.csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            sheet = csv.DictWriter(file, list(ROW))
            sheet.writeheader()
            sheet.writerows(ROWS)
    elif name == "e.json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        write_export(path, ROWS)
    read_as_neuronpedia(read_labels(path))


def test_a_folder_of_delphi_is_read_with_its_scores(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run")
    for path in (folder, folder / "explanations"):
        found = read_labels(path)
        assert [(one.latent, one.label) for one in found.labels.labels] == [(0, "the sea"), (12, "numbers")]
        assert (found.format, found.source, found.model) == ("delphi", "layers.2", "EleutherAI/pythia-160m")
        (score,) = found.scores
        # of two contexts of the latent one was named, of two others one was read, and read right
        assert (score.kind, score.unread, score.scores[0].latent) == ("detection", 1, 12)
        assert (score.scores[0].accuracy, score.scores[0].read) == (0.75, 3)
    write_results(tmp_path / "both")
    (tmp_path / "both/explanations/layers.3_latent1.txt").write_text('"x"')
    with pytest.raises(UserError, match=r"of 2 SAEs \('layers.2', 'layers.3'\)"):
        read_labels(tmp_path / "both")
    assert read_labels(tmp_path / "both", source="layers.3").labels.labels[0].label == "x"


def test_files_for_other_latents_are_refused(tmp_path: Path, sae: SAE) -> None:
    read_labels(write_export(tmp_path / "a.jsonl", ROWS)).check_sae(sae)
    beyond = read_labels(write_export(tmp_path / "b.jsonl", [ROW | {"index": "24000"}]))
    with pytest.raises(UserError, match="latent 24,000, and the SAE that was given has the latents 0 to 1,023"):
        beyond.check_sae(sae)
    for source in ("20-gemmascope-res-16k", "layers.20", "model.layers.20.mlp"):
        with pytest.raises(UserError, match="which is layer 20, and the SAE that was given reads blocks.3."):
            read_labels(write_export(tmp_path / "c.jsonl", [ROW | {"layer": source}])).check_sae(sae)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"index": "1"', "a.jsonl, line 1"),
        ("a.jsonl", "[1, 2]\n", "an explanation .an object. was expected"),
        ("a.jsonl", '{"text": "a"}\n', 'needs "index" and "description", has text'),
        ("a.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW | {"index": "-1"}), "line 2: the index is '-1'"),
        ("a.jsonl", json.dumps(ROW | {"index": True}), "the index is 'True'"),
        ("a.jsonl", json.dumps(ROW | {"description": ["x"]}), "description is a list"),
        ("a.jsonl", "", "holds no explanations"),
        ("a.jsonl.gz", "not packed", "no whole gzip file"),
        ("a.csv", "index;description\n1;x\n", "separated by commas"),
        ("a.csv", "index,description\n\u00b2,x\n", "expected the number of a latent"),
        ("run/explanations/layers.2_latent1.txt", '{"a": 1}', "an object where delphi's explanation"),
        ("run/explanations/layers.2_latent1.txt", '"x', "latent1.txt"),
        ("run/other.txt", "x", "is no folder of explanations.*other.txt"),
    ],
)
def test_what_is_damaged_or_none_of_theirs_is_one_error(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        read_labels(tmp_path / name.split("/")[0])


def explained() -> tuple[Explanations, Labels]:
    words = tuple(f"word{i}" for i in range(30))
    vocabulary = Vocabulary(words=words, tokens=tuple((i,) for i in range(30)), source="given")
    order = (np.arange(4)[:, None] * 5 + np.arange(20)) % 30
    table = Explanations(
        words=order.astype(np.int32), scores=np.ones((4, 20), np.float32), information=np.ones(4, np.float32),
        vocabulary=vocabulary, model="m", fingerprint="f", sae="s", digest="d", site="blocks.5.hook_resid_post",
        side="decoder", posterior="bayes", temperature=1.0,
    )  # fmt: skip
    labels = Labels(
        writer="w", based="words", prompts={}, unread=0, nothing=1,
        labels=(Label(latent=2, label='sea, "ships"'), Label(latent=3, label="")),
    )  # fmt: skip
    return table, labels


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv"])
def test_what_is_written_for_neuronpedia_comes_back(tmp_path: Path, ending: str) -> None:
    table, labels = explained()
    path = tmp_path / f"e.{ending}"
    assert write_neuronpedia(table, labels, path, model="gemma-2-2b", source="5-res") == 5
    found = read_labels(path)
    own = {one.latent: one.label for one in found.labels.labels}
    assert own[2] == 'sea, "ships"' and own[0] == ", ".join(f"word{i}" for i in range(15)) and len(own) == 4
    assert (found.model, found.source, found.repeated) == ("gemma-2-2b", "5-res", 1)
    with pytest.raises(UserError, match="end in"):
        write_neuronpedia(table, labels, tmp_path / "e.txt")


def test_what_is_written_for_delphi_comes_back(tmp_path: Path) -> None:
    table, labels = explained()
    assert write_delphi(table, labels, tmp_path / "run") == 4
    assert json.loads((tmp_path / "run/explanations/layers.5_latent2.txt").read_text()) == 'sea, "ships"'
    found = read_labels(tmp_path / "run")
    assert found.source == "layers.5" and len(found.labels.labels) == 4
    with pytest.raises(UserError, match="is not empty"):
        write_delphi(table, labels, tmp_path / "run")


def test_commands_take_and_give_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], sae: SAE) -> None:
    words, out = tmp_path / "words.txt", tmp_path / "x"
    words.write_text("ghost\ncapital\nfounder\nmarket\n", encoding="utf-8")
    labels = write_export(tmp_path / "e.jsonl", ROWS)
    asked = ["sae", "explain", "--sae", "organism:persona", "--vocabulary", str(words), "--contexts", "200", "--out"]
    assert main([*asked, str(out), "--given", str(labels), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in told["labels"]["labels"]] == ['ships, "sails"; and masts', "words about the sea"]
    assert main(["sae", "export", "--explanations", str(out), "--to", "delphi", "--out", str(tmp_path / "d")]) == 0
    assert len(list((tmp_path / "d/explanations").iterdir())) == sae.n_latents
    other = write_export(tmp_path / "o.jsonl", [ROW | {"index": "1024"}])
    assert main([*asked, str(tmp_path / "y"), "--given", str(other)]) == 2
    assert "latent 1,024" in capsys.readouterr().err and not (tmp_path / "y").exists()


def test_an_sae_of_another_model_is_refused_before_work(tmp_path: Path, sae: SAE) -> None:
    import jaxsteer
    from jaxsteer import explain

    model = jaxsteer.load("organism:persona")
    other = dataclasses.replace(sae, config=dataclasses.replace(sae.config, model="google/gemma-2-2b"))
    with pytest.raises(UserError, match="trained on google/gemma-2-2b, not on organism:persona"):
        explain.run(model, other, vocabulary=["ghost"], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
