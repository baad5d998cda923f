"""GGUF control vectors: bytes by the specification, round trips, other tools' habits, damage, and ``gguf`` itself."""

import json
import logging
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxsteer.errors import UserError
from jaxsteer.files.gguf import read_gguf, write_gguf
from jaxsteer.steer.gguf import read_control_vector, write_control_vector
from jaxsteer.steer.vectors import Vectors

D = 6
ROWS = {i: np.arange(D, dtype=np.float32) + 10 * i for i in range(4)}


def vectors(**changes):
    arrays = {f"blocks.{i}.hook_resid_post": row for i, row in ROWS.items()}
    return Vectors(**{"arrays": arrays, "sign": "towards x", "metadata": {"n": "3"}} | changes)


def text(s):
    return struct.pack("<Q", len(s.encode())) + s.encode()


def handmade(tensors, keys=(), *, alignment=32, version=3, architecture="controlvector"):
    """A file by the specification; ``keys`` holds (name, type, packed value)."""
    keys = [("general.architecture", 8, text(architecture)), *keys]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    data = b""
    for name, array in tensors.items():
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{array.ndim}QIQ", array.ndim, *array.shape[::-1], 0, len(data))
        data += array.astype("<f4").tobytes()
    return head + bytes(-len(head) % alignment) + data


def test_a_file_of_another_tool(tmp_path):
    """EasySteer's habits: direction.0, keys of many types, and another alignment."""
    path = tmp_path / "x.gguf"
    keys = [
        ("controlvector.model_hint", 8, text("llama")),
        ("controlvector.layer_count", 4, struct.pack("<I", 4)),
        ("controlvector.method", 8, text("diffmean")),
        ("controlvector.normalize", 7, b"\x01"),
        ("controlvector.token_pos", 5, struct.pack("<i", -1)),
        ("controlvector.scores", 9, struct.pack("<IQ2f", 6, 2, 0.5, 0.25)),
        ("general.alignment", 4, struct.pack("<I", 64)),
    ]
    path.write_bytes(handmade({f"direction.{i}": row for i, row in reversed(ROWS.items())}, keys, alignment=64))
    found = read_control_vector(path)
    assert found.sites == tuple(f"blocks.{i}.hook_resid_post" for i in range(4))  # index i: output of block i
    for i, row in ROWS.items():
        np.testing.assert_array_equal(found.arrays[f"blocks.{i}.hook_resid_post"], row)
    assert found.operation == "add" and found.source_format == "gguf" and "not stated" in found.sign
    assert json.loads(found.metadata["gguf_keys"])["controlvector.token_pos"] == -1
    assert json.loads(found.metadata["gguf_keys"])["controlvector.scores"] == [0.5, 0.25]


def test_export_and_back(tmp_path, caplog):
    site = "blocks.2.hook_resid_post"
    given = vectors(
        mean_resid_norm={site: 12.5}, model="m", fingerprint="f" * 64, read_position="last", source_format="caa"
    )
    with caplog.at_level(logging.WARNING):
        path = write_control_vector(given, tmp_path / "x.gguf", model_hint="qwen2")
    assert "blocks.0.hook_resid_post is left out" in caplog.text
    keys, tensors = read_gguf(path)
    assert list(tensors) == ["direction.1", "direction.2", "direction.3"]
    assert keys["general.architecture"] == "controlvector" and keys["controlvector.model_hint"] == "qwen2"
    assert keys["controlvector.layer_count"] == 3
    assert all(isinstance(v, str) for k, v in keys.items() if k.startswith("controlvector.jaxsteer."))
    back = read_control_vector(path)
    for name in back.sites:
        np.testing.assert_array_equal(back.arrays[name], given.arrays[name])
    assert (back.sign, back.model, back.fingerprint, back.read_position) == ("towards x", "m", "f" * 64, "last")
    assert back.mean_resid_norm == {site: 12.5} and back.metadata["n"] == "3"
    assert back.source_format == "gguf (from caa)"


