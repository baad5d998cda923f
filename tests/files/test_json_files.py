"""One reader of JSON and text: right lines, and one error for everything that a file can be instead."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsteer.errors import FileError, UserError
from jaxsteer.files import json_files, json_records, read_json, read_json_lines, read_log, read_text
from jaxsteer.files.json_files import parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)  # fmt: skip


@settings(deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_what_json_writes_is_read(value: object, ascii_only: bool, indent: int | None) -> None:
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
        text.encode()
    except UnicodeEncodeError:
        return
    assert parse_json(text, "x") == value


@settings(deadline=None)
@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_anything_else_is_one_error(text: str) -> None:
    try:
        parse_json(text, "x")
    except UserError as error:
        assert str(error).startswith("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not JSON: it is empty"),
        ('{\n"a": 1\n"b": 2}', r"line 3: not JSON: Expecting ',' delimiter, got '\"b\": 2}' at column 1"),
        ('{"a": [1,', "it ends too early"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1e999}', "the number 1e999 is out of range"),
        ('{"a": ' + "9" * 400 + "}", "the number 99999999999999999999… is out of range"),
        ('{"a": ' + "9" * 5000 + "}", "is out of range"),
        ('{"a": "\\ud800"}', r"half a character \(\\ud800\)"),
        ('{"\\udfff": 1}', "half a character"),
        ('{"a":\n' + "[" * 100_000, "line 2: values are nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[1]", "holds a list where a JSON object was expected"),
        ("null", "holds null where"),
    ],
)  # fmt: skip
def test_files_that_are_no_json_object(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_looks_excluded_and_is_not() -> None:
    deep = "[" * 64 + "]" * 64
    assert json.dumps(parse_json(deep, "x")) == deep
    assert parse_json(json.dumps("[" * 100 + '\\"' + "{" * 100), "x") == "[" * 100 + '\\"' + "{" * 100
    assert parse_json('"\\ud83d\\ude00"', "x") == "😀"
    assert parse_json(json.dumps({"a": "1" * 5000, "b": "1e999", "c": 10**299}), "x")["c"] == 10**299
    assert parse_json("[1e-999, 1.5e300]", "x") == [0.0, 1.5e300]
    assert parse_json("[NaN, -Infinity]", "x", nan=True)[1] == float("-inf")


def test_lines_are_counted_as_in_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\u0085z"}\r\n\n  \n[1]\n'.encode())
    assert list(read_json_lines(path)) == [(1, {"a": "x\u2028y\u0085z"}), (4, [1])]
    path.write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(UserError, match="line 3: not JSON: Expecting value.* at column 7"):
        list(read_json_lines(path))
    path.write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    with pytest.raises(UserError, match="line 2: the key 'a'"):
        list(read_json_lines(path))


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("", []),
        ("\n\n", []),
        ("[]", []),
        ("\n [ ] \n", []),
        ('\n[\n{"a": 1}, {"a": "\u2028]"},\n\n{"a": 3}]\n', [(3, {"a": 1}), (3, {"a": "\u2028]"}), (5, {"a": 3})]),
        ('{"a": 1}', [(1, {"a": 1})]),
        ('\n{"a": 1}\n\n{"a": 2}', [(2, {"a": 1}), (4, {"a": 2})]),
        ('\n{\n"a": 1\n}\n', [(2, {"a": 1})]),
        ('\n[1]\n\n["a"]\n', [(2, [1]), (4, ["a"])]),
        ('{"a": [1,\n2]}', [(1, {"a": [1, 2]})]),
    ],
)
def test_records_in_any_of_three_forms(text: str, records: object) -> None:
    assert list(json_records(text, "x")) == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1} {"a": 2}]', "line 1: not JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n]', "line 2: not JSON: Expecting value"),
        ('[\n{"a": 1},\n{"a": }]', "line 3: not JSON: Expecting value"),
        ('[{"a": 1}', "line 1: not JSON: it ends too early"),
        ('[{"a": 1},\n1]\n{}', "line 3: not JSON: Extra data"),
        ('[1,\n{"a": 1, "a": 2}]', "line 2: the key 'a'"),
        ("[1,\n" + "9" * 5000 + "]", "line 2: the number 9"),
        ("[" * 9999, "nested more than 64"),
        ('{"a": 1}\n\n{"a": }', "line 3: not JSON"),
        ('{\n"a": 1\n"b": 2}', "line 3: not JSON"),
        ('{"a": \n{"a": 1}', "line 1: not JSON: it ends too early"),
    ],
)  # fmt: skip
def test_faults_of_records_have_their_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(json_records(text, "x"))


def test_what_a_killed_process_leaves(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = '{"a": "é"}\n{"a": NaN}\n'.encode()
    path.write_bytes(whole)
    assert [len(read_log(path)[0]), read_log(path)[1]] == [2, False]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        rows, cut = read_log(path)
        assert len(rows) == (size >= 11) + (size >= 22) and cut == (size not in (0, 11, 12, 22)), size
    for rest in (b'[1]\n{"a": 2}\n', b"[]\n", b"[]"):
        path.write_bytes(b'{"a": 1}\n' + rest)
        with pytest.raises(UserError, match="line 2: an object was expected, found a list"):
            read_log(path)


def test_text_is_utf_8_with_or_without_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\nb\r".encode())
    assert read_text(path) == "é\nb\n"
    path.write_bytes(b"a\nb\n\xe9\n")
    with pytest.raises(UserError, match="line 3: the text is not UTF-8"):
        read_text(path)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_text("ab", encoding=encoding)
        with pytest.raises(UserError, match="looks like UTF-16"):
            read_text(path)
    monkeypatch.setattr(json_files, "MAX_BYTES", 2)
    with pytest.raises(UserError, match="larger than"):
        read_text(path)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="a pipe or a device"):
            read_text(special)


@pytest.mark.parametrize("name", ["missing", "folder", "loop", "secret", "n" * 300, "a\0b", "missing/below"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "secret").chmod(0)
    if name == "secret" and os.access(tmp_path / name, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match=name.replace("\0", ".*")[:9]):
        read_json(tmp_path / name)


def test_errors_of_the_system_keep_their_number(tmp_path: Path) -> None:
    with pytest.raises(FileError) as error:
        read_json(tmp_path / "missing")
    assert isinstance(error.value, OSError) and error.value.errno == 2 and error.value.strerror
