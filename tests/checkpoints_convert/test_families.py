"""Five families, one transformer: their numbers, their tensor names and their files."""

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
from checkpoints_convert.names import LAYER_NAMES, assign, expected_leaves
from jaxsteer import UserError
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


def test_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    for family in FAMILIES:
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
