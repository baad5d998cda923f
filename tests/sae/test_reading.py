"""What cannot be read says why: what was found, what is known, which argument is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.__main__ import main
from checkpoints_convert.sae_files import Overrides, find_sae
from jaxsteer import UserError, load_sae
from jaxsteer.sae import encode, reconstruct
from tests.helpers import torchzip
from tests.sae import layouts
from tests.sae.layouts import METADATA, D, F, f32, folder, saelens_cfg, weights

W = weights(40)
FOUR = {name: W[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def test_an_unknown_folder_lists_what_it_holds_and_what_is_known(tmp_path: Path):
    path = folder(tmp_path / "odd", {"U": W["W_enc"], "V": W["W_dec"]}, "weights.safetensors", {"notes.json": {"a": 1}})
    with pytest.raises(UserError) as error:
        load_sae(path)
    text = str(error.value)
    for part in ("U [8, 24] float32", "V [24, 8]", "notes.json beside it has the keys a", "Gemma Scope 1: params.npz",
                 "dictionary_learning: ae.pt", "Qwen-Scope: layer{i}.sae.pt"):  # fmt: skip
        assert part in text


def test_an_ambiguous_folder_names_its_candidates(tmp_path: Path):
    arrays = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}
    settings = {"cfg.json": {"k": 4}, "config.json": {"trainer": {"dict_class": "AutoEncoderTopK"}}}
    path = folder(tmp_path / "both", arrays, "sae.safetensors", settings)
    with pytest.raises(UserError, match="it could be sparsify and dictionary_learning") as error:
        load_sae(path)
    assert "encoder.weight [24, 8]" in str(error.value)


def test_folders_without_or_with_several_files(tmp_path: Path):
    case = layouts.gemma_scope_1(tmp_path)
    with pytest.raises(UserError, match="Folders inside that hold one: width_16k/average_l0_71"):
        load_sae(case.path.parent.parent)
    several = folder(tmp_path / "several", FOUR, "layer0.sae.pt", {})
    torchzip.write(several / "layer1.sae.pt", f32(FOUR))
    with pytest.raises(UserError, match="holds 2 files of tensors: layer0.sae.pt, layer1.sae.pt.*Give its path"):
        load_sae(several)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="only nothing"):
        load_sae(tmp_path / "empty")
    with pytest.raises(UserError, match="was not found"):
        load_sae(tmp_path / "absent")
    (tmp_path / "words.txt").write_text("x")
    with pytest.raises(UserError, match="no file of tensors that is known"):
        load_sae(tmp_path / "words.txt")


def test_a_file_is_read_like_its_folder(tmp_path: Path):
    case = layouts.llama_scope(tmp_path)
    whole, file = load_sae(case.path), load_sae(case.path / "checkpoints/final.safetensors")
    assert whole.config == file.config
    np.testing.assert_array_equal(whole.W_enc, file.W_enc)


def _ask(path: Path, argument: str, **given: Any) -> None:
    with pytest.raises(UserError, match=f"Give {argument}="):
        load_sae(path, **given)


def test_what_a_file_does_not_say_is_asked_for_by_name(tmp_path: Path):
    bare = torchzip.write(tmp_path / "some.sae.pt", f32({**FOUR, "W_enc": W["W_enc"].T, "W_dec": W["W_dec"].T}))
    _ask(bare, "k", site="layers.3")
    _ask(bare, "site", k=4)
    sae = load_sae(bare, k=4, site="layers.3", model="Qwen/Qwen3-8B-Base")
    assert (sae.config.site_in, sae.config.model) == ("blocks.3.hook_resid_post", "Qwen/Qwen3-8B-Base")
    with pytest.raises(UserError, match="counts from the last layer"):
        load_sae(bare, k=4, site="blocks.-1.hook_resid_post")
    scaling = saelens_cfg("standard", normalize_activations="expected_average_only_in")
    scaled = folder(tmp_path / "scaled", FOUR, "sae_weights.safetensors", {"cfg.json": scaling})
    _ask(scaled, "norm_scaling_factor")
    tied = {"W": W["W_enc"], "b_enc": W["b_enc"], "b_dec": W["b_dec"]}
    _ask(torchzip.write(tmp_path / "r1.pt", f32(tied)), "k")
    where = {**saelens_cfg("standard"), "metadata": {"sae_lens_version": "6.0"}}
    _ask(folder(tmp_path / "nowhere", FOUR, "sae_weights.safetensors", {"cfg.json": where}), "site")
    openmoss = {"sae_type": "sae", "hook_point_in": "blocks.0.hook_resid_post", "norm_activation": "dataset-wise"}
    arrays = {"W_E": W["W_enc"], "b_E": W["b_enc"], "W_D": W["W_dec"], "b_D": W["b_dec"]}
    path = folder(tmp_path / "moss", arrays, "sae_weights.safetensors", {"config.json": openmoss})
    _ask(path, "norm_scaling_factor")
    np.testing.assert_allclose(load_sae(path, norm_scaling_factor=0.5).W_enc, W["W_enc"] / 2, rtol=1e-6)


def test_arguments_win_over_the_file(tmp_path: Path):
    case = layouts.saelens_standard(tmp_path)
    config = load_sae(case.path, site="L3R", model="my/model").config
    assert (config.site_in, config.model) == ("blocks.3.hook_resid_post", "my/model")


def test_an_sae_of_one_head_says_so_and_bos_is_recorded(tmp_path: Path):
    cfg = saelens_cfg("standard", metadata=METADATA | {"hook_name": "blocks.2.attn.hook_z", "hook_head_index": 3})
    config = load_sae(folder(tmp_path / "head", FOUR, "sae_weights.safetensors", {"cfg.json": cfg})).config
    assert config.notes[0] == "trained on head 3 of its site alone" and config.trained_with_bos is True
    assert config.notes[1:] == ("subtraction of b_dec from the input folded into b_enc",)


def test_a_site_that_jaxsteer_lacks_is_kept_by_its_name(tmp_path: Path):
    path = tmp_path / "gemma-scope-2b-pt-transcoders/layer_4/width_16k/average_l0_30"
    folder(path, FOUR | {"threshold": W["threshold"]}, "params.npz", {})
    config = load_sae(path).config
    assert (config.site_in, config.site_out) == ("blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out")


def _refused(path: Path, why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_sae(path)


def test_what_is_known_and_not_read_is_refused_by_name(tmp_path: Path):
    lens = "sae_weights.safetensors"

    def saelens(name: str, arrays: dict[str, Any], **changes: Any) -> Path:
        architecture = changes.pop("architecture", "standard")
        return folder(tmp_path / name, arrays, lens, {"cfg.json": saelens_cfg(architecture, **changes)})

    _refused(saelens("temporal", FOUR, architecture="temporal"), "'temporal': it attends to earlier tokens")
    _refused(saelens("attends", FOUR | {"attn_layers.0.W": W["W_enc"]}), "temporal SAE of SAELens")
    _refused(saelens("white", FOUR, normalize_activations="covariance_whitening"), "covariance_whitening")
    _refused(saelens("new", FOUR, architecture="brandnew"), "'brandnew'; read are standard")
    clt = folder(tmp_path / "clt", {"W_enc_0": W["W_enc"]}, "W_enc_0.safetensors", {})
    save_file(f32({"W_dec_0": W["W_dec"]}), clt / "W_dec_0.safetensors")
    _refused(clt, "cross-layer transcoder")
    _refused(clt / "W_enc_0.safetensors", "cross-layer transcoder")
    _refused(folder(tmp_path / "saex", FOUR | {"s_gate": W["b_enc"], "mean_norm": np.ones(1)}, "sae.safetensors", {}),
             "SAE of saex")  # fmt: skip
    turned = FOUR | {"W_enc": W["W_enc"].T}
    _refused(folder(tmp_path / "tracer", turned, "layer_3.safetensors", {}), "circuit-tracer")
    lower = {name.lower(): value for name, value in FOUR.items()} | {"threshold": W["threshold"]}
    lower["w_dec"] = np.ones((F, 2, D))
    for name in (
        "resid_post/layer_1_width_16k_l0_small/params",
        "crosscoder/layer_1_2_3_width_1k_l0_big/params_layer_0",
        "crosscoder/layer_1_2_width_1k_l0_big/params_layer_2",
    ):
        path = tmp_path / "gemma-scope-2-1b-pt" / f"{name}.safetensors"
        _refused(folder(path.parent, lower, path.name, {}), "w_dec has three axes, of 2 layers")
    moss = {"W_E": W["W_enc"], "b_E": W["b_enc"], "W_D": W["W_dec"], "b_D": W["b_dec"]}
    settings = {"sae_type": "sae", "act_fn": "relu", "hook_point_in": "blocks.0.hook_resid_post"}
    glu = moss | {"W_E_glu": W["W_enc"], "b_E_glu": W["b_enc"]}
    _refused(folder(tmp_path / "glu", glu, lens, {"config.json": settings}), "glu")
    _refused(folder(tmp_path / "mix", moss, lens, {"config.json": settings | {"sae_type": "lorsa"}}), "lorsa")
    _refused(folder(tmp_path / "act", moss, lens, {"config.json": settings | {"act_fn": "tanh"}}), "'tanh'")
    batch = settings | {"norm_activation": "batch-wise"}
    _refused(folder(tmp_path / "batch", moss, lens, {"config.json": batch}), "'batch-wise'")
    sparse = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}
    for name, cfg, why in (("signed", {"signed": True}, "signed"), ("odd", {"activation": "x"}, "'x'")):
        _refused(folder(tmp_path / f"layers.{name}", sparse, "sae.safetensors", {"cfg.json": {"k": 4} | cfg}), why)
    trainer = {"config.json": {"trainer": {"dict_class": "IdentityDict"}}}
    _refused(folder(tmp_path / "dl", {"x": np.ones(1)}, "ae.pt", trainer), "'IdentityDict'; read are AutoEncoder")
    old = {"hook_point": "blocks.0.hook_resid_pre", "d_in": D, "d_sae": F}
    _refused(
        folder(tmp_path / "tuned", FOUR | {"scaling_factor": 2 * np.ones(F)}, lens, {"cfg.json": old}), "fine-tuned"
    )


def test_shapes_decide_over_what_the_config_says(tmp_path: Path):
    lens = "sae_weights.safetensors"
    swapped = FOUR | {"W_enc": W["W_enc"].T}
    _refused(folder(tmp_path / "swapped", swapped, lens, {"cfg.json": saelens_cfg("standard")}),
             r"W_enc \(24, 8\), not \(24, 24\)")  # fmt: skip
    gone = {name: value for name, value in FOUR.items() if name != "b_enc"}
    _refused(folder(tmp_path / "gone", gone, lens, {"cfg.json": saelens_cfg("standard")}), "'b_enc' is missing")
    flat = FOUR | {"b_enc": np.ones((1, F))}
    _refused(folder(tmp_path / "flat", flat, lens, {"cfg.json": saelens_cfg("standard")}), "one dimension")


def test_damaged_and_hostile_files_are_refused(tmp_path: Path):
    case = layouts.saelens_standard(tmp_path)
    file = case.path / "sae_weights.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    _refused(case.path, "truncated")
    file.write_bytes(data)
    (case.path / "cfg.json").write_text("{")
    _refused(case.path, "cfg.json, line 1: not JSON")
    hostile = tmp_path / "gemma-scope-2b-pt-res/layer_1/params.npz"
    hostile.parent.mkdir(parents=True)
    np.savez(hostile, W_enc=np.asarray([{}], dtype=object), allow_pickle=True)
    _refused(hostile, "no readable .npz file of plain NumPy arrays")
    hostile.write_bytes(b"PK\x03\x04rubbish")
    _refused(hostile, "no readable .npz")
    code = torchzip.Raw(torchzip.GLOBAL("os", "system") + torchzip.opcodes(("true",), {}) + b"R")
    _refused(torchzip.write(tmp_path / "ae.pt", {"encoder.weight": code}), "os.system")
    _refused(torchzip.write(tmp_path / "list.pt", [np.ones(2, np.float32)]), "a dict of tensors")


def lens(path: Path, arrays: dict[str, Any] = FOUR, architecture: str = "standard", **changes: Any) -> Path:
    return folder(path, arrays, "sae_weights.safetensors", {"cfg.json": saelens_cfg(architecture, **changes)})


@pytest.mark.parametrize("name", ["activation_fn", "activation_fn_str"])
@pytest.mark.parametrize("value", ["tanh-relu", "silu", "topk", ["relu"], 3])
def test_other_activations_are_not_read_as_relu(tmp_path: Path, name: str, value: Any):
    """Nobody but the architecture top-k may have another activation than relu."""
    for architecture in ("standard", "jumprelu", "gated"):
        arrays = FOUR | {"threshold": W["threshold"], "b_gate": W["b_enc"], "b_mag": W["b_enc"], "r_mag": W["b_enc"]}
        path = lens(tmp_path / architecture, arrays, architecture, **{name: value})
        _refused(path, f"its {name} is .*architecture '{architecture}' is read with relu")
    old = {"hook_point": "blocks.0.hook_resid_pre", "d_in": D, "d_sae": F, name: value}
    if value != "topk":
        _refused(folder(tmp_path / "old", FOUR, "sae_weights.safetensors", {"cfg.json": old}), f"its {name} is")


def test_relu_by_its_name_is_relu(tmp_path: Path):
    for name in ("activation_fn", "activation_fn_str"):
        assert load_sae(lens(tmp_path / name, **{name: "relu"})).config.activation == "relu"


def test_k_of_a_config_where_the_tensors_lack_it(tmp_path: Path):
    case = layouts.dl_topk(tmp_path)
    arrays = layouts._dl_topk(weights(19), 0.75)
    del arrays["k"], arrays["threshold"]
    torchzip.write(case.path / "ae.pt", arrays)
    assert load_sae(case.path).config.k == layouts.K
    x = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    np.testing.assert_allclose(encode(load_sae(case.path), x), case.encode(x.astype(np.float64)), atol=3e-5)
    settings = json.loads((case.path / "config.json").read_text())
    for k, says in ((None, "Give k="), ("5", "k = '5', expected a whole number"), (True, "k = "), (2.5, "k = ")):
        settings["trainer"]["k"] = k
        (case.path / "config.json").write_text(json.dumps(settings))
        _refused(case.path, says)
        assert load_sae(case.path, k=4).config.k == 4


def test_stored_units_of_an_auto_encoder_can_be_had(tmp_path: Path):
    case, w = layouts.dl_auto_encoder(tmp_path), weights(16)
    sae = load_sae(case.path, unit_decoder=False)
    assert sae.config.latent_units == "as stored"
    x = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    want = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(encode(sae, x), want, atol=3e-5)
    np.testing.assert_allclose(reconstruct(sae, x), reconstruct(load_sae(case.path), x), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": ["standard"]}, {"k": "5"}, {"metadata": 3}, {"apply_b_dec_to_input": "yes"},
        {"normalize_activations": ["none"]}, {"metadata": METADATA | {"hook_name": 5}},
        {"metadata": METADATA | {"model_name": ["x"]}}, {"metadata": METADATA | {"prepend_bos": "no"}},
        {"metadata": METADATA | {"hook_name_out": 1}}, {"rescale_acts_by_decoder_norm": 1}, {"k": -5}, {"k": 0},
        {"k": F + 1}, {"metadata": METADATA | {"jaxsteer": {"format": []}}}, {"k": 10**30}, {"k": 2.5},
    ],
)  # fmt: skip
def test_configs_of_wrong_types_are_refused(tmp_path: Path, changes: dict[str, Any]):
    path = lens(tmp_path / "saelens")
    (path / "cfg.json").write_text(json.dumps(saelens_cfg("topk", k=5) | changes))
    _refused(path, "saelens")


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_named(tmp_path: Path, name: str, value: float):
    arrays = {key: array.copy() for key, array in (FOUR | {"threshold": W["threshold"]}).items()}
    arrays[name].reshape(-1)[-1] = value
    path = lens(tmp_path / "a", arrays, "jumprelu")
    if name == "threshold" and value == np.inf:  # how a latent is switched off
        load_sae(path)
        return
    _refused(path, rf"a.* NaN or infinity.*|a.* its {name} holds NaN")
    with pytest.raises(UserError, match=name):
        load_sae(path)
    assert main(["sae", str(path), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()


def test_a_dtype_that_cannot_hold_an_sae(tmp_path: Path):
    path = lens(tmp_path / "a", FOUR | {"W_dec": 1e6 * W["W_dec"]})
    load_sae(path, dtype="bfloat16")
    with pytest.raises(UserError, match="NaN or infinity as float16 in W_dec"):
        load_sae(path, dtype="float16")
    assert main(["sae", str(path), str(tmp_path / "out"), "--dtype", "float16"]) == 2


@pytest.mark.parametrize("shape", [(F,), (D, F, 1), ()])
def test_matrices_of_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]):
    _refused(lens(tmp_path / "a", FOUR | {"W_enc": np.ones(shape)}), "'W_enc' should be a matrix")


def test_gemma_scope_2_as_it_is_published(tmp_path: Path):
    arrays = {name.lower(): W[name] for name in FOUR} | {"threshold": W["threshold"]}
    config = {"hf_hook_point_in": "model.layers.7.output", "model_name": "google/gemma-3-270m-pt"}
    path = tmp_path / "resid_post/layer_7_width_16k_l0_small"
    found = load_sae(folder(path, arrays, "params.safetensors", {"config.json": config})).config
    assert (found.site_in, found.site_out, found.model) == ("blocks.7.hook_resid_post", None, "google/gemma-3-270m")
    bare = tmp_path / "google/gemma-scope-2-270m-pt/mlp_out/layer_3_width_16k_l0_small"
    assert load_sae(folder(bare, arrays, "params.safetensors", {})).config.model == "google/gemma-3-270m"
    for changes, says in (
        ({"hf_hook_point_in": None}, "names no hf_hook_point_in"),
        ({"hf_hook_point_in": ["model.layers.7.output"]}, "hf_hook_point_in = "),
        ({"hf_hook_point_out": 3}, "hf_hook_point_out = '3'"),
        ({"model_name": 3}, "model_name = '3'"),
        ({"architecture": "topk"}, "'topk', and only jump_relu"),
    ):
        _refused(folder(path, arrays, "params.safetensors", {"config.json": config | changes}), says)


def test_layers_of_crosscoders_and_cross_layer_transcoders(tmp_path: Path):
    """Latents read their own layer; of the decoders one is chosen (the tutorial of Gemma Scope 2 has the formula)."""
    rng = np.random.default_rng(0)
    w_dec = rng.standard_normal((F, 3, D)).astype(np.float32)
    arrays = {name.lower(): W[name] for name in FOUR} | {"threshold": W["threshold"], "w_dec": w_dec}
    repo = tmp_path / "google/gemma-scope-2-1b-pt"
    cross = repo / "crosscoder/layer_7_13_17_width_262k_l0_medium"
    x = rng.standard_normal((5, D)).astype(np.float32)
    latents = layouts.jump(x @ W["W_enc"] + W["b_enc"], W["threshold"])
    for number, layer in enumerate((7, 13, 17)):
        folder(cross, arrays, f"params_layer_{number}.safetensors", {})
        sae = load_sae(cross / f"params_layer_{number}.safetensors")
        site = f"blocks.{layer}.hook_resid_post"
        assert (sae.config.site_in, sae.config.site_out, sae.config.model) == (site, site, "google/gemma-3-1b-pt")
        np.testing.assert_allclose(encode(sae, x), latents, atol=3e-5)
        np.testing.assert_allclose(reconstruct(sae, x), latents @ w_dec[:, number] + W["b_dec"], atol=1e-4)
        assert "other layers write to" in sae.config.notes[0]
    other = load_sae(cross / "params_layer_0.safetensors", site_out="L17R")
    assert other.config.site_out == "blocks.17.hook_resid_post"
    np.testing.assert_allclose(reconstruct(other, x), latents @ w_dec[:, 2], atol=1e-4)
    with pytest.raises(UserError, match="site_out 'blocks.9.hook_resid_post' is none of"):
        load_sae(cross / "params_layer_0.safetensors", site_out="L9R")
    _refused(cross, "holds 3 files of tensors: params_layer_0")
    clt = folder(repo / "clt/width_262k_l0_big_affine", arrays | {"affine_skip_connection": W["W_skip"]},
                 "params_layer_1.safetensors", {}) / "params_layer_1.safetensors"  # fmt: skip
    sae = load_sae(clt)
    assert (sae.config.site_in, sae.config.site_out) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    np.testing.assert_allclose(reconstruct(sae, x), latents @ w_dec[:, 1] + W["b_dec"] + x @ W["W_skip"], atol=1e-4)
    later = load_sae(clt, site_out="blocks.2.hook_mlp_out")
    np.testing.assert_allclose(reconstruct(later, x), latents @ w_dec[:, 2], atol=1e-4)


def test_unit_decoder_is_asked_for_or_refused(tmp_path: Path):
    relu, topk = layouts.goodfire(tmp_path), layouts.saelens_topk_rescaled(tmp_path)
    np.testing.assert_allclose(np.linalg.norm(load_sae(relu.path, unit_decoder=True).W_dec, axis=1), 1, atol=1e-6)
    assert load_sae(relu.path).config.latent_units == "as stored"
    assert load_sae(topk.path).config.latent_units == "unit decoder"
    with pytest.raises(UserError, match="cannot be had"):
        load_sae(topk.path, unit_decoder=False)
    with pytest.raises(UserError, match="which latents win"):
        load_sae(layouts.sparsify_topk(tmp_path).path, unit_decoder=True)
    with pytest.raises(UserError, match="never fitted"):
        load_sae(layouts.dl_batch_topk_unfitted(tmp_path).path, use_threshold=True)


# The hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one repository with three SAEs."""
    root = tmp_path / "hub" / "models--google--gemma-scope-2b-pt-res"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("a" * 40)
    snapshot = root / "snapshots" / ("a" * 40)
    for name in (
        "layer_0/width_16k/average_l0_20",
        "layer_0/width_16k/average_l0_71",
        "layer_1/width_65k/average_l0_9",
    ):
        folder(snapshot / name, FOUR | {"threshold": W["threshold"]}, "params.npz", {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_hub_folder_that_was_downloaded_before_needs_no_network(cache: Path):
    sae = load_sae("google/gemma-scope-2b-pt-res:layer_0/width_16k/average_l0_71")
    assert (sae.config.site_in, sae.config.model) == ("blocks.0.hook_resid_post", "google/gemma-2-2b")
    pinned = load_sae(f"google/gemma-scope-2b-pt-res@{'a' * 40}:layer_1/width_65k/average_l0_9/params.npz")
    assert pinned.config.site_in == "blocks.1.hook_resid_post"
    with pytest.raises(UserError, match="neither on this machine nor obtainable.*hf download"):
        load_sae("google/gemma-scope-2b-pt-res:layer_7/width_16k/average_l0_71")
    with pytest.raises(UserError, match="neither on this machine"):
        load_sae("nobody/nothing")


def test_only_the_files_of_one_sae_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch):
    files = [str(p.relative_to(cache)) for p in cache.rglob("*.npz")] + ["layer_0/width_16k/notes.json", "README.md"]
    fetched: list[list[str]] = []

    class Info:
        sha = "a" * 40
        siblings = [type("File", (), {"rfilename": name}) for name in files]

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str] | None = None, **_: Any) -> str:
        fetched.append(sorted(allow_patterns or []))
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, revision=None: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_sae("google/gemma-scope-2b-pt-res:layer_0/width_16k/average_l0_20")
    assert fetched == [["layer_0/width_16k/average_l0_20/params.npz"]]
    found = find_sae("google/gemma-scope-2b-pt-res:layer_0/width_16k/average_l0_20", Overrides())
    assert set(found.tensors) == {*FOUR, "threshold"}
    with pytest.raises(UserError, match="holds no SAE in 'layer_0/width_16k'. Folders with one: layer_0/width_16k/av"):
        load_sae("google/gemma-scope-2b-pt-res:layer_0/width_16k")
    with pytest.raises(UserError, match="Folders with one: .*layer_1/width_65k/average_l0_9"):
        load_sae("google/gemma-scope-2b-pt-res:layer_1/width_65k/average_l0_8")


def test_metadata_of_ours_is_checked(tmp_path: Path):
    case = layouts.saelens_standard(tmp_path)
    cfg = saelens_cfg("standard") | {"metadata": METADATA | {"jaxsteer": {"format": "jaxsteer.sae/99"}}}
    (case.path / "cfg.json").write_text(json.dumps(cfg))
    _refused(case.path, "jaxsteer.sae/99")
    cfg["metadata"]["jaxsteer"] = {"format": "jaxsteer.sae/1", "config": {"activation": "relu", "colour": 1}}
    (case.path / "cfg.json").write_text(json.dumps(cfg))
    _refused(case.path, "its record has colour: it is damaged, or a later version")
    cfg["metadata"]["jaxsteer"] = {"format": "jaxsteer.sae/1", "config": {"activation": "silu"}}
    (case.path / "cfg.json").write_text(json.dumps(cfg))
    _refused(case.path, "record is damaged .activation is 'silu'")
