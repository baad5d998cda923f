"""Objects at a URL: here of the disk, by the same code as those of a bucket."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxsteer.errors import UserError
from jaxsteer.files.stores import Bucket, is_url


def test_what_is_a_url() -> None:
    assert is_url("gs://bucket/a") and is_url("s3://bucket/a")
    assert not is_url("organism:llama") and not is_url("/a/b") and not is_url("owner/name@main")


def test_a_page_of_the_web_is_no_store_and_is_not_asked() -> None:
    with pytest.raises(UserError, match="no place of models and results: give a directory"):
        Bucket("http://127.0.0.1:1/x")


def test_objects_are_written_read_listed_and_deleted(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}/new/place/")
    assert list(bucket.names()) == [] and bucket.read("a") is None
    bucket.check_writable()
    for name in ("a", "folder/b", "folder/deep/c", "folder2"):
        bucket.write(name, name.encode())
    assert sorted(bucket.names()) == ["a", "folder/b", "folder/deep/c", "folder2"]
    assert sorted(bucket.names(but="folder")) == ["a", "folder2"]
    assert bucket.read("folder/deep/c") == b"folder/deep/c"
    bucket.write("a", b"other")
    assert (tmp_path / "new" / "place" / "a").read_bytes() == b"other" == bucket.read("a")
    bucket.write("a", None)
    assert bucket.read("a") is None


def test_what_consoles_put_for_a_folder_is_no_object(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}")
    listed = [b"", b"folder/", b"folder/a"]
    bucket._store = SimpleNamespace(list=lambda _: SimpleNamespace(result=lambda timeout: listed))
    assert list(bucket.names()) == ["folder/a"]


def test_a_store_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    def late(timeout: float) -> None:
        raise TimeoutError

    bucket = Bucket(f"file://{tmp_path}")
    bucket._store = SimpleNamespace(write=lambda *_: SimpleNamespace(result=late))
    with pytest.raises(UserError, match=r"cannot be written \(no answer in 0 s\). Check the address"):
        bucket.write("a", b"", patience_s=0.1)
