"""Files of torch without torch: layouts by hand, every attack that a pickle knows, and torch itself as the oracle."""

import os
import struct
import sys
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from jaxsteer.files import read_torch
from tests.helpers.torchzip import (
    GLOBAL,
    View,
    contiguous,
    opcodes,
    parameter,
    reference,
    string,
    write,
    write_raw,
)

NUMBERS = np.arange(24, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_],
)
def test_dtypes(path, dtype):
    wanted = np.arange(-3, 3).reshape(2, 3).astype(dtype)
    found = read_torch(write(path, wanted))
    assert found.dtype == wanted.dtype and found.shape == (2, 3)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


def test_views_honour_offset_and_strides(path):
    views = {
        "row": View(NUMBERS, (6,), (1,), 12),
        "transposed": View(NUMBERS, (6, 4), (1, 6)),
        "every other": View(NUMBERS, (4, 3), (6, 2), 1),
        "expanded": View(NUMBERS, (5, 3), (0, 1), 21),
        "number": View(NUMBERS, (), (), 7),
        "empty": View(NUMBERS, (0, 6), (6, 1)),
    }
    found = read_torch(write(path, views))
    grid = NUMBERS.reshape(4, 6)
    np.testing.assert_array_equal(found["row"], grid[2])
    np.testing.assert_array_equal(found["transposed"], grid.T)
    np.testing.assert_array_equal(found["every other"], grid[:, 1::2])
    np.testing.assert_array_equal(found["expanded"], np.broadcast_to(NUMBERS[21:], (5, 3)))
    assert found["number"] == 7 and found["number"].shape == ()
    assert found["empty"].shape == (0, 6)
    assert zipfile.ZipFile(path).namelist().count("archive/data/0") == 1  # one storage for all


def test_containers_numbers_and_parameters(path):
    value = {
        "vector": NUMBERS,
        "weights": OrderedDict(a=parameter(NUMBERS), b=NUMBERS.astype(np.float64)),
        "deep": {"list": [1, 2.5, None, True, "é", (1, (2, NUMBERS))], 3: -(2**70), (1, "k"): []},
    }
    found = read_torch(write(path, value, stem="any name"))
    assert type(found["weights"]) is dict and list(found["weights"]) == ["a", "b"]
    np.testing.assert_array_equal(found["weights"]["a"], NUMBERS)
    assert found["deep"]["list"][:5] == [1, 2.5, None, True, "é"] and found["deep"][3] == -(2**70)
    np.testing.assert_array_equal(found["deep"]["list"][5][1][1], NUMBERS)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, ml_dtypes.bfloat16, np.bool_])
def test_big_endian_files(path, dtype):
    wanted = np.arange(6).astype(dtype)
    raw = wanted.view(f"u{wanted.itemsize}").byteswap()
    assert sys.byteorder == "little"
    write_raw(path, b"\x80\x02" + opcodes(wanted, {}) + b".", {"0": raw.tobytes()}, byteorder="big")
    np.testing.assert_array_equal(read_torch(path), wanted)
    write_raw(path, b"\x80\x02" + opcodes(wanted, {}) + b".", {"0": wanted.tobytes()}, byteorder=None)
    np.testing.assert_array_equal(read_torch(path), wanted)
    write_raw(path, b"\x80\x02" + opcodes(wanted, {}) + b".", {"0": wanted.tobytes()}, byteorder="middle")
    refused(path, "byte order")


