"""Deltas: a file there and back, the model that it makes, its fingerprint, and models that it is not of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import verify
from checkpoints_convert.export import write_hf
from jaxsteer import UserError, load, logits, make_mesh
from jaxsteer.checkpoints.changed import convert_with_delta
from jaxsteer.checkpoints.deltas import Delta, applied, load_delta
from jaxsteer.cli import main
from jaxsteer.files import tensor_bytes
from jaxsteer.steer import Vectors
from jaxsteer.steer.vectors import check_vectors
from tests.helpers.tiny import tiny_model

IDS = np.arange(3, 23, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk."""
    out, tiny = tmp_path_factory.mktemp("model"), tiny_model("llama3")
    write_hf(tiny.params, tiny.config, out)
    tiny.tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path):
    return load(folder)


@pytest.fixture(scope="module")
def delta(model) -> Delta:
    rng = np.random.default_rng(0)
    factors = {
        layer: (np.float32(rng.standard_normal((64, rank))), np.float32(rng.standard_normal((rank, 32)) / 8))
        for layer, rank in ((0, 1), (2, 3))
    }
    return Delta(factors=factors, model=model.name, fingerprint=model.fingerprint, metadata={"method": "by hand"})


def test_a_file_there_and_back(delta: Delta, tmp_path: Path):
    delta.save(tmp_path / "a.safetensors")
    found = load_delta(tmp_path / "a.safetensors")
    assert (found.model, found.fingerprint, found.metadata) == (delta.model, delta.fingerprint, delta.metadata)
    assert found.factors.keys() == {0, 2}
    for layer, pair in delta.factors.items():
        for mine, theirs in zip(pair, found.factors[layer], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert found.digest == delta.digest and found.new_fingerprint == delta.new_fingerprint != delta.fingerprint
    found.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for layer, norm in delta.norms().items():
        assert norm == pytest.approx(float(np.linalg.norm(np.matmul(*delta.factors[layer]))), rel=1e-5)


def test_the_loaded_model_has_the_changed_weights(folder: Path, model, delta: Delta, tmp_path: Path):
    delta.save(tmp_path / "delta.safetensors")
    found = load(folder, delta=tmp_path / "delta.safetensors")
    old, new = (np.asarray(m.params.layers.down, np.float64) for m in (model, found))
    for layer in range(3):
        change = np.matmul(*map(np.float64, delta.factors[layer])) if layer in delta.factors else 0.0
        np.testing.assert_allclose(new[layer], old[layer] + change, rtol=1e-6, atol=1e-6)
    assert found.fingerprint == delta.new_fingerprint and found.name == model.name
    assert float(jnp.abs(logits(found, IDS) - logits(model, IDS)).max()) > 0.1
    mesh = make_mesh(prompts=2, model=4)
    spread = load(folder, mesh=mesh, delta=tmp_path / "delta.safetensors")
    assert spread.params.layers.down.sharding == load(folder, mesh=mesh).params.layers.down.sharding
    np.testing.assert_allclose(np.asarray(spread.params.layers.down), new, rtol=1e-6, atol=1e-6)
    half = load(folder, dtype="bfloat16", delta=tmp_path / "delta.safetensors")
    wide = np.asarray(load(folder, dtype="bfloat16").params.layers.down[2], np.float32)
    rounded = jnp.asarray(wide + np.matmul(*delta.factors[2])).astype(jnp.bfloat16)  # rounded once, after the sum
    assert np.mean(np.asarray(half.params.layers.down[2] == rounded)) > 0.999
    part = load(folder, layers=2, delta=tmp_path / "delta.safetensors")
    np.testing.assert_array_equal(part.params.layers.down, found.params.layers.down[:2])


def test_what_was_made_on_the_old_model_says_so(model, delta: Delta):
    vectors = Vectors(
        arrays={"blocks.1.hook_resid_post": np.ones(32, np.float32)}, model=model.name, fingerprint=model.fingerprint
    )
    check_vectors(vectors, model)
    with pytest.raises(UserError, match="not on the weights of"):
        check_vectors(vectors, applied(model, delta))


def test_other_models_are_refused(folder: Path, model, delta: Delta, tmp_path: Path):
    with pytest.raises(UserError, match="load it with the model that it was made on"):
        applied(applied(model, delta), delta)  # twice
    dataclasses.replace(delta, fingerprint="a" * 64).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not of .*load it with the model"):
        load(folder, delta=tmp_path / "other.safetensors")
    wrong = dataclasses.replace(delta, factors={0: (delta.factors[0][0][:5], delta.factors[0][1])})
    with pytest.raises(UserError, match=r"has the shapes \[\[5, 1\], \[1, 32\]\], expected \[64, r\]"):
        applied(model, wrong)


def test_files_that_are_no_deltas_are_refused(tmp_path: Path):
    path, facts = tmp_path / "x.safetensors", {"format": "jaxsteer.delta/1", "model": "m", "fingerprint": "f"}
    left, right = np.ones((4, 1), np.float32), np.ones((1, 2), np.float32)
    for tensors, metadata, says in (
        ({"a": left}, {}, "is no delta of jaxsteer"),
        ({"a": left}, facts, "'a' .* is no factor"),
        ({"blocks.0.down.left": left}, facts, "block 0 has one factor of two"),
        ({"blocks.0.down.left": left * np.nan, "blocks.0.down.right": right}, facts, "expected finite"),
        ({"blocks.00.down.left": left}, facts, "is no factor"),
    ):
        path.write_bytes(tensor_bytes(tensors, metadata))
        with pytest.raises(UserError, match=says):
            load_delta(path)
    with pytest.raises(UserError, match="there is no delta"):
        load_delta(tmp_path / "missing")


def test_a_checkpoint_with_a_delta_is_the_model_with_it(folder: Path, model, delta: Delta, tmp_path: Path):
    file, out = tmp_path / "delta.safetensors", tmp_path / "changed"
    delta.save(file)
    assert main(["convert", str(folder), str(out), "--delta", str(file)]) == 0
    loaded, stored = load(folder, delta=file), load(out)
    for mine, theirs in zip(jax.tree.leaves(stored.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    assert stored.fingerprint == loaded.fingerprint == delta.new_fingerprint
    assert verify(out, progress=False) == [] and not list(tmp_path.glob(".changed*")), "nothing is left of the work"
    again = Delta(factors={1: delta.factors[0]}, model="twice", fingerprint=stored.fingerprint)
    again.save(tmp_path / "again.safetensors")
    twice = load(convert_with_delta(out, tmp_path / "twice", tmp_path / "again.safetensors"))
    assert twice.fingerprint == again.new_fingerprint and verify(tmp_path / "twice", progress=False) == []
    before = np.asarray(load(folder).params.layers.down)
    np.testing.assert_array_equal(before, model.params.layers.down, "the model that it was made of is as it was")


def test_a_conversion_with_a_delta_refuses_what_it_cannot_do(folder: Path, delta: Delta, tmp_path: Path, capsys):
    file, out = tmp_path / "delta.safetensors", tmp_path / "changed"
    delta.save(file)
    convert_with_delta(folder, out, file)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for given, said in (
        ((folder, out, file), "exists already"),
        ((out, tmp_path / "other", file), "the delta is of"),
        ((folder, tmp_path / "other", folder / "config.json"), "not a readable safetensors file"),
        (("gs://bucket/model", tmp_path / "other", file), "copy it to this machine"),
    ):
        with pytest.raises(UserError, match=said):
            convert_with_delta(*given)
    with pytest.raises(UserError, match="verify it alone"):
        verify(out, folder, progress=False)
    assert main(["convert", str(folder), str(tmp_path / "other"), "--delta", str(file), "--dtype", "bfloat16"]) == 2
    assert "--dtype do not go together" in capsys.readouterr().err
    huge = Delta(
        factors={0: (delta.factors[0][0] * 1e30, delta.factors[0][1] * 1e20)}, model="m", fingerprint=delta.fingerprint
    )
    huge.save(tmp_path / "huge.safetensors")
    with pytest.raises(UserError, match="beyond the range of float32"):
        convert_with_delta(folder, tmp_path / "other", tmp_path / "huge.safetensors")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
