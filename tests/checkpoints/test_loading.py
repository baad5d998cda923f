"""``load``: its sources, its cache, its dtypes, its meshes and its refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

import jaxsteer
from checkpoints_convert import convert, verify
from jaxsteer import UserError
from jaxsteer.checkpoints import loading, restoring
from jaxsteer.checkpoints.inspect import describe
from jaxsteer.checkpoints.loading import load_tokenizer
from jaxsteer.models import sharding
from jaxsteer.models.params import layer_shapes
from jaxsteer.models.sharding import make_mesh, shard_params, shard_rows
from tests.helpers.checkpoints import family_config, hf_directory, random_params, tiny_config
from tests.helpers.tiny import tiny_tokenizer

CONFIG = tiny_config()
TOKENS = np.arange(24).reshape(4, 6)


def equal(a: object, b: object) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hugging_face_directory_is_converted_once(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture) -> None:
    directory = hf_directory(tmp_path / "tiny-llama", CONFIG)
    tiny_tokenizer().save_pretrained(directory)
    first = jaxsteer.load(directory)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "tiny-llama" in said and str(cache) in said
    second = jaxsteer.load(str(directory))
    assert capfd.readouterr().err == ""
    assert first.config == CONFIG and first.name == "tiny-llama"
    assert equal(first.params, random_params(CONFIG)) and equal(first.params, second.params)
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
    text = "Do you agree?<|end|>"
    assert first.tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert first.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert len(list((cache / "checkpoints").iterdir())) == 1  # no temporary directory is left


def test_the_cache_follows_the_contents(tmp_path: Path, cache: Path) -> None:
    directory = hf_directory(tmp_path / "a", CONFIG, seed=1)
    one = jaxsteer.load(directory)
    shutil.copytree(directory, tmp_path / "b")
    same = jaxsteer.load(tmp_path / "b")
    assert same.fingerprint == one.fingerprint
    assert len(list((cache / "checkpoints").iterdir())) == 1
    hf_directory(directory, CONFIG, seed=2)
    other = jaxsteer.load(directory)
    assert other.fingerprint != one.fingerprint
    assert equal(other.params, random_params(CONFIG, 2))


def test_several_first_uses_at_once(tmp_path: Path, cache: Path) -> None:
    directory = hf_directory(tmp_path / "m", CONFIG)
    with ThreadPoolExecutor(3) as pool:
        places = set(pool.map(lambda _: loading._convert_once(directory, "m"), range(3)))
    assert len(places) == 1 and len(list((cache / "checkpoints").iterdir())) == 1


def test_a_converted_directory_loads_relative_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(hf_directory(tmp_path / "m", CONFIG), tmp_path / "out", progress=False)
    monkeypatch.chdir(tmp_path)
    model = jaxsteer.load("out")
    assert equal(model.params, random_params(CONFIG))
    assert model.name == "out" and model.tokenizer is None


def test_dtypes(tmp_path: Path) -> None:
    convert(hf_directory(tmp_path / "m", CONFIG, dtype="bfloat16"), tmp_path / "out", progress=False)
    default, low = jaxsteer.load(tmp_path / "out"), jaxsteer.load(tmp_path / "out", dtype="bfloat16")
    assert default.params.embed.dtype == jnp.float32  # on CPU
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype("bfloat16")}
    exact = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params(CONFIG))
    assert equal(low.params, exact)
    assert equal(default.params, jax.tree.map(lambda a: a.astype(jnp.float32), exact))
    assert default.fingerprint == low.fingerprint
    with pytest.raises(UserError, match="int8"):
        jaxsteer.load(tmp_path / "out", dtype="int8")


def test_eight_devices_give_the_same_as_one(tmp_path: Path) -> None:
    # 3 query heads and 1 key/value head do not divide over two devices: those leaves are split along their width.
    for config in (CONFIG, tiny_config(n_heads=3, n_kv_heads=1, vocab_size=66)):
        out = convert(hf_directory(tmp_path / f"m{config.n_heads}", config), tmp_path / f"{config.n_heads}")
        mesh = make_mesh(model=2)
        assert mesh.shape == {"prompts": 4, "model": 2}
        one, eight = jaxsteer.load(out), jaxsteer.load(out, mesh=mesh)
        assert equal(one.params, eight.params)
        assert eight.params.layers.down.addressable_shards[0].data.shape == (3, 20, 24)
        heads = eight.params.layers.q.addressable_shards[0].data.shape[2]
        assert heads == (2 if config.n_heads == 4 else 3)
        resharded = shard_params(one.params, config, mesh)
        assert jax.tree.all(
            jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), resharded, eight.params)
        )
        if config is CONFIG:
            site = "blocks.1.hook_resid_post"
            for ours, theirs in (
                (jaxsteer.logits(eight, TOKENS), jaxsteer.logits(one, TOKENS)),
                (jaxsteer.capture(eight, TOKENS, [site])[site], jaxsteer.capture(one, TOKENS, [site])[site]),
            ):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rows_that_do_not_divide_are_replicated() -> None:
    mesh = make_mesh(model=2)
    assert shard_rows(mesh, TOKENS).addressable_shards[0].data.shape == (1, 6)
    assert shard_rows(mesh, TOKENS[:3]).addressable_shards[0].data.shape == (3, 6)
    assert len(shard_rows(None, TOKENS).devices()) == 1


def test_a_mesh_larger_than_the_machine() -> None:
    with pytest.raises(UserError, match="needs 16 devices, and there are 8"):
        make_mesh(model=2, prompts=8)


def test_sources_that_are_no_model(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for source, says in (
        ("organism:nobody", "no organism 'nobody'"),
        (tmp_path / "empty", "neither jaxsteer.json nor config.json"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "absent", "was not found.*Tried.*local directory"),
        ("no such model", "was not found.*Tried"),
        (
            "somebody/some-model",
            "neither.*nor obtainable.*some-model --local-dir DIR.*pass that directory",
        ),
        ("somebody/some-model@v2", "some-model --revision v2 --local-dir DIR"),
    ):
        with pytest.raises(UserError, match="(?s)" + says):
            jaxsteer.load(source)


def test_a_hub_id_is_downloaded_and_its_commit_recorded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hf_directory(tmp_path / "snapshots" / "c0ffee", CONFIG)
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = jaxsteer.load("owner/some-model@v1.0")
    assert model.name == "owner/some-model@v1.0" and equal(model.params, random_params(CONFIG))
    assert asked["repo"] == "owner/some-model" and asked["revision"] == "v1.0"
    wanted = {"model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"}
    wanted |= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    others = {"pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "onnx/config.json"}
    others |= {"gguf/model.gguf", "model.gguf", "fp16/model.safetensors", "flax_model.msgpack"}
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert set(filter_repo_objects(sorted(wanted | others), **patterns)) == wanted
    (checkpoint,) = (cache / "checkpoints").iterdir()
    record = loading.read_record(checkpoint)
    assert (record["source"], record["revision"]) == ("owner/some-model", "c0ffee")


def test_a_gated_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="is gated: accept its terms.*HF_TOKEN"):
        jaxsteer.load("owner/gated-model")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="JAXSTEER_CACHE"):
        jaxsteer.load(hf_directory(tmp_path / "m", CONFIG))


def test_damaged_checkpoints(tmp_path: Path) -> None:
    out = convert(hf_directory(tmp_path / "m", CONFIG), tmp_path / "out", progress=False)
    chunk = out / "weights" / "layers" / "001" / "up" / "0.0"
    values = chunk.read_bytes()
    for damage in (chunk.unlink, lambda: chunk.write_bytes(values[:-4])):
        damage()
        with pytest.raises(UserError, match="cannot be read at layers/001/up.*Convert the model again"):
            jaxsteer.load(out)
    chunk.write_bytes(values)
    shutil.rmtree(out / "weights" / "embed")
    shutil.copytree(out / "weights" / "final_norm", out / "weights" / "embed")
    with pytest.raises(UserError, match=r"embed is stored as \[24\].* has \[67, 24\]"):
        jaxsteer.load(out)
    (out / "weights" / "index.json").write_text("{}")
    with pytest.raises(UserError, match="lacks the leaf embed"):
        jaxsteer.load(out)
    (out / "weights" / "index.json").unlink()
    with pytest.raises(UserError, match="no weights/index.json.*Convert the model again"):
        jaxsteer.load(out)
    record = json.loads((out / "jaxsteer.json").read_text())
    for changes, says in (
        ({"format": None}, "not the record"),
        ({"dtype": "int99"}, "the dtype 'int99' is none of float32"),
        ({"dtype": ["float32"]}, "the dtype"),
        ({"config": None}, "its config is no object"),
        ({"config": record["config"] | {"n_layers": "3"}}, "is damaged: .*n_layers"),
        ({"config": record["config"] | {"norm_eps": 0}}, "norm_eps must be a finite number"),
        ({"config": record["config"] | {"windows": 5}}, "is damaged"),
        ({"config": record["config"] | {"ropes": [{"theta": 0}]}}, "rope theta must be"),
        ({"config": record["config"] | {"more": 1}}, "is damaged"),
        ({"fingerprint": 7}, "fingerprint is 7"),
    ):
        (out / "jaxsteer.json").write_text(json.dumps(record | changes))
        with pytest.raises(UserError, match="(?s)" + says):
            jaxsteer.load(out)
        with pytest.raises(UserError, match="(?s)" + says):
            describe(str(out))


def test_weights_of_before_are_looked_at_when_they_are_loaded(tmp_path: Path) -> None:
    out = convert(hf_directory(tmp_path / "m", CONFIG), tmp_path / "out", progress=False)
    record = json.loads((out / "jaxsteer.json").read_text())
    del record["finite"]
    (out / "jaxsteer.json").write_text(json.dumps(record))
    jaxsteer.load(out)
    for leaf in ("layers/001/up/0.0", "final_norm/0"):
        chunk = out / "weights" / leaf
        whole = chunk.read_bytes()
        chunk.write_bytes(np.float32(np.inf).tobytes() + whole[4:])
        with pytest.raises(UserError, match=f"1 leaves of the model .* float32, among them {leaf.rpartition('/')[0]}"):
            jaxsteer.load(out)
        chunk.write_bytes(whole)


def test_a_dtype_that_cannot_hold_the_weights(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "m", CONFIG)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, directory / "model.safetensors")
    out = convert(directory, tmp_path / "out", progress=False)
    jaxsteer.load(out, dtype="bfloat16")
    with pytest.raises(UserError, match="infinity as float16, among them final_norm"):
        jaxsteer.load(out, dtype="float16")


def test_a_field_that_was_ignored_once_is_ignored_only_when_asked_for(tmp_path: Path, cache: Path) -> None:
    directory = hf_directory(tmp_path / "m", CONFIG)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"unheard_of": 1}))
    for _ in range(2):
        with pytest.raises(UserError, match="unheard_of"):
            jaxsteer.load(directory)
        assert jaxsteer.load(directory, ignore_fields=["unheard_of"]).config == CONFIG
    out = convert(directory, tmp_path / "out", progress=False, ignore_fields=["unheard_of"])
    assert jaxsteer.load(out).config == CONFIG and not verify(out, directory, progress=False)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loading.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("JAXSTEER_CACHE")
    assert loading.cache_dir() == tmp_path / "shared" / "jaxsteer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert loading.cache_dir() == tmp_path / "home" / ".cache" / "jaxsteer"


def test_truncated_weights_are_reported_by_load(tmp_path: Path, cache: Path) -> None:
    directory = hf_directory(tmp_path / "m", CONFIG)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is truncated.*Download it again"):
        jaxsteer.load(directory)


def test_batches_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tiny_config(n_layers=4, vocab_size=68, norm_eps=2e-5)
    monkeypatch.setattr(sharding, "_PIECE", 100)
    for name, shape, form, chunks in (
        ("q", (24, 4, 8), (32, 24), (8, 24)),
        ("o", (4, 8, 24), (24, 32), (24, 8)),
        ("gate", (24, 40), (40, 24), (5, 24)),
        ("down", (40, 24), (24, 40), (24, 5)),
        ("embed", (68, 24), (68, 24), (17, 24)),
        ("unembed", (24, 68), (68, 24), (17, 24)),
        ("q_bias", (4, 80), (320,), (160,)),
        ("attn_norm", (24,), (24,), (24,)),
    ):
        assert sharding.stored_shape(name, shape) == form and sharding.stored_chunks(name, shape, 4) == chunks
    assert sharding.stored_chunks("embed", (128256, 4096), 2) == (4008, 4096)
    assert sharding.stored_chunks("down", (14336, 4096), 2) == (1024, 896)
    out = convert(hf_directory(tmp_path / "m", config), tmp_path / "out", progress=False)
    whole = jaxsteer.load(out)
    assert equal(whole.params, random_params(config))
    layer = sum(math.prod(shape) for shape in layer_shapes(config).values()) * 4
    for layers_at_once, mesh in ((1, None), (3, make_mesh(model=2)), (1, make_mesh(model=8))):
        monkeypatch.setattr(restoring, "BATCH_BYTES", layers_at_once * layer)
        model = jaxsteer.load(out, mesh=mesh)
        assert equal(model.params, whole.params)
        assert jax.tree.all(
            jax.tree.map(
                lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
                model.params,
                shard_params(whole.params, config, mesh),
            )
        )


PROCESS = """
import os, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import jaxsteer
from jaxsteer.models import loading
first = jaxsteer.load(sys.argv[3], mesh=jaxsteer.make_mesh(model=2))  # converts
def read():
    return int(open("/proc/self/io").read().split()[1])
