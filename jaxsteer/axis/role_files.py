"""``load_roles``: the role set that ships, and files of one's own (docs/assistant-axis.md)."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from jaxsteer.axis.roles import RoleSet
from jaxsteer.files import read_json

SHIPPED = "default"


def load_roles(source: str | os.PathLike[str] = SHIPPED) -> RoleSet:
    """The role set that ships ("default"), or the one in a JSON file as ``RoleSet.to_json`` writes it.

    Raises ``UserError`` that names the file, the role and the field for what is missing or of another type.
    """
    if source == SHIPPED:
        source = Path(str(resources.files("jaxsteer.axis") / "data" / "roles.json"))
    return RoleSet.from_json(read_json(source), str(source))
