"""``verify`` agrees with what was converted, and names everything that is not as it should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints_convert.streaming as module
from checkpoints_convert import convert, verify
from checkpoints_convert.__main__ import main
from jaxsteer import UserError
from jaxsteer.models.restoring import read_leaves
from tests.helpers.checkpoints import FAMILIES, family_config, hf_directory, tiny_config

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", 20_000)


def pair(path: Path, **options: str) -> tuple[Path, Path]:
    """A source with a side file, and its checkpoint."""
    source = hf_directory(path / "hf", tiny_config())
    (source / "tokenizer.json").write_text("{}")
    return source, convert(source, path / "out", progress=False, **options)


def edit(directory: Path, change: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_wrong_in_any_family(family: str, tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf", family_config(family), dtype="bfloat16")
    out = convert(source, tmp_path / "out", progress=False)
    assert verify(out, source, progress=False) == [] == verify(out, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture, dtype: str) -> None:
    source, out = pair(tmp_path, dtype=dtype)
    assert main(["--verify", str(source), str(out)]) == 0
    said = capsys.readouterr()
    assert "agrees with" in said.out and "bit for bit" in said.out and "verifying: 100%" in said.err
    assert main(["--verify", "--quiet", str(out)]) == 0
    said = capsys.readouterr()
    assert "its own hashes" in said.out and said.err == ""
    edit(source, lambda tensors: tensors[UP].__setitem__((3, 5), 7.0))
    assert main(["--verify", str(source), str(out)]) == 1
    assert "layers/001/up: 1 of 960 values differ from the source" in capsys.readouterr().out
    assert main(["--verify", str(source), str(source)]) == 2
    with pytest.raises(SystemExit):
        main([str(source)])


def test_a_source_that_has_changed(tmp_path: Path) -> None:
    source, out = pair(tmp_path)
    edit(source, lambda tensors: tensors[UP].__setitem__(0, np.float32(np.nan)))
    (source / "tokenizer.json").write_text("{ }")
    (source / "generation_config.json").write_text("{}")
    assert verify(out, source, progress=False) == [
        "layers/001/up: 24 of 960 values differ from the source",
        "layers/001/up: the source gives another sha256 than was recorded",
        "source: its hash is not the recorded one (headers, side files or tensors have changed)",
        "generation_config.json: only in the source",
        "tokenizer.json: differs from the source's",
    ]
    other = hf_directory(tmp_path / "other", tiny_config(n_layers=2))
    (found,) = verify(out, other, progress=False)
    assert found == "config: the source differs in n_layers, windows, rope_index"


def test_a_checkpoint_that_was_damaged(tmp_path: Path) -> None:
    source, out = pair(tmp_path)
    index_file = out / "weights" / "index.json"
    index = json.loads(index_file.read_text())
    group = out / "weights" / index["layers/000/down"]["group"]
    names = [tuple(leaf.split("/")) for leaf in index if index[leaf]["group"] == group.name]
    leaves = read_leaves(out / "weights", index, dict.fromkeys(names, np.ndarray))
    leaves[("layers", "000", "down")] = leaves[("layers", "000", "down")].copy()
    leaves[("layers", "000", "down")][2, 3] *= -1
    shutil.rmtree(group)
    module.save(group, leaves)
    assert verify(out, source, progress=False) == ["layers/000/down: 1 of 960 values differ from the source"]
    assert verify(out, progress=False) == [
        "layers/000/down: the weights on the disk are not those that were written (sha256)"
    ]
    (group / "state" / "layers.000.down" / "0.0").unlink()
    (found,) = verify(out, source, progress=False)
    assert found.startswith("layers/000/down: ") and "cannot be read (NOT_FOUND" in found
    shutil.rmtree(group)
    found = verify(out, progress=False)
    assert len(found) == len(names) and all("cannot be read" in line for line in found)
    del index["layers/000/down"]
    index_file.write_text(json.dumps(index))
    assert "layers/000/down: not in the index" in verify(out, source, progress=False)
    assert any(line.startswith("fingerprint: ") for line in verify(out, progress=False))


def test_what_cannot_be_verified(tmp_path: Path) -> None:
    source, out = pair(tmp_path)
    with pytest.raises(UserError, match="jaxsteer.json"):
        verify(source, progress=False)
    record = json.loads((out / "jaxsteer.json").read_text())
    (out / "jaxsteer.json").write_text(json.dumps(record | {"converter_version": 1}))
    with pytest.raises(UserError, match="version 4 of the converter.*Convert the model again"):
        verify(out, progress=False)
