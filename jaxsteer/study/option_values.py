"""Values of options from keyword arguments, configuration files and tables, as the options' types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jaxsteer.display import short
from jaxsteer.errors import UserError
from jaxsteer.ranges import alternatives, choices_of

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NEEDED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def convert_value(name: str, kind: Any, value: Any) -> Any:
    """``value`` as the type ``kind`` of the option ``name``.

    ``kind`` is a str, bool, int, float or Path, a ``Literal`` of texts, ``tuple[str, ...]`` or a union of these. Texts
    are read as the type that is wanted; a mapping {name: value or values} becomes texts "name=value,value". Raises
    ``UserError`` for a value that the option cannot have.
    """
    kinds = alternatives(kind)
    if (value is None and type(None) in kinds) or (isinstance(value, Path) and Path in kinds):
        return value
    for one in kinds:
        try:
            return _as(one, value)
        except (TypeError, ValueError, OverflowError):
            continue
    given, advice = ("null", ": leave it out for its default") if value is None else (short(repr(value), 80), "")
    if choices := choices_of(kind):
        raise UserError(f"{name} is {given}, but may be {', '.join(choices)}{advice}")
    needed = next((_NEEDED[one] for one in kinds if one in _NEEDED), "a list of texts")
    raise UserError(f"{name} is {given}, but must be {needed}{advice}")


def _as(kind: Any, value: Any) -> Any:
    """``value`` as one plain type. Raises ``ValueError`` or ``TypeError``."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, Mapping):
            return tuple(f"{key}={_listed(given)}" for key, given in value.items())
        return tuple(_as(str, each) for each in ([value] if isinstance(value, str) else value))
    if kind is bool and isinstance(value, str):
        if value.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[value.lower()]
    if kind in (str, Path) and isinstance(value, (str, os.PathLike)):
        return kind(value)
    if isinstance(value, bool) is not (kind is bool) or kind in (str, Path, type(None)):
        raise TypeError
    return kind(value) if isinstance(value, str) or kind is float else _whole(kind, value)


def _whole(kind: type, value: Any) -> Any:
    if kind(value) != value:
        raise ValueError
    return kind(value)


def _listed(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value if hasattr(value, "__iter__") else [value]))
