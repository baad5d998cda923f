"""Covariances against plain sums of captured keys; stopping, devices and padding change nothing; refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer import UserError, capture, make_mesh
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import shard_params
from jaxsteer.rewrite import covariance as module
from jaxsteer.rewrite.covariance import CovarianceOptions, covariances, load_covariance
from jaxsteer.sae.texts import Rows, documents_of

OPTIONS = CovarianceOptions(tokens=900, context=16, rows=8)
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def measured(model: Model, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("covariances")
    return covariances(model, LAYERS, [texts], options=OPTIONS, folder=folder), folder


def test_covariances_are_the_second_moments_of_keys(model: Model, texts: Path, measured):
    bos, keys = model.tokenizer.bos_token_id, {layer: [] for layer in LAYERS}
    rows = Rows(documents_of(model, [texts]), rows=8, length=16, bos=bos)
    while sum(map(len, keys[0])) < OPTIONS.tokens:
        tokens, mask, _ = rows.next()
        found = capture(model, tokens, [f"blocks.{layer}.mlp.hook_post" for layer in LAYERS], mask)
        keep = mask & (np.arange(16) > 0) & (tokens != bos)
        for layer in LAYERS:
            keys[layer].append(np.asarray(found[f"blocks.{layer}.mlp.hook_post"], np.float64)[keep])
    for layer in LAYERS:
        every = np.concatenate(keys[layer])
        wanted, found = every.T @ every / len(every), measured[0][layer]
        assert found.tokens == len(every) and found.matrix.dtype == np.float32
        np.testing.assert_allclose(found.matrix, wanted, rtol=2e-5, atol=1e-6 * np.abs(wanted).max())
        np.testing.assert_array_equal(found.matrix, found.matrix.T)
        rank = np.trace(wanted) ** 2 / np.sum(wanted**2)
        assert found.curve[-1].tokens == found.tokens and found.curve[-1].rank == pytest.approx(rank, rel=1e-4)


def test_the_curve_says_what_more_text_still_changed(model: Model, texts: Path, measured):
    curve = measured[0][0].curve
    assert 4 <= len(curve) <= module.HALVINGS and np.isnan(curve[0].change)
    half = covariances(
        model, [0], [texts], options=dataclasses.replace(OPTIONS, tokens=curve[-2].tokens), folder=measured[1]
    )[0]
    assert half.tokens == curve[-2].tokens
    whole = measured[0][0].matrix
    assert curve[-1].change == pytest.approx(np.linalg.norm(whole - half.matrix) / np.linalg.norm(whole), rel=1e-3)
    assert curve[-1].change < curve[1].change
    assert "effective rank" in measured[0][0].table()


def test_what_was_measured_is_read_again(model: Model, texts: Path, measured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_add", None)  # nothing is summed
    again = covariances(model, [2], [texts], options=OPTIONS, folder=measured[1])[2]
    np.testing.assert_array_equal(again.matrix, measured[0][2].matrix)
    assert repr(again.curve) == repr(measured[0][2].curve)
    with pytest.raises(TypeError):  # another text
        other = texts.parent / "other.txt"
        other.write_text(texts.read_text() + "one more line\n")
        covariances(model, [2], [other], options=OPTIONS, folder=measured[1])


class Killed(BaseException):
    """What no code catches."""


def test_a_reading_that_is_killed_goes_on_to_the_same_bytes(model: Model, texts: Path, measured, tmp_path: Path):
    def stop(at: int):
        seen = iter(range(at))

        def progress(*_: object, **__: object) -> None:
            if next(seen, None) is None:
                raise Killed

        return progress

    for at in (1, 2, 3):
        with pytest.raises(Killed):
            covariances(model, LAYERS, [texts], options=OPTIONS, folder=tmp_path, save_s=0.0, progress=stop(at))
        assert [path.name for path in tmp_path.glob("*/*.safetensors")] == [module.STATE]
    covariances(model, LAYERS, [texts], options=OPTIONS, folder=tmp_path)
    files = {path.name: path.read_bytes() for path in measured[1].glob("*/*.safetensors")}
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}
    assert found.keys() == {"block_000.safetensors", "block_002.safetensors"}
    name = next(path.parent.name for path in tmp_path.glob("*/*.safetensors"))
    assert all(data == (measured[1] / name / file).read_bytes() for file, data in found.items()) and files


@pytest.mark.parametrize(("prompts", "split"), [(8, 1), (2, 4)])
def test_devices_do_not_matter(model: Model, texts: Path, measured, tmp_path: Path, prompts: int, split: int):
    mesh = make_mesh(prompts=prompts, model=split)
    spread = dataclasses.replace(model, mesh=mesh, params=shard_params(model.params, model.config, mesh))
    found = covariances(spread, LAYERS, [texts], options=OPTIONS, folder=tmp_path)
    for layer in LAYERS:
        wanted = measured[0][layer].matrix
        np.testing.assert_allclose(found[layer].matrix, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_rows_and_their_padding_do_not_matter(model: Model, texts: Path, measured, tmp_path: Path):
    whole = CovarianceOptions(tokens=10**6, context=16, rows=8)  # one pass over all lines
    other = dataclasses.replace(whole, rows=1)
    first, second = (covariances(model, [0], [texts], options=o, folder=tmp_path)[0] for o in (whole, other))
    assert second.tokens <= first.tokens < second.tokens + 8 * 16  # the last batch is filled from the start
    assert np.linalg.norm(first.matrix - second.matrix) < 0.1 * np.linalg.norm(first.matrix)


def test_what_cannot_be_measured_says_why(model: Model, texts: Path, measured, tmp_path: Path):
    with pytest.raises(UserError, match="there is no block 3"):
        covariances(model, [3], [texts], options=OPTIONS, folder=tmp_path)
    few = covariances(model, [0], [texts], options=CovarianceOptions(tokens=40, rows=2), folder=tmp_path)[0]
    assert few.tokens < 64
    with pytest.raises(UserError, match="64 entries has no inverse: give more text"):
        few.solver()
    assert few.solver(ridge=0.01)
    path = next(measured[1].glob("*/block_000.safetensors"))
    with pytest.raises(UserError, match="measure the covariance of this model"):
        load_covariance(path, model=dataclasses.replace(model, fingerprint="another"))
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_covariance(tmp_path / "x.safetensors")
    assert jax.device_count() == 8
