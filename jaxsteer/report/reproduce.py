"""The command that makes a run again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from jaxsteer.errors import UserError


def command_of(config: Mapping[str, Any]) -> str | None:
    """``jaxsteer search`` with the model, the persona and those options of a run's config.json that are not the
    defaults; None for other files and for a run that several problems were pooled to."""
    from jaxsteer.study.options import OPTIONS, SearchOptions  # not before it is needed: it loads the model's libraries

    if "pooled" in config:
        return None
    try:
        given = {name: config[name] for name in ("preset", "algorithm")}
        base = SearchOptions.of(out="OUT", **given)
        usual = base.record()
    except (KeyError, UserError):
        return None
    always = ("model",) if config.get("conversations") else ("model", "persona")
    changed = {name: config[name] for name in always if name in config}
    changed |= {name: value for name, value in base.changed().items() if name in given} | {
        name: config[name]
        for name in OPTIONS
        if name in config and name not in given and _plain(config[name]) != _plain(usual.get(name))
    }
    if config.get("vary"):
        changed.pop("problems", None)  # a hash of what --vary says
    return " ".join(["jaxsteer search --out OUT", *(word for pair in changed.items() for word in _flag(*pair))])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _flag(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if name == "raw_units":  # which may also be left to the preset
        yield f"--{flag} {value}"
    elif isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif name in ("problems", "init_from"):  # what they held is recorded, not where it was
        yield f"--{flag} {'TABLE' if name == 'problems' else 'RUN'}"
    elif value is not None:
        words = value if isinstance(value, list | tuple) else [value]
        yield " ".join([f"--{flag}", *(shlex.quote(str(word)) for word in words)])
