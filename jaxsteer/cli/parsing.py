"""Command lines into dataclasses, by tyro."""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path
from jaxsteer.files.stores import is_url
from jaxsteer.ranges import check_ranges

_REGISTRY = ConstructorRegistry()


class _Url(Exception):
    """A URL where a path must stand; no ``ValueError``, which tyro would explain itself."""


class _NoPath(Exception):
    """A name that no path can have; its cause says why."""


@_REGISTRY.primitive_rule
def _paths(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Paths, but no URLs, which they would spoil: of gs://x/y a path keeps one slash."""
    if info.type is not Path:
        return None

    def path(words: list[str]) -> Path:
        if is_url(words[0]):
            raise _Url(words[0])
        try:
            return user_path(words[0])
        except UserError as error:
            raise _NoPath from error

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def parse_as(command: Any, arguments: Sequence[str], *, prog: str, description: str, default: Any = None) -> Any:
    """``command`` with the values that ``arguments`` give its fields; nested dataclasses lend their fields' names.

    ``default`` is an instance that has the values of what is not given. Raises ``SystemExit`` after help, and after
    explaining what is wrong with the arguments; ``UserError`` for a URL where a path must stand and for bytes that are
    no text.
    """
    try:
        found = tyro.cli(
            command,
            args=_together(arguments, _list_flags(command, arguments)),
            prog=prog,
            description=description,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            registry=_REGISTRY,
            **({} if default is None else {"default": default}),
        )
    except _NoPath as error:
        raise UserError(str(error.__cause__)) from None
    except _Url as url:
        raise UserError(
            f"{url} looks like a URL, to which only search writes: give a path, and copy the files from or to there"
        ) from None
    check_ranges(found)
    _check_texts(found)
    return found


def _check_texts(options: Any) -> None:
    """Refuse bytes that are no UTF-8, which Python passes on as halves of characters. Names of files may have them."""
    hints = get_type_hints(type(options))
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            _check_texts(value)
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str) or Path in get_args(hints[name]):
                continue
            try:
                text.encode()
            except UnicodeEncodeError:
                if not any(map(os.path.exists, (text, text.rpartition(":")[0]))):  # file.py:function
                    raise UserError(f"--{name.replace('_', '-')} {text!r} is no text: it has to be UTF-8") from None


def _list_flags(kind: Any, arguments: Sequence[str]) -> dict[str, str]:
    """Spelling -> flag of every option of the command, in words ``arguments``, that takes a list."""
    flags: dict[str, str] = {}
    metadata = getattr(kind, "__metadata__", ())
    kind = get_args(kind)[0] if metadata else kind
    if get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            names = [getattr(note, "name", None) for note in getattr(member, "__metadata__", ())]
            if not names or set(names) & set(arguments):
                flags |= _list_flags(member, arguments)
    elif dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            notes = getattr(hint, "__metadata__", ())
            if tyro.conf.UseAppendAction in notes:
                continue
            if get_origin(get_args(hint)[0] if notes else hint) is tuple:
                flag = f"--{name.replace('_', '-')}"
                aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
                flags |= dict.fromkeys([flag, *aliases], flag)
            else:
                flags |= _list_flags(hint, arguments)
    return flags


def _together(arguments: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """The arguments with the values of a list that is given several times after its first flag."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in arguments:
        if word[:1] != "-" or re.fullmatch(r"-\.?\d.*|-", word):
            groups[-1][1].append(word)
            continue
        name, equals, value = word.partition("=")
        flag = flags.get(name.replace("_", "-"), "")
        groups.append((flag, [name, *([value] if equals else [])] if flag else [word]))
    first: dict[str, list[str]] = {}
    for flag, words in groups:
        if flag and (earlier := first.setdefault(flag, words)) is not words:
            earlier += words[1:]
            words.clear()
    return [word for _, words in groups for word in words]
