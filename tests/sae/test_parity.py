"""Against the libraries that write these files: in an environment that has them, they save and we read, and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer import load_sae
from jaxsteer.sae import encode, reconstruct, save_sae
from tests.sae.layouts import CASES, D, F, K, O

pytestmark = pytest.mark.parity

X = np.random.default_rng(3).standard_normal((9, D)).astype(np.float32) * 1.5


def randomise(module: Any) -> None:
    """Random values for every parameter, thresholds positive."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            drawn = torch.randn(value.shape, generator=generator) * (0.5 if value.ndim == 2 else 0.3)
            value.copy_(drawn.abs() if "threshold" in name else drawn)


def compare(path: Path, latents: Any, output: Any, **arguments: Any) -> None:
    """What we compute from ``path`` against what the library computed."""
    sae = load_sae(path, **arguments)
    want = latents.detach().numpy()
    assert 0 < (want != 0).mean() < 1
    np.testing.assert_allclose(encode(sae, X), want, atol=3e-5)
    np.testing.assert_allclose(reconstruct(sae, X), output.detach().numpy(), atol=2e-4)


SAELENS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("standard", {}),
    ("standard", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"k": K}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
    ("abstopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ("gated", {}),
    ("matching_pursuit", {}),
    ("matching_pursuit", {"max_iterations": 3, "stop_on_duplicate_support": False, "residual_threshold": 0.0}),
    ("transcoder", {"normalize_activations": "layer_norm"}),
    ("skip_transcoder", {}),
    ("jumprelu_transcoder", {}),
    ("jumprelu_skip_transcoder", {}),
)


@pytest.mark.parametrize(("architecture", "options"), SAELENS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_saelens_saves_and_we_read_and_back(architecture: str, options: dict[str, Any], tmp_path: Path):
    torch, sae_lens = pytest.importorskip("torch"), pytest.importorskip("sae_lens")
    metadata = {"hook_name": "blocks.2.hook_resid_post", "model_name": "m"}
    if architecture.endswith("transcoder"):
        metadata["hook_name_out"] = "blocks.2.hook_mlp_out"
        options = options | {"d_out": O, "apply_b_dec_to_input": False}
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"} | options
    theirs = sae_lens.SAE.from_dict(config | {"metadata": metadata})
    randomise(theirs)
    theirs.save_model(tmp_path / "theirs")
    x = torch.from_numpy(X)
    with torch.no_grad():
        latents, output = theirs.encode(x), theirs(x)
        norms = theirs.W_dec.norm(dim=-1)
    if options.get("rescale_acts_by_decoder_norm"):
        assert bool((norms != 1).all())
    compare(tmp_path / "theirs", latents, output)

    save_sae(load_sae(tmp_path / "theirs"), tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(again.encode(x), latents, atol=3e-5)
        np.testing.assert_allclose(again(x), output, atol=2e-4)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_saelens_reads_whatever_we_write_or_refuses_it(make: Any, tmp_path: Path):
    torch, sae_lens = pytest.importorskip("torch"), pytest.importorskip("sae_lens")
    case = make(tmp_path)
    ours = load_sae(case.path, **case.arguments)
    save_sae(ours, tmp_path / "ours")
    cfg = json.loads((tmp_path / "ours/cfg.json").read_text())
    if cfg["architecture"].startswith("jaxsteer"):
        with pytest.raises(Exception, match="jaxsteer"):
            sae_lens.SAE.load_from_disk(tmp_path / "ours")
        return
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    theirs.turn_off_forward_pass_hook_z_reshaping()
    with torch.no_grad():
        np.testing.assert_allclose(theirs.encode(torch.from_numpy(X)), encode(ours, X), atol=3e-5)
        np.testing.assert_allclose(theirs(torch.from_numpy(X)), reconstruct(ours, X), atol=2e-4)


CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_saves_and_we_read(kind: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    dictionary = pytest.importorskip("dictionary_learning.dictionary")
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    made = {
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D, F, K),
        "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, F, K, [8, F - 8]),
    }
    theirs = made[kind]() if kind in made else getattr(dictionary, kind)(D, F)
    randomise(theirs)
    if kind in made:
        theirs.threshold.fill_(0.4)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 3, "lm_name": "m", "submodule_name": "resid_post_layer_3"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    if kind == "AutoEncoder":
        theirs = type(theirs).from_pretrained(tmp_path / "ae.pt")  # which rescales the decoder
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(X))
        compare(tmp_path, latents, theirs.decode(latents))
        if kind == "AutoEncoderTopK":
            by_threshold = theirs.encode(torch.from_numpy(X), use_threshold=True)
            compare(tmp_path, by_threshold, theirs.decode(by_threshold), use_threshold=True)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
def test_sparsify_saves_and_we_read(activation: str, transcode: bool, tmp_path: Path):
    torch, sparsify = pytest.importorskip("torch"), pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(
        num_latents=F, k=4, activation=activation, transcode=transcode, skip_connection=transcode
    )
    theirs = sparsify.SparseCoder(D, config)
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.4.mlp")
    x = torch.from_numpy(X)
    with torch.no_grad():
        found = theirs.encode(x)
        latents = torch.zeros(len(X), F).scatter_(1, found.top_indices, found.top_acts)
        output = latents @ theirs.W_dec + theirs.b_dec
        if transcode:
            output += x @ theirs.W_skip.mT
    assert math.isfinite(float(output.sum()))
    compare(tmp_path / "layers.4.mlp", latents, output)
