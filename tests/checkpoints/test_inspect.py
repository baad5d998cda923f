"""What is told of a model from its config.json alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest

import jaxsteer
from checkpoints_convert import convert
from checkpoints_convert.hf import config_to_hf
from jaxsteer import UserError
from jaxsteer.checkpoints.inspect import attention_kinds, describe, memory, parameters
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.models.sites import KINDS, site_shapes
from tests.helpers.checkpoints import FAMILIES, WINDOW, family_config, hf_directory, random_model, random_params

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_that_there_are(family: str) -> None:
    config = family_config(family)
    count = parameters(config)
    params = random_model(config).params
    assert count["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count["per_layer"] * config.n_layers == sum(leaf.size for leaf in jax.tree.leaves(params.layers))
    assert count["total"] == sum(value for key, value in count.items() if key not in ("total", "per_layer")) + (
        count["per_layer"] * config.n_layers
    )


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
@pytest.mark.parametrize("model", [1, 2, 4])
def test_bytes_per_device_are_what_a_real_mesh_holds(family: str, model: int) -> None:
    config = family_config(family)
    mesh = make_mesh(model=model, prompts=8 // model)
    placed = shard_params(random_params(config), config, mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert memory(config, "float32", model=model, prompts=8 // model)["weights"] == held
    assert memory(config, "bfloat16", model=model)["weights"] == held // 2


def test_bytes_need_no_devices() -> None:
    config = family_config("llama", n_layers=2, n_heads=64, n_kv_heads=64, rope_index=(0, 0))
    use = memory(config, "float32", model=64, prompts=1024)
    assert use["cache_per_token"] == 2 * 2 * config.d_head * 4  # one key/value head on each device
    assert memory(family_config("llama"), "float32", model=8)["cache_per_token"] == 2 * 3 * 2 * 8 * 4  # 2 do not divide
    with pytest.raises(UserError, match="prompts=1 x model=0"):
        memory(config, "float32", model=0)


def test_sites_have_the_shapes_that_capture_gives() -> None:
    model = random_model(family_config("gemma3"))
    shapes = site_shapes(model.config)
    names = {kind: f"blocks.1.{kind}" if KINDS[kind].in_block else kind for kind in shapes}
    assert set(shapes) == set(KINDS) and "ln1_post.hook_scale" not in site_shapes(family_config("llama"))
    found = jaxsteer.capture(model, np.arange(10).reshape(2, 5), list(names.values()))
    letters = {"B": 2, "T": 5}
    for kind, shape in shapes.items():
        assert found[names[kind]].shape == tuple(letters.get(size, size) for size in shape), kind


def test_attention_is_grouped_by_window_and_rope() -> None:
    kinds = attention_kinds(family_config("gemma3"))
    assert [(kind["window"], kind["layers"]) for kind in kinds] == [(WINDOW, [0, 1, 3, 4, 6]), (None, [2, 5])]
    assert [kind["rope"]["theta"] for kind in kinds] == [100.0, 10_000.0]
    assert json.loads(json.dumps(kinds)) == kinds


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    whole = hf_directory(tmp_path / "whole", family_config("gemma2"), dtype="bfloat16")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(whole / "config.json", alone)
    for source in (whole, alone, alone / "config.json"):
        about = describe(str(source))
        assert (about.config, about.dtype, about.converted) == (family_config("gemma2"), "bfloat16", False)
    assert about.name == "alone"
    assert "transformers_version" not in about.ignored_fields


def test_of_a_hub_model_only_its_config_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        commit = tmp_path / "0123abc"
        commit.mkdir()
        (commit / "config.json").write_text(json.dumps(config_to_hf(family_config("qwen3"))))
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    about = describe("owner/name@main")
    assert (asked["repo"], asked["revision"], asked["allow_patterns"]) == ("owner/name", "main", ["config.json"])
    assert (about.name, about.revision, about.config) == ("owner/name", "0123abc", family_config("qwen3"))


def test_a_converted_checkpoint_tells_what_was_left_out(tmp_path: Path) -> None:
    out = convert(GOLDENS / "gemma3", tmp_path / "out", dtype="bfloat16", progress=False)
    about = describe(str(out))
    assert (about.converted, about.dtype, about.config.family) == (True, "bfloat16", "gemma3")
    assert any(name.startswith("vision_tower.") for name in about.ignored_tensors)
    assert "vision_config" in about.ignored_fields
    (out / "config.json").unlink()  # the record says all that is needed
    assert describe(str(out)).config == about.config


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no organism 'nobody'"):
        describe("organism:nobody")
    with pytest.raises(UserError, match="nobody/nothing.*--local-dir"):
        describe("nobody/nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="mamba"):
        describe(str(tmp_path / "config.json"))


def test_the_organism() -> None:
    about = describe("organism:llama")
    assert about.name == "organism:llama"
    assert parameters(about.config)["total"] == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(jaxsteer.load("organism:llama").params)
    )