before = read()
params = loading.load(sys.argv[3], mesh=jaxsteer.make_mesh(model=2)).params
jax.block_until_ready(params)
print(read() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_two_processes_convert_once_and_read_half_each(tmp_path: Path) -> None:
    config = tiny_config(d_model=256, n_layers=2, d_mlp=8192, n_heads=32, n_kv_heads=16, d_head=128)
    directory = hf_directory(tmp_path / "m", config)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    environment = os.environ | {"JAXSTEER_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), address, str(directory)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        read, size = map(int, said.splitlines()[-1].split())
        assert size > 60e6 and size / 2 < read < 0.6 * size
    assert len(list((tmp_path / "cache" / "checkpoints").iterdir())) == 1


def test_only_the_first_layers_are_read(tmp_path: Path) -> None:
    config = family_config("gemma3", n_layers=3, tied_embeddings=False)
    whole = jaxsteer.load(convert(hf_directory(tmp_path / "m", config), tmp_path / "out", progress=False))
    shutil.rmtree(tmp_path / "out" / "weights" / "layers" / "002")
    first = jaxsteer.load(tmp_path / "out", layers=2)
    assert (first.config.n_layers, first.config.windows) == (2, config.windows[:2])
    assert first.config.rope_index == config.rope_index[:2] and len(set(config.rope_index)) == 2
    assert first.fingerprint == whole.fingerprint
    assert equal(first.params.layers, jax.tree.map(lambda leaf: leaf[:2], whole.params.layers))
    assert equal(first.params.unembed, whole.params.unembed)
    with pytest.raises(UserError, match="cannot be read"):
        jaxsteer.load(tmp_path / "out")
    for layers in (0, 4):
        with pytest.raises(UserError, match=f"layers={layers}.*has 3 layers"):
            jaxsteer.load(tmp_path / "out", layers=layers)


def test_public_names_exist_and_import_is_light() -> None:
    for name in jaxsteer.__all__:
        assert getattr(jaxsteer, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = jaxsteer.nothing_such
    code = "import sys, jaxsteer; assert 'jax' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_model_is_a_frozen_record() -> None:
    assert dataclasses.is_dataclass(jaxsteer.Model) and jaxsteer.Model.__dataclass_params__.frozen


def test_a_tokenizer_that_fails_in_use_is_refused_at_load(tmp_path: Path) -> None:
    tiny_tokenizer("llama3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": " "}))
    with pytest.raises(UserError, match="The tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)
