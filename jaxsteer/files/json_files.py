"""JSON files that a user brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``UserError`` names the file when it is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}. A Hugging Face model directory needs one.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Download or write the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object was expected.")
    return value
