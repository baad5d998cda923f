"""Six families, one transformer: their numbers, their tensor names and their files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxsteer
from checkpoints_convert.families import FAMILIES as MODEL_TYPES
from checkpoints_convert.files import read_headers
from checkpoints_convert.hf import config_from_hf
from checkpoints_convert.names import LAYER_NAMES, assign, expected_leaves
from jaxsteer import UserError
from jaxsteer.checkpoints.inspect import parameters
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import forward
from jaxsteer.models.transformer import scale_embeddings
from tests.helpers.checkpoints import FAMILIES, WINDOW, family_config, hf_directory, random_model
from tests.helpers.reference import reference_forward

TOKENS = np.random.default_rng(0).integers(0, 67, 3 * WINDOW)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_agrees_with_float64_numpy(family: str) -> None:
    model = random_model(family_config(family))
    found = jax.jit(forward, static_argnames="config")(model.params, model.config, jnp.asarray(TOKENS)[None])[0]
    np.testing.assert_allclose(found, reference_forward(model.params, model.config, TOKENS)[0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_loaded_again_is_the_same_model(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    directory = hf_directory(tmp_path, config, dtype="bfloat16")
    assert (directory / "model.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = jaxsteer.load(directory, dtype="bfloat16")
    assert loaded.config == config
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), random_model(config).params)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


@pytest.mark.parametrize(
    ("width", "factor"), [(1152, 34), (2304, 48), (2560, 50.5), (3584, 59.75), (3840, 62), (4608, 68), (5376, 73.5)]
)
def test_the_embedding_multiplier_is_rounded_to_the_dtype_of_the_weights(width: int, factor: float) -> None:
    config = family_config("gemma2", d_model=width)
    assert float(scale_embeddings(jnp.ones(1, jnp.bfloat16), config)[0]) == factor
    assert float(scale_embeddings(jnp.ones(1), config)[0]) == np.float32(np.sqrt(width))


def test_every_model_type_has_a_table_of_names() -> None:
    assert set(LAYER_NAMES) == set(MODEL_TYPES)


def test_post_attention_is_a_different_norm_in_gemma() -> None:
    def names(family: str) -> dict[str, str]:
        return {leaf[-1]: name for leaf, (name, _, _) in expected_leaves(family_config(family)).items()}

    last = len(family_config("gemma2").windows) - 1
    for family in ("llama", "qwen2", "qwen3"):
        assert names(family)["mlp_norm"] == "model.layers.2.post_attention_layernorm.weight"
    for family in ("gemma2", "gemma3"):
        assert names(family)["post_attn_norm"] == f"model.layers.{last}.post_attention_layernorm.weight"
        assert names(family)["mlp_norm"] == f"model.layers.{last}.pre_feedforward_layernorm.weight"
        assert names(family)["post_mlp_norm"] == f"model.layers.{last}.post_feedforward_layernorm.weight"


# Layouts of Gemma 3


def changed(directory: Path, rename: Callable[[str], str], **more: np.ndarray) -> Path:
    """The checkpoint with every tensor renamed, and ``more`` tensors (dots in their names written as ``__``)."""
    path = directory / "model.safetensors"
    tensors = {rename(name): values for name, values in load_file(path).items()}
    save_file(tensors | {name.replace("__", "."): values for name, values in more.items()}, path)
    return directory


def gemma3(path: Path, **changes: object) -> tuple[Path, ModelConfig]:
    """Files with the names of a text model, and the config as it comes out of a multimodal checkpoint."""
    config = family_config("gemma3", n_layers=3, **changes)
    return hf_directory(path, config), dataclasses.replace(config, family="gemma3")


SEEING = np.zeros((2, 2), np.float32)
VISION = {
    "vision_tower__vision_model__embeddings__position_embedding__weight": SEEING,
    "vision_tower__vision_model__encoder__layers__0__self_attn__q_proj__bias": SEEING,
    "multi_modal_projector__mm_input_projection_weight": SEEING,
}


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside model."])
def test_every_prefix_of_gemma_3(tmp_path: Path, prefix: str, inside: bool) -> None:
    directory, config = gemma3(tmp_path)
    before = {leaf: tensor.read() for leaf, tensor in assign(read_headers(directory), config)[0].items()}
    vision = {("model__" if inside else "") + name: values for name, values in VISION.items()}
    changed(directory, lambda name: prefix + name.removeprefix("model."), **vision)
    after, ignored = assign(read_headers(directory), config)
    assert sorted(ignored) == sorted(name.replace("__", ".") for name in vision)
    assert after.keys() == before.keys()
    for leaf, tensor in after.items():
        assert tensor.name.startswith(prefix)
        np.testing.assert_array_equal(tensor.read(), before[leaf])


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_heads_of_gemma_3(tmp_path: Path, head: str) -> None:
    directory, untied = gemma3(tmp_path, tied_embeddings=False)
    changed(directory, lambda name: head if name == "lm_head.weight" else f"language_model.{name}", **VISION)
    leaves, _ = assign(read_headers(directory), untied)
    assert leaves[("unembed",)].name == head
    tied = dataclasses.replace(untied, tied_embeddings=True)
    with pytest.raises(UserError, match=f"stores '{head}' with values other than 'language_model.model.embed_tokens"):
        assign(read_headers(directory), tied)
    embed = load_file(directory / "model.safetensors")["language_model.model.embed_tokens.weight"]
    changed(directory, lambda name: name, **{head.replace(".", "__"): embed})
    leaves, ignored = assign(read_headers(directory), tied)
    assert ("unembed",) not in leaves and head in ignored


# GPT-2


def conv_directory(path: Path) -> tuple[Path, ModelConfig]:
    config = family_config("gpt2")
    return hf_directory(path, config), config


def test_matrices_of_gpt2_are_shown_as_others_lie(tmp_path: Path) -> None:
    """c_attn holds queries, keys and values side by side, and every matrix is [in, out]."""
    directory, config = conv_directory(tmp_path)
    stored, layers = load_file(directory / "model.safetensors"), random_model(config).params.layers
    fused = stored["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (24, 72) and stored["transformer.h.1.mlp.c_fc.weight"].shape == (24, 40)
    leaves, ignored = assign(read_headers(directory), config)
    assert not ignored
    for third, name in enumerate("qkv"):
        np.testing.assert_array_equal(fused[:, 24 * third :][:, :24], getattr(layers, name)[1].reshape(24, 24))
        part = leaves["layers", "001", name]
        assert part.name == f"transformer.h.1.attn.c_attn.weight[{name}]" and part.shape == (24, 24)
        for rows in (1, 7, 24):
            seen: list[bytes] = []
            blocks = list(part.blocks(rows, update=lambda data, seen=seen: seen.append(bytes(data))))
            assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
            np.testing.assert_array_equal(np.concatenate(blocks), fused[:, 24 * third :][:, :24].T)
            assert b"".join(seen) == np.concatenate(blocks).tobytes()
        bias = leaves["layers", "001", f"{name}_bias"]
        np.testing.assert_array_equal(next(bias.blocks(24)), getattr(layers, f"{name}_bias")[1].reshape(-1))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_every_prefix_of_gpt2_and_its_masks(tmp_path: Path, prefix: str) -> None:
    """Its first files have no prefix, and hold causal masks as tensors."""
    directory, config = conv_directory(tmp_path)
    mask = np.tril(np.ones((1, 1, 8, 8), np.float32))
    masks = {f"{prefix.replace('.', '__')}h__{i}__attn__bias": mask for i in range(3)}
    changed(directory, lambda name: prefix + name.removeprefix("transformer."), **masks)
    assert len(assign(read_headers(directory), config)[1]) == 3
    loaded = jaxsteer.load(directory)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, random_model(config).params)


def test_what_gpt2_is_not_is_named(tmp_path: Path) -> None:
    directory, config = conv_directory(tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"transformer.h.0.attn.c_attn.weight": np.zeros((72, 24), np.float32)}, path)
    with pytest.raises(UserError, match=r"c_attn.weight' in .* has shape \[72, 24\].* asks for \[24, 72\]"):
        assign(read_headers(directory), config)
    fields = json.loads((directory / "config.json").read_text())
    for change, says in (
        ({"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' = True"),
        ({"scale_attn_weights": False}, "'scale_attn_weights' = False"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"n_head": 5}, "n_embd 24, which 5 heads"),
        ({"n_positions": 0}, "'n_positions' = 0"),
        ({"rope_theta": 5.0}, "'rope_theta' = 5.0, which jaxsteer does not know"),
    ):
        (directory / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(UserError, match=says):
            config_from_hf(directory)


def test_the_config_of_gpt2_small(tmp_path: Path) -> None:
    """The fields of the published file: 124,439,808 parameters."""
    fields = dict(
        activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256,
        embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2",
        n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=50257,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = config_from_hf(tmp_path)
    assert parameters(config)["total"] == 124_439_808
    assert (config.d_head, config.d_mlp, config.query_scale, config.norm_eps) == (64, 3072, 0.125, 1e-5)
    assert config.tied_embeddings and config.norm == "layer" and not config.ropes


def test_fingerprints_of_other_families_do_not_know_gpt2() -> None:
    """Checkpoints hash their config: fields that only GPT-2 sets must not be there."""
    new = {"gated_mlp", "norm", "writer_bias", "learned_positions"}
    for family in FAMILIES:
        assert new & family_config(family).to_json().keys() == (new if family == "gpt2" else set())


def test_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    for family in set(FAMILIES) - {"gpt2"}:
        directory = hf_directory(tmp_path / family, family_config(family))
        changed(directory, lambda name: name, model__layers__0__self_attn__rotary_emb__inv_freq=SEEING)
        assert assign(read_headers(directory), family_config(family))[1] == [
            "model.layers.0.self_attn.rotary_emb.inv_freq"
        ]


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    directory, config = gemma3(tmp_path)
    text = dataclasses.replace(config, family="gemma3_text")
    changed(directory, lambda name: name, **VISION)
    with pytest.raises(UserError, match="holds 3 tensors that a gemma3_text model.*multi_modal_projector"):
        assign(read_headers(directory), text)
    changed(directory, lambda name: name, audio_tower__weight=SEEING)
    with pytest.raises(UserError, match="holds 1 tensors that a gemma3 model.*audio_tower.weight"):
        assign(read_headers(directory), config)


def test_two_text_models_are_refused(tmp_path: Path) -> None:
    directory, config = gemma3(tmp_path)
    changed(directory, lambda name: name, language_model__model__embed_tokens__weight=SEEING)
    with pytest.raises(UserError, match="several text models"):
        assign(read_headers(directory), config)


def test_names_of_another_family_are_refused(tmp_path: Path) -> None:
    """A Qwen 2.5 checkpoint whose config says Llama would lose its biases."""
    directory = hf_directory(tmp_path, family_config("qwen2"))
    fields = json.loads((directory / "config.json").read_text())
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name in ("use_sliding_window", "layer_types"):
        del fields[name]
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"holds 9 tensors that a llama model.*self_attn\.k_proj\.bias"):
        jaxsteer.load(directory)
