"""Conversion: nothing lost, nothing half-written, everything that is wrong said before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import checkpoints_convert.streaming as module
from checkpoints_convert import convert, verify, write_hf
from checkpoints_convert.__main__ import main
from checkpoints_convert.files import all_finite, read_header, read_headers, side_files
from checkpoints_convert.names import LAYER_NAMES, TOP_NAMES
from jaxsteer import UserError, load
from jaxsteer.models import sharding
from jaxsteer.models.sharding import IN_AXES
from tests.helpers.checkpoints import hf_directory, random_params, tiny_config

CONFIG = tiny_config()
TIED = tiny_config(tied_embeddings=True)
Change = Callable[[dict[str, np.ndarray]], object]


def equal(a: object, b: object) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def rewrite(directory: Path, change: Change) -> Path:
    """The directory with its tensors changed by ``change`` (in place)."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def shard(directory: Path, parts: int = 3) -> Path:
    """The directory with its one file split into several and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[part::parts]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_there_and_back_is_bit_exact(config: object, dtype: str, tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf", config, dtype=dtype)
    out = convert(source, tmp_path / "out", progress=False)
    record = json.loads((out / "jaxsteer.json").read_text())
    assert record["dtype"] == dtype and record["ignored_tensors"] == []
    model = load(out, dtype=dtype)
    write_hf(model.params, model.config, tmp_path / "back", dtype=dtype)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes(), name


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    one = convert(hf_directory(tmp_path / "one"), tmp_path / "out1", progress=False)
    many = convert(shard(hf_directory(tmp_path / "many")), tmp_path / "out2", progress=False)
    first, second = (json.loads((out / "jaxsteer.json").read_text()) for out in (one, many))
    assert first["fingerprint"] == second["fingerprint"]
    assert first["source_hash"] != second["source_hash"]  # of the files


def test_models_and_names_agree_on_how_matrices_lie() -> None:
    for table in (*LAYER_NAMES.values(), *TOP_NAMES.values()):
        for name, source in table.items():
            assert IN_AXES.get(name, 0) == (source.in_axes or 0)


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_directory(tmp_path / "hf")
    whole = convert(source, tmp_path / "whole", progress=False)
    for block_bytes, dtype in ((1, None), (500, None), (500, "bfloat16")):
        monkeypatch.setattr(sharding, "_BLOCK_BYTES", block_bytes)
        parts = convert(source, tmp_path / f"{block_bytes}-{dtype}", dtype=dtype, progress=False)
        assert len(list((parts / "weights" / "layers" / "000" / "up").iterdir())) >= 5
        if dtype is None:
            first, second = (json.loads((out / "jaxsteer.json").read_text()) for out in (whole, parts))
            assert first["fingerprint"] == second["fingerprint"]
            assert first["source_hash"] == second["source_hash"]
            assert equal(load(parts).params, random_params(CONFIG))
        assert verify(parts, source, progress=False) == [] == verify(parts, progress=False)


def test_memory_is_that_of_blocks_whatever_the_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_directory(tmp_path / "hf")
    monkeypatch.setattr(sharding, "_BLOCK_BYTES", 500)
    given, write_leaf = [], module.write_leaf

    def seen(job: object, leaf: object, shape: object, weights: object, memory: np.ndarray, wrote: object) -> object:
        given.append(memory)
        return write_leaf(job, leaf, shape, weights, memory, wrote)

    monkeypatch.setattr(module, "write_leaf", seen)
    convert(source, tmp_path / "out", progress=False)
    assert len(given) == 30 and len({id(memory) for memory in given}) <= module.THREADS
    assert {memory.nbytes for memory in given} == {480}  # the embedding has 6432


def test_weights_are_plain_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_PIECE", 100)
    monkeypatch.setattr(sharding, "_BLOCK_BYTES", 1000)
    source = hf_directory(tmp_path / "hf", dtype="bfloat16")
    weights = convert(source, tmp_path / "out", progress=False) / "weights"
    for leaf, name, chunks in (
        ("layers/000/down", "model.layers.0.mlp.down_proj.weight", [12, 5]),
        ("layers/002/up", "model.layers.2.mlp.up_proj.weight", [5, 24]),
        ("final_norm", "model.norm.weight", [24]),
    ):
        assert json.loads((weights / leaf / ".zarray").read_text())["chunks"] == chunks
        array = tensorstore.open({"driver": "zarr", "kvstore": f"file://{weights / leaf}/"}).result()
        np.testing.assert_array_equal(array.read().result(), load_file(source / "model.safetensors")[name])


def test_fingerprint_follows_weights_and_config(tmp_path: Path) -> None:
    prints = set()
    for number, source in enumerate(
        [
            hf_directory(tmp_path / "a", CONFIG),
            hf_directory(tmp_path / "b", CONFIG, seed=1),
            hf_directory(tmp_path / "c", tiny_config(norm_eps=1e-6)),
            rewrite(hf_directory(tmp_path / "d", CONFIG), lambda t: t["model.norm.weight"].__setitem__(0, 7.0)),
        ]
    ):
        out = convert(source, tmp_path / str(number), progress=False)
        prints.add(json.loads((out / "jaxsteer.json").read_text())["fingerprint"])
    assert len(prints) == 4


def test_the_record_and_the_files_that_travel(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(json.dumps({"name": name}))
    (source / "optimizer.pt").write_text("not ours")
    out = convert(source, tmp_path / "deep" / "out", progress=False, source="owner/model", revision="abc")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "chat_template.jinja").exists() and not (out / "optimizer.pt").exists()
    record = json.loads((out / "jaxsteer.json").read_text())
    assert record["source"] == "owner/model" and record["revision"] == "abc"
    assert len(record["source_hash"]) == len(record["fingerprint"]) == 64
    assert type(CONFIG).from_json(record["config"]) == CONFIG
    assert oct(out.stat().st_mode)[-3:] == "755"


@pytest.mark.parametrize("hub", [False, True])
def test_side_files_are_not_taken_from_elsewhere(tmp_path: Path, hub: bool) -> None:
    """Links of a hub's cache lead to its blobs; others could copy what is not the model's."""
    directory, blobs = tmp_path / "repo/snapshots/1", tmp_path / ("repo/blobs" if hub else "blobs")
    directory.mkdir(parents=True), blobs.mkdir()
    (blobs / "0").write_text("{}")
    (directory / "tokenizer.json").symlink_to(blobs / "0")
    if hub:
        assert side_files(directory) == ["tokenizer.json"]
    else:
        with pytest.raises(UserError, match="outside of the model's directory"):
            side_files(directory)


def test_tensors_that_mean_nothing_are_listed(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    out = convert(rewrite(hf_directory(tmp_path / "hf", TIED), add), tmp_path / "out", progress=False)
    ignored = json.loads((out / "jaxsteer.json").read_text())["ignored_tensors"]
    assert ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]


def test_dtypes_asked_for_and_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = hf_directory(tmp_path / "hf", dtype="float32")
    out = convert(source, tmp_path / "bf16", dtype="bfloat16", progress=False)
    expected = jax.tree.map(lambda a: a.astype("bfloat16"), random_params(CONFIG))
    assert equal(load(out, dtype="bfloat16").params, expected)

    def mix(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float64 if "norm" in name else ml_dtypes.bfloat16)

    with caplog.at_level("WARNING"):
        out = convert(rewrite(source, mix), tmp_path / "mixed", progress=False)
    assert json.loads((out / "jaxsteer.json").read_text())["dtype"] == "bfloat16"
    assert "BF16, F64" in caplog.text


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(Q), "lacks 1 of the 30 tensors.*q_proj"),
        (lambda t: t.update({Q: t[Q][:, :-1].copy()}), r"q_proj.*shape \[32, 23\].*asks for \[32, 24\]"),
        (lambda t: t.update({Q: np.ascontiguousarray(t[Q].T)}), r"shape \[24, 32\]"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t[Q][0]}), "holds 1 tensors.*q_proj.bias"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[Q]}), "layers.3.mlp.up_proj.weight"),
        (lambda t: t.update({Q: t[Q].astype(np.int8)}), "dtype I8.*F64, F32, F16, BF16"),
        (lambda t: t.update({Q: t[Q].astype(ml_dtypes.float8_e4m3fn)}), "dtype F8_E4M3.*dequantised"),
    ],
)
def test_wrong_tensors(tmp_path: Path, change: Change, says: str) -> None:
    refuses(rewrite(hf_directory(tmp_path / "hf"), change), tmp_path / "out", says)


def refuses(source: Path, out: Path, says: str, **options: object) -> None:
    """The conversion is refused with this message before any weight is read, and leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_write_groups", lambda *args, **kwargs: pytest.fail("weights were read"))
        with pytest.raises(UserError, match="(?s)" + says):
            convert(source, out, progress=False, **options)
    assert sorted(out.parent.iterdir()) == before


