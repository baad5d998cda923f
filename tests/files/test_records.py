"""Objects that are JSON files: every class of the package survives the way there and back, and damage is named."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxsteer.evals
import jaxsteer.study
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record

for package in (jaxsteer.evals, jaxsteer.study):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
RECORDS = sorted(Record.__subclasses__(), key=lambda cls: cls.__name__)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    inner = get_args(hint)
    if hint is Any:
        return st.none() | st.booleans() | st.text(max_size=3) | FLOATS
    if hint is float:
        return FLOATS
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return st.dictionaries(st.text(max_size=3), values(inner[1]), max_size=2)
    if get_origin(hint) is tuple:
        if inner[1:] == (...,):
            return st.lists(values(inner[0]), max_size=2).map(tuple)
        return st.tuples(*map(values, inner))
    if inner and isinstance(inner[0], type | type(Record | None)) | (type(None) in inner):
        return st.one_of(*map(values, inner))
    if isinstance(hint, type) and issubclass(hint, Record):
        return records(hint)
    return st.from_type(hint)


def records(cls: type) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: values(hint) for name, hint in get_type_hints(cls).items()})


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_every_record_survives_json(cls: type):
    @given(records(cls))
    def check(one: Any) -> None:
        text = json.dumps(one.to_json())
        assert cls.from_json(json.loads(text)) == one
        assert json.dumps(cls.from_json(json.loads(text)).to_json()) == text

    check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Record):
    share: float
    pair: tuple[float, float] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Record):
    name: str
    number: int | None
    parts: tuple[Inner, ...] = ()
    told: bool = False
    note: str | None = None


def test_what_is_not_there_is_not_written():
    assert Outer(name="", number=None).to_json() == {"name": "", "number": None, "told": False}
    assert Outer.from_json({"name": "a", "later": 1}) == Outer(name="a", number=None)
    part = Outer(name="a", number=1, parts=(Inner(share=0.5),)).to_json()["parts"]
    assert part == [{"share": 0.5, "pair": [0.0, 1.0]}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"number": 1}, "file.json.name is missing"),
        ({"name": 3}, "file.json.name is 3, expected a text"),
        ({"name": "a", "number": True}, "number is True, expected a whole number"),
        ({"name": "a", "told": 1}, "told is 1, expected true or false"),
        ({"name": "a", "parts": {}}, "parts is an object"),
        ({"name": "a", "parts": [{"share": 1}, {"share": "\x1b[31m"}]}, r"parts\[1\].share is '\\x1b\[31m', expected"),
        ({"name": "a", "parts": [{"share": 1, "pair": [1]}]}, r"parts\[0\].pair is a list"),
        ({"name": "a", "parts": [7]}, r"parts\[0\] is a number, expected an object"),
        ([], "file.json is a list, expected an object"),
    ],
)
def test_damage_is_named(record: Any, message: str):
    with pytest.raises(UserError, match=message):
        Outer.from_json(record, "file.json")
