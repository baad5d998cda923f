"""Command lines into dataclasses, by tyro."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxsteer.errors import UserError
from jaxsteer.files.stores import is_url

_REGISTRY = ConstructorRegistry()


class _Url(Exception):
    """A URL where a path must stand; no ``ValueError``, which tyro would explain itself."""


@_REGISTRY.primitive_rule
def _paths(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Paths, but no URLs, which they would spoil: of gs://x/y a path keeps one slash."""
    if info.type is not Path:
        return None

    def path(words: list[str]) -> Path:
        if is_url(words[0]):
            raise _Url(words[0])
        return Path(words[0])

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
    explaining what is wrong with the arguments; ``UserError`` for a URL where a path must stand.
    """
    try:
        return tyro.cli(
            command,
            args=arguments,
            prog=prog,
            description=description,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            registry=_REGISTRY,
            **({} if default is None else {"default": default}),
        )
    except _Url as url:
        raise UserError(
            f"{url} looks like a URL, to which only search writes: give a path, and copy the files from or to there"
        ) from None
