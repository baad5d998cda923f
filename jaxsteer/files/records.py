"""``Record``: frozen dataclasses that are JSON objects on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxsteer.errors import UserError
from jaxsteer.files.json_files import kind_of

R = TypeVar("R", bound="Record")


class Record:
    """Base of frozen dataclasses that are written as JSON objects, with their fields as keys, in their order.

    Fields hold numbers, strings, other records, tuples of these, or mappings with strings as keys. An optional field
    that holds its default, and nothing in it (``None``, "", ()), is left out of the file; so that files written before
    a field existed can be read.
    """

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; ``from_json`` is the inverse. What is not a finite number stays as it is."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        given = [(field, getattr(self, field.name)) for field in fields]
        return {
            field.name: _plain(value)
            for field, value in given
            if not (value == field.default and (value is None or value == "" or value == ()))
        }

    @classmethod
    def from_json(cls: type[R], record: Any, where: str = "") -> R:
        """The object that ``to_json`` wrote. Unknown keys are ignored: a later version may have written them.

        A field that may be ``None`` may be missing; null in the place of a number is NaN. Raises ``UserError``, which
        begins with ``where``, for a key that is missing, or holds a value of another type or outside of the range
        (``jaxsteer.ranges``) that the field's type names.
        """
        if not isinstance(record, Mapping):
            raise UserError(f"{where or cls.__name__} is {kind_of(record)}, expected an object")
        hints, values = _hints(cls), {}  # type: ignore[arg-type]
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            place = f"{where}.{field.name}" if where else field.name
            if field.name in record:
                values[field.name] = _read(hints[field.name], record[field.name], place)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                if type(None) not in get_args(hints[field.name]):
                    raise UserError(f"{place} is missing")
                values[field.name] = None
        return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value.item() if hasattr(value, "item") else value


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` of a JSON document as a value of the type ``hint``."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and type(None) in inner):
        return value
    if origin is Annotated:
        found = _read(inner[0], value, where)
        rounded = round(found, 6) if isinstance(found, float) else found  # a mean of float32 may lie beyond its end
        if found == found and (why := inner[1].refusal(rounded)):
            raise UserError(f"{where} {why}")
        return found
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in inner if kind is not type(None)]
        for kind in kinds[:-1]:
            try:
                return _read(kind, value, where)
            except UserError:
                continue
        return _read(kinds[-1], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_read(inner[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
        if len(inner) == len(value):
            return tuple(_read(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(inner, value)))
    if origin is not None and origin is not tuple and isinstance(value, Mapping):
        return {key: _read(inner[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value, where)
    if hint is float and isinstance(value, int | float | None) and not isinstance(value, bool):
        return math.nan if value is None else float(value)
    if origin is Literal and value in inner:
        return value
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    shown = repr(value)[:60] if isinstance(value, str | int | float) else kind_of(value)
    raise UserError(f"{where} is {shown}, expected {_expected(hint)}")


def _expected(hint: Any) -> str:
    """A type of a field in words."""
    inner = get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if get_origin(hint) is tuple:
        return f"a list of {_SEVERAL.get(inner[0], 'objects') if inner[1:] == (Ellipsis,) else len(inner)}"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(hint, type) and issubclass(hint, Record):
        return "an object"
    return str(hint).replace("typing.", "")


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_SEVERAL: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}
