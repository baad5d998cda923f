"""The directory of a lens: metrics.json with the summary, lens.npz with the statistics of every place and token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.files.npz import read_npz, write_npz
from jaxsteer.lens.comparison import LensComparison
from jaxsteer.lens.result import LensReading
from jaxsteer.processes import is_first
from jaxsteer.runs.files import METRICS, write_json

FILE, KIND = "lens.npz", "lens"
"""The arrays, and what config.json says of such a directory."""
_PARTS = (("cells",), ("run", "cells"), ("base", "cells"), ("shift",))
"""Where arrays stand in the result."""


def write_result(found: LensReading | LensComparison, directory: Path) -> None:
    """Write lens.npz, then metrics.json, each whole or not at all."""
    outline, arrays = found.to_json(), dict[str, np.ndarray]()
    for path in _PARTS:
        holder, part = _inside(outline, path[:-1]), _attribute(found, path)
        if holder is not None and part is not None:
            del holder[path[-1]]
            arrays |= {"/".join((*path, name)): array for name, array in part.arrays().items()}
    if is_first():
        write_npz(directory / FILE, arrays)
    write_json(directory / METRICS, outline)


def read_result(directory: Path) -> LensReading | LensComparison:
    """What ``write_result`` wrote. Raises ``UserError`` for files that are missing, damaged, or do not go together."""
    outline, arrays = read_json(directory / METRICS, nan=True), read_npz(directory / FILE)
    for path in _PARTS:
        prefix = "/".join(path) + "/"
        part = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        if part and (holder := _inside(outline, path[:-1])) is not None:
            holder[path[-1]] = part
    kind = LensComparison if "run" in outline else LensReading
    try:
        return kind.from_json(outline, str(directory / METRICS))
    except UserError as error:
        raise UserError(f"{directory} holds no whole result of jaxsteer lens: {error}") from None


def _inside(record: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _attribute(found: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        found = getattr(found, key, None)
    return found