def test_the_coefficient_is_multiplied_in(tmp_path):
    site = "blocks.2.hook_resid_post"
    path = tmp_path / "x.gguf"
    given = vectors(coefficient=-2.0).at(site)
    write_control_vector(given, path, model_hint="llama")
    np.testing.assert_array_equal(read_gguf(path)[1]["direction.2"], -2 * ROWS[2])
    given = vectors(coefficient=0.5, coefficient_units="mean_resid_norm", mean_resid_norm={site: 8.0}).at(site)
    write_control_vector(given, path, model_hint="llama")
    found = read_gguf(path)[1]["direction.2"]
    assert np.linalg.norm(found) == pytest.approx(4.0)
    np.testing.assert_allclose(found / 4, ROWS[2] / np.linalg.norm(ROWS[2]), rtol=1e-6)
    with pytest.raises(UserError, match="does not hold at blocks.1"):
        write_control_vector(vectors(coefficient_units="mean_resid_norm").at("layer_1"), path, model_hint="llama")


def test_numbers_beyond_float32_are_not_written(tmp_path):
    site = "blocks.2.hook_resid_post"
    for changes in (
        {"coefficient": 1e300},
        {"coefficient": 1e38, "coefficient_units": "mean_resid_norm", "mean_resid_norm": {site: 1e10}},
    ):
        with pytest.raises(UserError, match="times the vector at blocks.2.* is beyond the range of float32"):
            write_control_vector(vectors(**changes).at(site), tmp_path / "x.gguf", model_hint="llama")
    assert not list(tmp_path.iterdir())


def test_a_small_file_does_not_take_long(tmp_path):
    keys = [("a", 9, struct.pack("<IQ", 7, 60_000_000))]
    (tmp_path / "x.gguf").write_bytes(handmade({"direction.1": ROWS[1]}, keys) + bytes(60_000_000))
    with pytest.raises(UserError, match="it announces 60,000,"):
        read_gguf(tmp_path / "x.gguf")


def test_inputs_of_blocks_are_outputs_of_the_block_before(tmp_path, caplog):
    arrays = {"hook_embed": ROWS[0], "blocks.0.hook_resid_pre": ROWS[0], "blocks.3.hook_resid_pre": ROWS[3]}
    path = write_control_vector(vectors(arrays=arrays), tmp_path / "x.gguf", model_hint="llama")
    assert list(read_gguf(path)[1]) == ["direction.2"]
    assert "hook_embed is left out" in caplog.text and "blocks.0.hook_resid_pre is left out" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "ablate"}, "operation of these vectors is 'ablate'"),
        ({"arrays": {"blocks.1.hook_mlp_out": ROWS[1]}}, "not at blocks.1.hook_mlp_out"),
        ({"arrays": {"blocks.0.hook_resid_post": ROWS[0]}}, "no vector is left"),
        (
            {"arrays": {"blocks.1.hook_resid_post": ROWS[0], "blocks.2.hook_resid_pre": ROWS[1]}},
            "two vectors belong at the output of block 1",
        ),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write_control_vector(vectors(**changes), tmp_path / "x.gguf", model_hint="llama")
    assert not list(tmp_path.iterdir())


def fails(tmp_path, data, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_control_vector(path)
    assert str(path) in str(caught.value)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    good = handmade({"direction.1": ROWS[1]})
    for cut in range(len(good)):
        fails(tmp_path, good[:cut], "are left|ends at byte")
    fails(tmp_path, b"PK\x03\x04" + bytes(30), "does not begin with GGUF")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, version=1), "version 1")
    fails(tmp_path, good[:4] + struct.pack(">I", 3) + good[8:], "big-endian")
    fails(tmp_path, handmade({}, architecture="llama"), "architecture 'llama', expected 'controlvector'")
    fails(tmp_path, handmade({}), "widths")
    fails(tmp_path, handmade({"direction.1": ROWS[1], "direction.2": ROWS[1][:3]}), r"widths \[3, 6\]")
    fails(tmp_path, handmade({"direction.1": ROWS[1][None]}), r"shape \(1, 6\)")
    fails(tmp_path, handmade({"direction.01": ROWS[1]}), "direction.01")
    fails(tmp_path, handmade({"blk.0.weight": ROWS[1]}), "blk.0.weight")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 13, b"")]), "value type 13")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 7, b"\x00")] * 2), "'a' occurs twice")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 9, struct.pack("<IQ", 4, 2**62))]), "announces")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 9, struct.pack("<IQ", 4, 2**21))]), "are left")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 9, struct.pack("<IQ", 9, 1))]), "value type 9")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("general.alignment", 4, bytes(4))]), "alignment is 0")
    for bad in (1, 3, 12):
        shifted = handmade({"direction.1": ROWS[1]}, [("general.alignment", 4, struct.pack("<I", bad))], alignment=bad)
        fails(tmp_path, shifted, f"alignment is {bad}, .* multiple of 8")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 8, struct.pack("<Q", 2**63))]), "are left")
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [("a", 8, struct.pack("<Q", 1) + b"\xff")]), "not UTF-8")
    fails(tmp_path, handmade({"direction.1": np.float32([1, np.nan])}), "NaN")
    ours = [("controlvector.jaxsteer.mean_resid_norm", 8, text('{"7": 1}'))]
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, ours), "do not fit its vectors")
    with pytest.raises(UserError, match="cannot be read"):
        read_control_vector(tmp_path / "absent.gguf")


