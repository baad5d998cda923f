"""Files are written whole or not at all."""

import os

import pytest

from jaxsteer.files import write_bytes, write_text


def test_files_appear_with_their_contents(tmp_path):
    write_text(tmp_path / "a.txt", "é\n")
    write_bytes(tmp_path / "a.bin", b"\x00\x01")
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode() and (tmp_path / "a.bin").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.txt"]
    assert os.stat(tmp_path / "a.txt").st_mode & 0o777 == 0o644


@pytest.mark.parametrize("fails", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(f"os.{fails}", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
