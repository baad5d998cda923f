"""The command that makes a run again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError


def command_of(config: Mapping[str, Any]) -> str | None:
    """``jaxsteer search`` with those options of a run's config.json that are not the defaults; None for other files
    and for a run that several problems were pooled to."""
    from jaxsteer.study import SearchOptions  # not before it is needed: it loads the model's libraries

    if "pooled" in config:
        return None
    try:
        base = SearchOptions(out=Path("OUT"), preset=config["preset"], algorithm=config["algorithm"])
        usual: Mapping[str, Any] = base.resolved().record()
    except (KeyError, UserError):
        return None
    given = {"preset": config["preset"], "algorithm": config["algorithm"]}
    first = {name: SearchOptions.__dataclass_fields__[name].default for name in given}
    changed = {name: value for name, value in given.items() if value != first[name]}
    names = {field.name for field in dataclasses.fields(SearchOptions)} - {"out", *given}
    changed |= {
        name: value for name, value in config.items() if name in names and _plain(value) != _plain(usual.get(name))
    }
    if config.get("vary"):
        changed.pop("problems", None)  # a hash of what --vary says
    return " ".join(["jaxsteer search --out OUT", *(word for pair in changed.items() for word in _flag(*pair))])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _flag(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif name in ("problems", "init_from"):  # what they held is recorded, not where it was
        yield f"--{flag} {'TABLE' if name == 'problems' else 'RUN'}"
    elif value is not None:
        words = value if isinstance(value, list | tuple) else [value]
        yield " ".join([f"--{flag}", *(shlex.quote(str(word)) for word in words)])
