"""Files are written whole or not at all, and what stands in the way is named."""

import errno
import os
from pathlib import Path

import pytest

from jaxsteer.errors import FileError, UserError
from jaxsteer.files import append_text, make_directory, write_bytes, write_text


def test_files_appear_with_their_contents(tmp_path):
    write_text(tmp_path / "a.txt", "é\n")
    write_bytes(tmp_path / "a.bin", b"\x00\x01")
    append_text(tmp_path / "a.txt", "b\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\nb\n".encode() and (tmp_path / "a.bin").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.txt"]
    assert os.stat(tmp_path / "a.txt").st_mode & 0o777 == 0o644
    write_text(tmp_path / ("é" * 127), "the longest name that a file can have")


@pytest.mark.parametrize("fails", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"os.{fails}", fail)
    with pytest.raises(FileError, match="a.txt cannot be written: No space left on device. Free some space") as error:
        write_text(path, "new")
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["n" * 300, "folder", "file/below", "loop/below", "missing/below"])
@pytest.mark.parametrize("write", [write_text, append_text])
def test_what_stands_in_the_way_is_named(tmp_path, name, write):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match=f"{name[:9]}.* cannot be written"):
        write(tmp_path / name, "text")
    assert sorted(tmp_path.iterdir()) == before


def test_directories_and_text_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert make_directory(tmp_path / "a" / "b").is_dir()
    for name in ("file", "file/below", "n" * 300, f"c/d/{'n' * 300}"):
        with pytest.raises(FileError, match="cannot be written"):
            make_directory(tmp_path / name)
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="surrogates"):
        write_text(tmp_path / "a.txt", "\ud800")
