"""Names as users write them: paths that can be asked anything, or one error."""

from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.files.paths import named_file, user_path


def test_homes_and_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    assert user_path("~/a") == tmp_path / "a" and user_path(str(tmp_path)) == tmp_path
    for name in ("missing", "loop", "file/below"):
        assert not user_path(tmp_path / name).exists()


def test_a_text_or_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert named_file(str(tmp_path / "a")) == tmp_path / "a"
    for text in ("a b", "n" * 300, "~nobody-of-this-name", "a\0b", str(tmp_path)):
        assert named_file(text) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("~nobody-of-this-name/a", "home of a user who is not known"),
        ("n" * 300, "nnn.*… cannot be read: File name too long"),
        ("/".join(["n" * 200] * 40), "too long"),
        ("a\0b", "not the name of a file"),
        ("\ud800", "not the name of a file"),
    ],
)
def test_names_that_no_file_has(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        user_path(name)
