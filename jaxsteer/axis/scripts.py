"""Scripted conversations of a user, and persona attacks, as they ship with the package and from files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.files.records import Record
from jaxsteer.personas import read_templates

SHIPPED = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripts(Record):
    """User messages of scripted conversations, by domain. Raises ``UserError`` for a domain or a script without any."""

    domains: Mapping[str, tuple[tuple[str, ...], ...]]
    """Name of the domain -> conversations -> what the user says, turn by turn, whatever the replies are."""
    about: str = ""

    def __post_init__(self) -> None:
        """Check that every conversation has something to say."""
        if not self.domains:
            raise UserError("there is no domain of conversations")
        for domain, scripts in self.domains.items():
            if not scripts:
                raise UserError(f"domain {domain!r} has no conversation")
            for number, messages in enumerate(scripts):
                if not messages or not all(message.strip() for message in messages):
                    raise UserError(f"domain {domain!r}, conversation {number}: a message is empty, or there is none")


def load_scripts(source: str | os.PathLike[str] = SHIPPED) -> Scripts:
    """The scripted conversations that ship ("default": coding, writing, therapy and philosophy), or those of a file.

    A file holds ``{"domains": {name: [[message, ...], ...]}}``. Raises ``UserError`` that names the file and the place.
    """
    path = _data("conversations.json") if source == SHIPPED else source
    try:
        return Scripts.from_json(read_json(path), str(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def persona_attacks() -> dict[str, str]:
    """The templates that ship: name -> a role or a story around a request, which stands at ``{request}``."""
    return read_templates(_data("attacks.json"))


def _data(name: str) -> Path:
    return Path(str(resources.files("jaxsteer.axis") / "data" / name))