def test_a_tied_model_with_another_head(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    refuses(rewrite(hf_directory(tmp_path / "hf", TIED), add), tmp_path / "out", "lm_head.*tie_word_embeddings")


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf")
    file = source / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for size, says in (
        (len(whole) - 1, "model.safetensors is truncated: tensor"),
        (header + 9, "truncated: tensor"),
        (header, "truncated or not a safetensors file"),
        (5, "truncated or not a safetensors file"),
        (0, "truncated or not a safetensors file"),
    ):
        file.write_bytes(whole[:size])
        refuses(source, tmp_path / "out", says)
    file.write_bytes(whole[:8] + b"x" * header + whole[8 + header :])
    refuses(source, tmp_path / "out", "the header of .*model.safetensors, line 1: not JSON")
    # the first shape, changed to one that does not fit its bytes
    file.write_bytes(whole.replace(b'"shape":[67,24]', b'"shape":[67,23]', 1))
    refuses(source, tmp_path / "out", "cannot take the")


def raw_safetensors(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    """A safetensors file that says what ``header`` says, right or wrong."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: object = 0, end: object = 16, shape: object = (4,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry(), "b": entry()}, "'b' begins at byte .* where the one before it ends at .*overlap"),
        ({"a": entry(0, 12, [3]), "b": entry(8, 16, [2])}, "'b' begins .* overlap"),
        ({"a": entry(8, 16, [2])}, "'a' begins .* leave a gap"),
        ({"a": entry(0, 8, [2])}, "its tensors end at byte .* and the file has"),
        ('{"a": ' + json.dumps(entry(0, 8, [2])) + ', "a": ' + json.dumps(entry(8, 16, [2])) + "}", "'a' occurs twice"),
        ({"a": entry(shape=[4.0])}, "'a' is .* where a dtype, a shape and two data_offsets were expected"),
        ({"a": entry(shape=[True, 4])}, "'a' is"),
        ({"a": entry(shape=["4"])}, "'a' is"),
        ({"a": entry(shape=4)}, "'a' is"),
        ({"a": entry(shape=[-2, -2])}, "'a' is"),
        ({"a": entry(dtype=["F32"])}, "'a' is"),
        ({"a": entry(begin=16, end=0)}, "'a' .*cannot take"),
        ({"a": entry() | {"data_offsets": [0]}}, "'a' is"),
        ({"a": entry(end=10**30)}, "truncated: tensor 'a'"),
        ({"a": entry(shape=[10**200, 10**200])}, "'a' .*cannot take"),
        ({"a": 3}, "'a' is 3"),
        ([], "is no object"),
        ("[" * 10_000, "nested more than"),
        ('{"a": {"dtype": "\\ud800"}}', "half a character"),
    ],
)
def test_headers_that_no_writer_writes(tmp_path: Path, header: object, says: str) -> None:
    with pytest.raises(UserError, match="(?s)m.safetensors.*" + says):
        read_header(raw_safetensors(tmp_path / "m.safetensors", header))


def test_headers_that_look_odd_and_are_right(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 16, [1, 2]),
        "empty": entry(8, 8, [0]),
        "a": entry(0, 8, [2]),
    }
    found = {tensor.name: tensor.offset for tensor in read_header(raw_safetensors(tmp_path / "m.safetensors", header))}
    assert found["b"] - found["a"] == 8 == found["empty"] - found["a"]
    assert read_header(raw_safetensors(tmp_path / "empty.safetensors", {}, b"")) == []


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_an_index_of_another_model_is_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shards_are_there: bool
) -> None:
    directory = shard(hf_directory(tmp_path / "hf", seed=1))
    for file in [] if shards_are_there else directory.glob("model-*"):
        file.unlink()
    hf_directory(directory, seed=2)
    assert equal(load(convert(directory, tmp_path / "out", progress=False)).params, random_params(CONFIG, 2))
    assert "holds model.safetensors, which is loaded, and an index of model-00001-of-00003.safetensors" in caplog.text


def test_an_index_of_the_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = hf_directory(tmp_path / "hf")
    index = {"weight_map": dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(directory, tmp_path / "out", progress=False)
    assert not caplog.text
    index["weight_map"]["model.norm.weights"] = "model.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(directory, tmp_path / "out2", "'model.norm.weights' is in model.safetensors, and it is not there")


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / "adapter_config.json").write_text("{}")
    refuses(directory, tmp_path / "out", "an adapter .*merge_and_unload")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_that_are_no_numbers(tmp_path: Path, dtype: str, value: float) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name, array in list(tensors.items()):
            tensors[name] = array.astype(dtype)
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value

    source = rewrite(hf_directory(tmp_path / "hf"), spoil)
    for asked in (None, "float32"):
        with pytest.raises(UserError, match="Tensor 'model.layers.1.mlp.up_proj.weight' in .* holds NaN or infinity"):
            convert(source, tmp_path / "out", progress=False, dtype=asked)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_largest_numbers_are_numbers(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        largest = np.asarray([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 0], dtype)
        assert all_finite(largest.view(np.uint8).data, largest.dtype)
    out = convert(hf_directory(tmp_path / "hf"), tmp_path / "out", progress=False)
    assert json.loads((out / "jaxsteer.json").read_text())["finite"] is True


def test_incomplete_directories(tmp_path: Path) -> None:
    source = shard(hf_directory(tmp_path / "hf"))
    second = source / "model-00002-of-00003.safetensors"
    moved = second.rename(tmp_path / "moved")
    refuses(source, tmp_path / "out", "names model-00002-of-00003.safetensors, which is missing")
    shutil.copy(source / "model-00001-of-00003.safetensors", second)
    refuses(source, tmp_path / "out", "is in model-00001-of-00003.safetensors and in model-00002")
    save_file({}, second)
    refuses(source, tmp_path / "out", "and it is not there")
    moved.replace(second)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refuses(source, tmp_path / "out", "only files in the same directory")
    (source / "model.safetensors.index.json").write_text("{}")
    refuses(source, tmp_path / "out", "not a safetensors index")
    for file in source.glob("model*"):
        file.unlink()
    refuses(source, tmp_path / "out", "holds no weights")
    (source / "pytorch_model.bin").write_bytes(b"")
    refuses(source, tmp_path / "out", "pickle.*safetensors")
    refuses(tmp_path / "nowhere", tmp_path / "out", "neither a directory")


def test_outputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_directory(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("kept")
    refuses(source, tmp_path / "full", "exists already")
    assert (tmp_path / "full" / "something").read_text() == "kept"
    refuses(source, tmp_path / "out", "int8.*float32, float16, bfloat16", dtype="int8")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuses(source, tmp_path / "out", "could not be written.*still to be written and 1,000 are free.*Nothing was left")


def test_values_beyond_float16(tmp_path: Path) -> None:
    source = rewrite(hf_directory(tmp_path / "hf"), lambda t: t[Q].__setitem__((0, 0), 1e6))
    with pytest.raises(UserError, match="q_proj.*beyond the range of float16.*bfloat16"):
        convert(source, tmp_path / "out", dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = hf_directory(tmp_path / "hf")
    assert main([str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert "converted" in said.out and "converting: 100%" in said.err
    assert main([str(source), str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "exists already" in said.err


def test_headers_are_read_without_the_data(tmp_path: Path) -> None:
    tensors = read_headers(shard(hf_directory(tmp_path / "hf")))
    assert tensors[Q].shape == (32, 24) and tensors[Q].dtype == "F32" and tensors[Q].nbytes == 32 * 24 * 4
    np.testing.assert_array_equal(tensors[Q].read(), load_file(tensors[Q].file)[Q])