def test_lengths_and_offsets_of_tensors_are_checked(tmp_path):
    good = handmade({"direction.1": ROWS[1]})
    entry = good.index(b"direction.1") + 11

    def with_entry(dims, kind, offset):
        return good[:entry] + struct.pack("<IQIQ", 1, dims, kind, offset) + good[entry + 24 :]

    assert with_entry(D, 0, 0) == good
    fails(tmp_path, with_entry(2**61, 0, 0), "ends at byte")
    fails(tmp_path, with_entry(D, 0, 2**63), "ends at byte")
    fails(tmp_path, with_entry(D, 0, 32), "ends at byte|are left")
    fails(tmp_path, with_entry(D, 0, 4) + bytes(4), "offset of tensor 'direction.1', 4, is no multiple of 32")
    fails(tmp_path, with_entry(D, 1, 0), "ggml type 1, expected 0")
    fails(tmp_path, good[:entry] + struct.pack("<I", 2**31) + good[entry + 4 :], "dimensions")


@pytest.mark.parametrize("key", ["controlvector.mode", "glp.operation", "controlvector.glp.version"])
def test_vectors_that_are_not_to_be_added_are_refused(tmp_path, key):
    fails(tmp_path, handmade({"direction.1": ROWS[1]}, [(key, 8, text("project"))]), f"says {key} = 'project'")


WIDE = st.integers(1, 40)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    keys=st.dictionaries(st.text(max_size=12), st.text(max_size=40) | st.integers(0, 2**32 - 1), max_size=5),
)
def test_round_trip(tmp_path, data, keys):
    shapes = st.lists(WIDE, min_size=1, max_size=3).map(tuple)
    finite = st.floats(width=32, allow_nan=False)
    arrays = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=finite))
    tensors = data.draw(st.dictionaries(st.text(max_size=20), arrays, max_size=4))
    keys.pop("general.alignment", None)
    write_gguf(tmp_path / "x.gguf", keys, tensors)
    found_keys, found = read_gguf(tmp_path / "x.gguf")
    assert found_keys == keys and list(found) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_gives_one_error_or_vectors(tmp_path, changes):
    raw = bytearray(handmade({"direction.1": ROWS[1]}, [("controlvector.model_hint", 8, text("llama"))]))
    for at, byte in changes:
        raw[at % len(raw)] = byte
    (tmp_path / "x.gguf").write_bytes(raw)
    try:
        assert read_control_vector(tmp_path / "x.gguf").sites
    except UserError:
        pass


@pytest.mark.parity
def test_the_gguf_package_reads_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = write_control_vector(vectors(model="é"), tmp_path / "x.gguf", model_hint="llama")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    assert reader.get_field("controlvector.jaxsteer.model").contents() == "é"
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2", "direction.3"]
    for i, tensor in enumerate(reader.tensors, 1):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data_offset % 32 == 0
        np.testing.assert_array_equal(np.asarray(tensor.data), ROWS[i])


@pytest.mark.parity
def test_we_read_what_the_gguf_package_writes(tmp_path):
    """As repeng and llama.cpp's generator call it."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 3)
    for i in (1, 2, 3):
        writer.add_tensor(f"direction.{i}", ROWS[i])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_control_vector(tmp_path / "x.gguf")
    for i in (1, 2, 3):
        np.testing.assert_array_equal(found.arrays[f"blocks.{i}.hook_resid_post"], ROWS[i])
    assert json.loads(found.metadata["gguf_keys"]) == {
        "controlvector.model_hint": "mistral",
        "controlvector.layer_count": 3,
    }
