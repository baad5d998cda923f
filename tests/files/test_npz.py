"""NumPy's files: read as NumPy reads them, and never larger in memory than what they hold."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.files.npz import read_npy, read_npz

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "c": np.asarray(7, np.int64),
    "d": np.empty((0, 5), np.float16),
    "e": np.asarray([True, False]),
}


def npy(header: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + data


def archive(path: Path, entries: dict[str, bytes], **options: object) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:  # type: ignore[arg-type]
        for name, data in entries.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes(tmp_path: Path, save: object) -> None:
    save(tmp_path / "a.npz", **ARRAYS)  # type: ignore[operator]
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), array)


def test_a_small_file_does_not_take_much_memory(tmp_path: Path) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1048576, 1024), }"
    bomb = archive(tmp_path / "bomb.npz", {"W.npy": npy(header, bytes(1 << 30))}, compression=zipfile.ZIP_DEFLATED)
    lies = archive(tmp_path / "lies.npz", {"W.npy": npy(header, bytes(16))})
    tracemalloc.start()
    for path, says in ((bomb, "16 times larger than the file"), (lies, "4294967296 bytes, and 16 follow")):
        with pytest.raises(UserError, match=f"{path.name} .*{says}"):
            read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x", "which are no numbers"),
        ("{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }", bytes(16), "which are no numbers"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", bytes(4), "which are no numbers"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (35184372088832, 35184372088832), }", b"", "0 follow"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", bytes(4), "follow"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(4), "8 bytes, and 4 follow"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", bytes(8), "4 bytes, and 8 follow"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 1), }", bytes(4), "the shape .True, 1"),
        ("{'descr': '<f4', 'shape': (1,), }", bytes(4), ""),
        ("__import__('os').system('true')", b"", ""),
        ("", b"", ""),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: str, data: bytes, says: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy(header, data))
    with pytest.raises(UserError, match="no readable .npy file of numbers: .*" + says):
        read_npy(tmp_path / "a.npy")
    with pytest.raises(UserError, match="no readable .npz file .*" + says):
        read_npz(archive(tmp_path / "a.npz", {"a.npy": npy(header, data)}))


def test_archives_that_no_numpy_writes(tmp_path: Path) -> None:
    data = io.BytesIO()
    np.save(data, np.arange(3))
    whole = archive(tmp_path / "a.npz", {"a.npy": data.getvalue()}).read_bytes()
    flags, method = whole.rindex(b"PK\x01\x02") + 8, whole.rindex(b"PK\x01\x02") + 10
    for at, value in ((flags, 1), (method, 99)):  # encrypted; an unknown method
        changed = bytearray(whole)
        changed[at] = changed[at - (whole.rindex(b"PK\x01\x02") + 2)] = value
        (tmp_path / "b.npz").write_bytes(changed)
        with pytest.raises(UserError, match="b.npz is no readable"):
            read_npz(tmp_path / "b.npz")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("a.npy", data.getvalue())
    with pytest.raises(UserError, match="'a' occurs twice"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(UserError, match="missing.npz cannot be read: it does not exist"):
        read_npz(tmp_path / "missing.npz")


def test_texts_where_they_are_expected(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", notes=np.asarray("text"))
    assert str(read_npz(tmp_path / "a.npz", texts=True)["notes"]) == "text"
    with pytest.raises(UserError, match="which are no numbers"):
        read_npz(tmp_path / "a.npz")
