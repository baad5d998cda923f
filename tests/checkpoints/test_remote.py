"""Checkpoints at a URL of a store: here of the disk, read by the same code as a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsteer
from checkpoints_convert import convert
from jaxsteer.checkpoints.inspect import describe
from jaxsteer.errors import UserError
from tests.helpers.checkpoints import hf_directory, tiny_config


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    return convert(hf_directory(tmp_path / "m", tiny_config()), tmp_path / "out", progress=False)


def test_a_checkpoint_at_a_url_is_the_one_on_the_disk(out: Path) -> None:
    here, there = jaxsteer.load(out), jaxsteer.load(f"file://{out}/", mesh=jaxsteer.make_mesh(model=2, prompts=1))
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
    assert (here.config, here.fingerprint) == (there.config, there.fingerprint)
    assert describe(f"file://{out}").config == here.config
    (copy,) = (out.parent / "cache" / "remote").iterdir()
    arrays = {path.relative_to(out) for path in out.rglob("*") if path.name.startswith((".z", "0"))}
    copied = {path.relative_to(copy) for path in copy.rglob("*")}
    assert arrays and copied and not arrays & copied  # no array was copied


def test_another_checkpoint_at_the_same_url_is_seen(out: Path) -> None:
    first = jaxsteer.load(f"file://{out}")
    record = json.loads((out / "jaxsteer.json").read_text())
    (out / "jaxsteer.json").write_text(json.dumps({**record, "fingerprint": "another"}))
    assert jaxsteer.load(f"file://{out}").fingerprint == "another" != first.fingerprint


def test_what_is_wrong_with_a_url_is_said(out: Path) -> None:
    with pytest.raises(UserError, match="no converted checkpoint at file:///.*nothing"):
        jaxsteer.load(f"file://{out}/nothing")
    with pytest.raises(UserError, match="zzz://bucket cannot be read .*unsupported URL scheme"):
        jaxsteer.load("zzz://bucket")
    (out / "weights" / "index.json").unlink()
    with pytest.raises(UserError, match="lacks weights/index.json"):
        jaxsteer.load(f"file://{out}")
