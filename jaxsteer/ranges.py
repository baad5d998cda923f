"""What options and files may hold: ranges of numbers and a few names, part of a field's type.

One function checks them for all commands, and where a ``Record`` is read.

``seed: Seed = 0`` or ``share: Annotated[float, Range(0, 1)] = 0.5``. A whole number without a range is a count, a float
without one is finite.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxsteer.errors import UserError

MOST = 1 << 20
"""Of things that are counted one by one: more are no use, and no machine holds them."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included, or ``above`` the lower one."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def refusal(self, value: float) -> str:
        """What is wrong with a number, or ""."""
        if self.low <= value <= self.high and math.isfinite(value) and not (self.above and value == self.low):
            return ""
        if not math.isfinite(value):
            return f"must be a finite number, got {value}"
        bound = f"at most {self.high}" if value > self.high else f"{'above' if self.above else 'at least'} {self.low}"
        return f"must be {bound}, got {value}"


class Rising:
    """Pairs whose first number is not above the second."""

    def refusal(self, value: tuple[float, float]) -> str:
        """What is wrong with a pair, or ""."""
        return f"must not begin above its end, got {list(value)}" if value[0] > value[1] else ""


COUNT, FINITE = Range(1, MOST), Range()
Seed = Annotated[int, Range(0, (1 << 63) - 1)]
CountFrom0 = Annotated[int, Range(0, MOST)]
"""A count that may be 0."""
Large = Annotated[int, Range(1, 1 << 50)]
"""A number of tokens or bytes, of which there may be any."""
Positive = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Interval = Annotated[tuple[float, float], Rising()]
"""The lower and the upper end."""


def check_ranges(options: Any) -> None:
    """Raise ``UserError`` for the first field of an options dataclass, and of those that it holds, that ``check_types``
    refuses, whose number is out of its range or which is none of a ``Literal``'s names."""
    check_types(options)
    ranges, kinds = _ranges(type(options)), _hints(type(options))  # type: ignore[arg-type]
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), kinds[field.name]
        others = tuple(one for one in alternatives(kind) if isinstance(one, type))
        if (choices := choices_of(kind)) and value not in choices and not isinstance(value, others):
            names = ", ".join(map(str, choices))
            raise UserError(f"--{field.name.replace('_', '-')} is {value!r:.80}, but may be {names}")
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            allowed = ranges[field.name] or (COUNT if isinstance(number, int) else FINITE)
            if why := allowed.refusal(number):
                raise UserError(f"--{field.name.replace('_', '-')} {why}")


def check_types(options: Any) -> None:
    """Raise ``UserError`` for the first field of a dataclass that holds no number, text or truth value where its type
    asks for one, alone or as several. Other types are left to whoever reads them."""
    kinds = _hints(type(options))  # type: ignore[arg-type]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if wanted := _misfit(kinds[field.name], value):
            raise UserError(f"--{field.name.replace('_', '-')} must be {wanted}, got {value!r:.80}")


def _misfit(kind: Any, value: Any) -> str:
    """What ``value`` should be to be of the type ``kind``, or ""."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _misfit(inner[0], value)
    if origin in (Union, types.UnionType):
        wanted = [_misfit(one, value) for one in inner]
        return " or ".join(dict.fromkeys(wanted)) if all(wanted) else ""
    if origin is tuple and inner[1:] == (Ellipsis,) and not (isinstance(value, str) and inner[0] is str):
        if not isinstance(value, list | tuple):
            return "a list or a tuple"
        return next((f"a list in which each is {why}" for one in value if (why := _misfit(inner[0], one))), "")
    fits = _FITS.get(kind)
    return "" if fits is None or fits[1](value) else fits[0]


def must_be(value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise ``UserError`` for a value of none of these types; ``what`` names it."""
    if not isinstance(value, kinds):
        names = " or ".join(one.__name__ for one in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise UserError(f"{what} must be {names}, got {type(value).__name__}: {value!r:.80}")


def is_number(value: Any) -> bool:
    """Whether this is one number, of Python, NumPy or JAX; truth values and texts are none."""
    scalar = getattr(value, "ndim", None) == 0 and getattr(getattr(value, "dtype", None), "kind", "") in "iuf"
    return (isinstance(value, numbers.Real) or scalar) and not isinstance(value, bool)


def a_number(value: Any, what: str) -> float:
    """``value`` as a float. Raises ``UserError`` for what is no number; ``what`` names it."""
    if not is_number(value):
        raise UserError(f"{what} must be a number, got {value!r:.80}")
    return float(value)


_FITS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", is_number),
    int: ("a whole number", lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)),
    bool: ("true or false", lambda value: type(value).__name__ in ("bool", "bool_")),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("None", lambda value: value is None),
}


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of an option that has few."""
    return next((get_args(one) for one in alternatives(kind) if get_origin(one) is Literal), ())


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """What may be given alone or as several: a text is one thing, not its letters."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@functools.cache
def _ranges(kind: type) -> dict[str, Range | None]:
    return {name: _range(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _range(hint: Any) -> Range | None:
    """The range that stands in a type, also inside of a union or a tuple."""
    inner = (*getattr(hint, "__metadata__", ()), *map(_range, get_args(hint)))
    return next((part for part in inner if isinstance(part, Range)), None)