def refused(path, *words):
    """One error that names the file and says what to do."""
    with pytest.raises(UserError) as caught:
        read_torch(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 700
    assert all(word in text for word in words), text
    return text


CALL = "open({!r}, 'w').close()"


def attacks(sentinel: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file ``sentinel``, and a word of the error."""
    shell, code = string(f"touch {sentinel}"), string(CALL.format(sentinel))
    called = b"\x85R"  # TUPLE1 REDUCE
    rebuild, float_storage = GLOBAL("torch._utils", "_rebuild_tensor_v2"), GLOBAL("torch", "FloatStorage")
    tensor = opcodes(View(NUMBERS, (2,), (1,)), {})
    return {
        "os.system": (GLOBAL("os", "system") + shell + called, "os.system"),
        "posix.system": (GLOBAL("posix", "system") + shell + called, "posix.system"),
        "eval": (GLOBAL("builtins", "eval") + code + called, "builtins.eval"),
        "eval of Python 2": (GLOBAL("__builtin__", "eval") + code + called, "__builtin__.eval"),
        "exec": (GLOBAL("builtins", "exec") + code + called, "builtins.exec"),
        "getattr chain": (
            GLOBAL("builtins", "getattr") + GLOBAL("os", "path") + string("os") + b"\x86R" + shell + called,
            "builtins.getattr",
        ),
        "import": (GLOBAL("builtins", "__import__") + string("antigravity") + called, "__import__"),
        "subprocess": (
            GLOBAL("subprocess", "call") + b"](" + string("touch") + string(sentinel) + b"e" + called,
            "subp",
        ),
        "stack global": (string("os") + string("system") + b"\x93" + shell + called, "STACK_GLOBAL"),
        "inst": (b"(" + shell + b"ios\nsystem\n", "INST 'os system'"),
        "obj": (b"(" + GLOBAL("os", "system") + shell + b"o", "os.system"),
        "new object": (GLOBAL("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
        "extension registry": (b"\x82\x01", "EXT1"),
        "dotted name": (GLOBAL("collections", "OrderedDict.__class__") + b")R", "OrderedDict.__class__"),
        "dotted to eval": (
            GLOBAL("collections", "OrderedDict.__init__.__globals__") + b")R",
            "OrderedDict.__init__.__globals__",
        ),
        "dotted module": (GLOBAL("torch._utils", "_rebuild_tensor_v2.__globals__") + b")R", "__globals__"),
        "torch.load itself": (GLOBAL("torch", "load") + string("x") + called, "torch.load"),
        "numpy": (GLOBAL("numpy.core.multiarray", "_reconstruct") + b")R", "numpy.core.multiarray._reconstruct"),
        "a module": (GLOBAL("torch.nn.modules.linear", "Linear") + b")R", "torch.nn.modules.linear.Linear"),
        "quantized tensor": (GLOBAL("torch._utils", "_rebuild_qtensor") + b")R", "_rebuild_qtensor"),
        "a set": (GLOBAL("builtins", "set") + b"])" + called, "builtins.set"),
        "text persistent id": (b"Pos.system\n", "PERSID"),
        "persistent id of a string": (string("storage") + b"Q", "not one to a storage"),
        "persistent id with another class": (
            b"(" + string("storage") + GLOBAL("os", "system") + string("0") + string("cpu") + b"K\x01tQ",
            "os.system",
        ),
        "persistent id with a container": (
            b"(" + string("storage") + GLOBAL("collections", "OrderedDict") + string("0") + string("cpu") + b"K\x01tQ",
            "kind of a storage",
        ),
        "persistent id with a negative count": (
            b"("
            + string("storage")
            + GLOBAL("torch", "FloatStorage")
            + string("0")
            + string("cpu")
            + b"J\xff\xff\xff\xfftQ",
            "not one to a storage",
        ),
        "persistent id out of the folder": (
            reference(View(NUMBERS, (), (), key="../../x"), "0"),
            "missing",
        ),
        "a storage is called": (float_storage + b")R", "calls torch.FloatStorage"),
        "attributes of a global": (
            GLOBAL("torch._utils", "_rebuild_tensor_v2")
            + b"}"
            + string("call")
            + GLOBAL("torch", "FloatStorage")
            + b"sb",
            "damaged",
        ),
        "slots of a global": (
            rebuild + b"N}" + string("call") + string("x") + b"s\x86b",
            "damaged",
        ),
        "state of a tensor": (tensor + b"(K\x01K\x02K\x03tb", "damaged"),
        "item of a tensor": (tensor + b"K\x00K\x01s", "damaged"),
        "a global as a value": (GLOBAL("collections", "OrderedDict"), "as a value"),
        "a storage as a value": (reference(View(NUMBERS, (), ()), "0"), "as a value"),
        "parameter of a string": (
            GLOBAL("torch._utils", "_rebuild_parameter") + b"(" + string("x") + b"\x88}tR",
            "not a tensor",
        ),
        "tensor of a string": (
            rebuild + b"(" + string("x") + b"K\x00))\x89}tR",
            "not a storage",
        ),
        "too few arguments": (rebuild + b")R", "damaged"),
        "giant memo": (b"Nr" + struct.pack("<I", 2**32 - 1), "numbers an object"),
        "empty stack": (b"0", "POP"),
        "endless string": (b"X" + struct.pack("<I", 2**31) + b"x", "damaged"),
        "no end": (b"N" * 10, "damaged"),
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_nothing_in_a_pickle_is_executed(tmp_path, path, name):
    sentinel = tmp_path / "executed"
    code, word = attacks(str(sentinel))[name]
    end = b"" if name in ("no end", "endless string") else b"."
    write_raw(path, b"\x80\x02" + code + end, {"0": NUMBERS.tobytes()})
    text = refused(path, word)
    assert "weights_only=True" in text and not sentinel.exists()
    # Deep inside of something harmless it is no better.
    write_raw(path, b"\x80\x02}(" + string("a") + b"](" + code + b"eu" + end, {"0": NUMBERS.tobytes()})
    refused(path)
    assert not sentinel.exists() and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("name", sorted(attacks("x").keys() - {"giant memo", "no end"}))
def test_the_unpickler_alone_executes_nothing_either(tmp_path, path, name, monkeypatch):
    """Without the check of the opcodes before."""
    monkeypatch.setattr("jaxsteer.files.torchfile._Archive.check_opcodes", lambda self, data: None)
    sentinel = tmp_path / "executed"
    write_raw(path, b"\x80\x02" + attacks(str(sentinel))[name][0] + b".", {"0": NUMBERS.tobytes()})
    refused(path)
    assert not sentinel.exists()


def test_the_attacks_would_have_worked(tmp_path):
    """The sentinel is no empty promise: the standard unpickler makes it."""
    import pickle

    sentinel = tmp_path / "executed"
    for name in ("os.system", "posix.system", "eval", "exec", "stack global", "inst", "obj", "subprocess"):
        pickle.loads(b"\x80\x02" + attacks(str(sentinel))[name][0] + b".")
        assert sentinel.exists(), name
        sentinel.unlink()


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (View(NUMBERS, (25,), (1,)), "ends at element 24 of a storage of 24"),
        (View(NUMBERS, (4,), (1,), 21), "ends at element 24"),
        (View(NUMBERS, (2, 2), (23, 1)), "ends at element 24"),
        (View(NUMBERS, (2**62, 2**62), (1, 1)), "ends at element"),
        (View(NUMBERS, (2,), (2**63,)), "ends at element"),
        (View(NUMBERS, (2,), (-1,), 5), "counts >= 0"),
        (View(NUMBERS, (2,), (1,), -1), "counts >= 0"),
        (View(NUMBERS, (-2,), (1,)), "counts >= 0"),
        (View(NUMBERS, (True,), (1,)), "counts >= 0"),
        (View(NUMBERS, (2, 2), (1,)), "strides (1,)"),
        (View(NUMBERS, (1,) * 40, (1,) * 40), "of size"),
        (View(NUMBERS, (2**40,), (0,)), "many times larger"),
        (View(NUMBERS, (0, 2**62, 2**62), (1, 1, 1)), "damaged"),
        (View(NUMBERS, (2,), (1,), numel=25), "too few for 25 values"),
        (View(NUMBERS, (2,), (1,), kind="DoubleStorage"), "too few for 24 values"),
        (View(NUMBERS, (2,), (1,), kind="ComplexFloatStorage"), "torch.ComplexFloatStorage"),
        (View(NUMBERS, (2,), (1,), key="9"), "'data/9' is missing"),
    ],
)
def test_tensors_beyond_their_storage_are_refused(path, view, word):
    refused(write(path, view), word)


def test_expanded_giants_are_counted_together(path):
    view = View(NUMBERS, (2**24,), (0,))
    assert read_torch(write(path, [view])).__len__() == 1
    refused(write(path, [view] * 8), "many times larger")


def test_shared_containers_do_not_grow_without_end(path):
    def nested(times):
        twice = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))
        return write_raw(path, b"\x80\x02](K\x01e" + twice + b".")

    assert read_torch(nested(3)) == ((([1], [1]), ([1], [1])), (([1], [1]), ([1], [1])))
    read_torch(nested(20))
    refused(nested(40), "more than 10000000 values")
    refused(nested(70), "nest deeper")
    write_raw(path, b"\x80\x02]q\x00(h\x00e.")  # a list in itself
    refused(path, "nest deeper")


def test_zips_that_torch_does_not_write_are_refused(tmp_path, path):
    code = b"\x80\x02N."
    write_raw(path, code, {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed")
    for name in ("../../evil", "/etc/evil", "archive/../../evil", "archive\\..\\evil"):
        write_raw(path, code, more={name: b"x"})
        refused(path, "outside of its folder")
        assert not list(tmp_path.parent.rglob("evil"))
    write_raw(path, code, more={"other/data.pkl": code})
    refused(path, "2 entries */data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", b"x")
    refused(path, "0 entries */data.pkl")
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", code)
        archive.writestr("a/data.pkl", code)
    refused(path, "twice")


def test_a_bomb_of_overlapping_entries_is_refused(path):
    """Many entries of the directory point at one body: each is no larger than the file, all of them are."""
    write_raw(path, b"\x80\x02N.", {"0": bytes(100_000)})
    raw = path.read_bytes()
    start = raw.index(b"PK\x01\x02")
    directory, end = raw[start : raw.index(b"PK\x05\x06")], raw[raw.index(b"PK\x05\x06") :]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    assert b"archive/data/0" in entry
    copies = b"".join(entry.replace(b"archive/data/0", f"archive/data/{i}".encode()) for i in range(1, 10))
    total = struct.unpack_from("<H", end, 10)[0] + 9
    tail = end[:8] + struct.pack("<HHII", total, total, len(directory) + len(copies), start) + end[20:]
    path.write_bytes(raw[:start] + directory + copies + tail)
    assert len(zipfile.ZipFile(path).infolist()) == total
    refused(path, "overlap")


def test_other_files_are_refused_with_advice(tmp_path, path):
    path.write_bytes(bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + b"rest")
    refused(path, "before 1.6", "weights_only=True")
    path.write_bytes(b"GGUF....")
    refused(path, "not a file of torch")
    path.write_bytes(b"")
    refused(path, "not a file of torch")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(path, "Git LFS", "git lfs pull")
    path.unlink()
    refused(path, "there is no file")
    refused(tmp_path, "cannot be read")
    write_raw(path, b"\x80\x04N.")
    refused(path, "protocol 4")
    write_raw(path, b"\x80\x02N.N.")
    refused(path, "goes on after its end")


def test_errors_stay_readable_whatever_the_file_says(path):
    write_raw(path, b"\x80\x02" + GLOBAL("os", "\x1b[2J" + "x" * 10**5) + b".")
    text = refused(path, "os.?[2Jxxx")
    assert text.isprintable()
    write_raw(path, b"\x80\x02N.", more={"../" + "y" * 10**4: b""})
    refused(path, "../yyy")
    write(path, View(NUMBERS, (10**4000,) * 30, (0,) * 30))
    refused(path, "many times larger")


def test_flipped_bytes_are_noticed(path):
    write(path, NUMBERS)
    raw = path.read_bytes()
    at = raw.index(NUMBERS.tobytes()) + 5
    path.write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    refused(path, "CRC")
    path.write_bytes(raw[:-30])
    refused(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    inside=st.booleans(),
)
def test_damage_gives_one_error_or_harmless_values(tmp_path, changes, inside):
    """Pickles and directories of random damage: a UserError, or containers of arrays and numbers."""
    path = tmp_path / "x.pt"
    write(path, {"a": contiguous(NUMBERS.reshape(4, 6)), "b": OrderedDict(c=parameter(NUMBERS)), "d": [1, "x"]})
    if inside:  # with a right checksum, so that the pickle itself is reached
        with zipfile.ZipFile(path) as archive:
            code = bytearray(archive.read("archive/data.pkl"))
        for at, byte in changes:
            code[at % len(code)] = byte
        write_raw(path, bytes(code), {"0": NUMBERS.tobytes(), "1": NUMBERS.tobytes()})
    else:
        raw = bytearray(path.read_bytes())
        for at, byte in changes:
            raw[at % len(raw)] = byte
        path.write_bytes(bytes(raw))
    try:
        found = read_torch(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    only_plain(found)


def only_plain(value):
    assert value is None or type(value) in (dict, list, tuple, int, float, bool, str, np.ndarray), type(value)
    for inner in value.values() if type(value) is dict else value if type(value) in (list, tuple) else ():
        only_plain(inner)


@pytest.mark.parity
def test_files_of_torch_itself(path):
    import torch

    grid = torch.arange(24.0).reshape(4, 6)
    layer = torch.nn.Linear(6, 4)
    value = {
        "grid": grid,
        "row": grid[2],
        "transposed": grid.T,
        "stepped": grid[:, 1::2],
        "expanded": grid[:1].expand(3, 6),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(grid.clone()),
        "bool": grid > 5,
        "state": layer.state_dict(),
        "nested": [{"k": (1, 2.0, None, "s", grid.int())}],
        **{str(d): (grid - 3).to(d) for d in (torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.int8)},
    }
    torch.save(value, path)
    found = read_torch(path)
    assert list(found) == list(value) and list(found["state"]) == ["weight", "bias"]
    for name, tensor in value.items():
        if isinstance(tensor, torch.Tensor):
            wanted = tensor.detach()
            assert found[name].shape == tuple(wanted.shape)
            np.testing.assert_array_equal(found[name].astype(np.float64), wanted.double().numpy())
    assert found["torch.bfloat16"].dtype == ml_dtypes.bfloat16 and found["bool"].dtype == np.bool_
    np.testing.assert_array_equal(found["state"]["weight"], layer.weight.detach().numpy())
    np.testing.assert_array_equal(found["nested"][0]["k"][4], grid.int().numpy())


@pytest.mark.parity
@pytest.mark.parametrize("what", ["numpy", "module", "set", "protocol", "legacy", "size", "jit"])
def test_what_torch_can_save_and_we_do_not_read(path, what):
    import torch

    words = {
        "numpy": "numpy",
        "module": "torch.nn.modules.linear.Linear",
        "set": "builtin",
        "protocol": "protocol 4",
        "legacy": "before 1.6",
        "size": "torch.Size",
        "jit": "refused",
    }
    if what == "jit":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    else:
        values = {"numpy": np.arange(3), "module": torch.nn.Linear(2, 2), "set": {1, 2}, "size": torch.Size([2])}
        torch.save(
            values.get(what, torch.zeros(3)),
            path,
            pickle_protocol=4 if what == "protocol" else 2,
            _use_new_zipfile_serialization=what != "legacy",
        )
    refused(path, words[what])


@pytest.mark.parity
def test_our_hand_made_files_are_what_torch_reads(path):
    import torch

    write(path, {"a": View(NUMBERS, (6, 4), (1, 6)), "b": OrderedDict(c=parameter(NUMBERS))})
    found = torch.load(path, weights_only=True)
    np.testing.assert_array_equal(found["a"].numpy(), NUMBERS.reshape(4, 6).T)
    assert isinstance(found["b"]["c"], torch.nn.Parameter)
