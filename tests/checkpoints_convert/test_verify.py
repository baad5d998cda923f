"""``verify`` agrees with what was converted, and names everything that is not as it should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert, verify
from checkpoints_convert.__main__ import main
from jaxsteer import UserError
from jaxsteer.models import sharding
from tests.helpers.checkpoints import FAMILIES, family_config, hf_directory, tiny_config

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_BLOCK_BYTES", 1000)


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
    edit(source, lambda tensors: tensors[UP].__setitem__(0, np.float32(7)))
    (source / "tokenizer.json").write_text("{ }")
    (source / "generation_config.json").write_text("{}")
    assert verify(out, source, progress=False) == [
        "layers/001/up: 24 of 960 values differ from the source",
        "layers/001/up: the source gives another sha256 than was recorded",
        "source: its hash is not the recorded one (headers, side files or tensors have changed)",
        "generation_config.json: only in the source",
        "tokenizer.json: differs from the source's",
    ]
    edit(source, lambda tensors: tensors[UP].__setitem__(0, np.float32(np.nan)))
    assert "layers/001/up: Tensor 'model.layers.1.mlp.up_proj.weight'" in verify(out, source, progress=False)[0]
    other = hf_directory(tmp_path / "other", tiny_config(n_layers=2))
    (found,) = verify(out, other, progress=False)
    assert found == "config: the source differs in n_layers, windows, rope_index"


def test_a_checkpoint_that_was_damaged(tmp_path: Path) -> None:
    source, out = pair(tmp_path)
    down = out / "weights" / "layers" / "000" / "down"
    values = np.fromfile(down / "0.0", np.float32)
    (values * np.where(np.arange(values.size) == 3, -1, 1).astype(np.float32)).tofile(down / "0.0")
    assert verify(out, source, progress=False) == ["layers/000/down: 1 of 960 values differ from the source"]
    assert verify(out, progress=False) == [
        "layers/000/down: the weights on the disk are not those that were written (sha256)"
    ]
    (down / "1.0").unlink()
    for found in (verify(out, source, progress=False), verify(out, progress=False)):
        assert len(found) == 1 and found[0].startswith("layers/000/down: ") and "cannot be read" in found[0]
        assert "NOT_FOUND" in found[0]
    shutil.rmtree(down)
    shutil.copytree(out / "weights" / "layers" / "000" / "up", down)
    (found,) = verify(out, progress=False)
    assert "layers/000/down is stored as [40, 24], and a model of this config has [24, 40]" in found
    shutil.rmtree(down)
    (found,) = verify(out, progress=False)
    assert "cannot be read" in found
    index_file = out / "weights" / "index.json"
    index = json.loads(index_file.read_text())
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
    with pytest.raises(UserError, match="version 5 of the converter.*Convert the model again"):
        verify(out, progress=False)
