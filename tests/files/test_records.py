"""Objects that are JSON files: every class of the package survives the way there and back, and damage is named."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import random
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import jaxsteer.evals
import jaxsteer.study
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.study.results import SearchRun
from jaxsteer.study.sweep_result import SweepRow

for package in (jaxsteer.evals, jaxsteer.study):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def below(cls: type) -> set[type]:
    return {cls} | {one for sub in cls.__subclasses__() for one in below(sub)}


RESULTS = ("jaxsteer.evals", "jaxsteer.prompt_search", "jaxsteer.study", "jaxsteer.writers")
RECORDS = sorted(
    (cls for cls in below(Record) if dataclasses.is_dataclass(cls) and cls.__module__.startswith(RESULTS)),
    key=lambda cls: cls.__name__,
)
TEXTS = ("", "a", " naïve \u202e\n", '"{prompt}"')


def made(hint: Any, rng: random.Random, outer: tuple[Any, ...] = ()) -> Any:
    """A value of a field's type; no record within itself."""
    inner = get_args(hint)
    if hint == Interval:
        return tuple(sorted(made(inner[0], rng)))
    if hint in (CountFrom0, Share):
        return rng.randrange(9) if hint == CountFrom0 else rng.random()
    if hint is Any:
        return rng.choice([None, True, 3, 0.25, "x"])
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return {name: made(inner[1], rng, outer) for name in rng.sample(TEXTS, rng.randrange(3))}
    if get_origin(hint) is tuple and inner[1:] == (...,):
        return tuple(made(inner[0], rng, outer) for _ in range(0 if inner[0] in outer else rng.randrange(3)))
    if get_origin(hint) is tuple:
        return tuple(made(one, rng, outer) for one in inner)
    if get_origin(hint) is Literal:
        return rng.choice(inner)
    if inner:
        return made(rng.choice(inner), rng, outer)
    if hint is type(None):
        return None
    if issubclass(hint, Record):
        hints = get_type_hints(hint, include_extras=True)
        values = {field.name: made(hints[field.name], rng, (*outer, hint)) for field in dataclasses.fields(hint)}
        if hint is SearchRun:
            values["selected"] = rng.randrange(len(values["prompts"])) if values["prompts"] else None
        if issubclass(hint, SweepRow):
            values["n"] = (
                values["n"] or 0
            )  # without one it is a file of an older version, which is read as something else
        return hint(**values)
    return {float: rng.gauss(0, 1e3), int: rng.randrange(-9, 9), bool: rng.random() < 0.5, str: rng.choice(TEXTS)}[hint]


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_every_record_survives_json(cls: type):
    for seed in range(20):
        one = made(cls, random.Random(seed))
        text = json.dumps(one.to_json())
        again = cls.from_json(json.loads(text))
        assert again == one and json.dumps(again.to_json()) == text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Record):
    share: Share
    pair: Interval = (0.0, 1.0)
    n: CountFrom0 | None = None


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
        ({"name": "a", "parts": [{"share": 7}]}, r"parts\[0\].share must be at most 1, got 7"),
        ({"name": "a", "parts": [{"share": 1, "n": -5}]}, r"parts\[0\].n must be at least 0, got -5"),
        (
            {"name": "a", "parts": [{"share": 1, "pair": [1, 0]}]},
            r"pair must not begin above its end",
        ),
        ({"name": "a", "parts": [7]}, r"parts\[0\] is a number, expected an object"),
        ([], "file.json is a list, expected an object"),
    ],
)
def test_damage_is_named(record: Any, message: str):
    with pytest.raises(UserError, match=message):
        Outer.from_json(record, "file.json")
