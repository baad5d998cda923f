"""Every layout, read and computed, against its own formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.__main__ import main
from jaxsteer import UserError, load_sae
from jaxsteer.sae import decode, encode, reconstruct, save_sae
from tests.sae.layouts import CASES, Case, D, F


def inputs(n: int = 7) -> np.ndarray:
    return np.random.default_rng(99).standard_normal((n, D)).astype(np.float32) * 1.5


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_latents_and_reconstruction_are_those_of_the_layout(make: Callable[[Path], Case], tmp_path: Path):
    case = make(tmp_path)
    sae = load_sae(case.path, **case.arguments)
    x = inputs()
    want = case.encode(x.astype(np.float64))
    got = encode(sae, x)
    assert got.dtype == jnp.float32 and got.shape == (7, F)
    assert 0 < (want != 0).mean() < 1  # the case tells something
    np.testing.assert_allclose(got, want, atol=3e-5)
    np.testing.assert_array_equal(np.asarray(got) != 0, want != 0)
    y = decode(sae, want.astype(np.float32), x=x)
    np.testing.assert_allclose(y, case.decode(want, x.astype(np.float64)), atol=1e-4)
    np.testing.assert_allclose(reconstruct(sae, x), y, atol=1e-4)
    assert (sae.config.format, sae.config.site_in, sae.config.model) == (case.format, case.site, case.model)
    assert sae.config.input_scale == 1.0

    # Some latents alone, as all of them would be.
    some = jnp.asarray([3, 0, 20])
    np.testing.assert_allclose(encode(sae, x, some), got[:, some], atol=2e-6)
    z = got[:, some]
    alone = np.zeros_like(got)
    alone[:, some] = z
    np.testing.assert_allclose(decode(sae, z, some, x=x), decode(sae, alone, x=x), atol=1e-5)

    # Our own files give it back exactly.
    save_sae(sae, tmp_path / "ours")
    again = load_sae(tmp_path / "ours")
    assert again.config == sae.config
    np.testing.assert_allclose(encode(again, x), got, atol=2e-6)
    np.testing.assert_allclose(decode(again, got, x=x), decode(sae, got, x=x), atol=2e-6)


def test_the_command_writes_what_load_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from tests.sae.layouts import goodfire, qwen_scope

    case = goodfire(tmp_path)
    assert main(["sae", str(case.path), str(tmp_path / "out"), "--unit-decoder"]) == 0
    printed = capsys.readouterr().out
    assert "24 latents at blocks.19.hook_resid_post of meta-llama/Llama-3.1-8B-Instruct" in printed
    assert "refuse" not in printed
    sae = load_sae(tmp_path / "out")
    np.testing.assert_allclose(jnp.linalg.norm(sae.W_dec, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(reconstruct(sae, inputs()), reconstruct(load_sae(case.path), inputs()), atol=1e-5)

    assert main(["sae", str(case.path), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    assert main(["sae", str(qwen_scope(tmp_path).path), str(tmp_path / "qwen")]) == 0
    assert (
        "SAELens will refuse it, because it cannot express top-k that keeps negative values" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="exists already"):
        save_sae(sae, tmp_path / "qwen")
