"""Role vectors of the authors of arXiv 2601.10387, in and out (docs/assistant-axis.md).

A folder holds ``default_vector.pt``, ``role_vectors/<role>.pt`` and ``assistant_axis.pt``; every tensor is [L, D], with
the output of block i in row i.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from jaxsteer.axis.role_vectors import RoleVectors
from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path
from jaxsteer.steer import Vectors, import_vectors, write_by_block

AXIS, DEFAULT_VECTOR, ROLES = "assistant_axis.pt", "default_vector.pt", "role_vectors"


def read_released(folder: str | os.PathLike[str]) -> RoleVectors:
    """The role vectors of a model's folder. They come without standard errors (NaN), norms of the stream and weights.

    Raises ``UserError``, which names the file, for one that is missing or damaged, and for tensors of several shapes.
    """
    folder = user_path(folder)
    files = sorted((folder / ROLES).glob("*.pt"))
    if len(files) < 2:
        raise UserError(f"{folder} has {len(files)} files {ROLES}/<role>.pt: expected those of two roles or more")
    default = import_vectors(folder / DEFAULT_VECTOR, format="assistant_axis").arrays
    rows: dict[str, list[np.ndarray]] = {site: [] for site in default}
    for file in files:
        found = import_vectors(file, format="assistant_axis").arrays
        if _size(found) != _size(default):
            raise UserError(f"{file} has {_size(found)}, and {DEFAULT_VECTOR} beside it {_size(default)}: other models")
        for site, row in found.items():
            rows[site].append(row)
    arrays = {site: np.stack([*rows[site], row]) for site, row in default.items()}
    return RoleVectors(
        names=tuple(file.stem for file in files),
        arrays=arrays,
        errors={site: np.full_like(array, math.nan) for site, array in arrays.items()},
        stream={},
        model=folder.name,
        fingerprint="",
    )


def write_released(vectors: RoleVectors, folder: str | os.PathLike[str]) -> Path:
    """Write the axis, the Assistant's vector and those of roles as such a folder, which is made.

    Raises ``UserError`` for role vectors at other sites than the outputs of blocks, from block 0 on.
    """
    folder = user_path(folder)
    for i, name in enumerate((*vectors.names, DEFAULT)):
        mean = Vectors(arrays={site: array[i].astype(np.float32) for site, array in vectors.arrays.items()})
        if name == DEFAULT:
            write_by_block(mean, folder / DEFAULT_VECTOR)
        else:
            write_by_block(mean, folder / ROLES / f"{name}.pt", role=name)
    axis = {site: (array[-1] - array[:-1].mean(0)).astype(np.float32) for site, array in vectors.arrays.items()}
    write_by_block(Vectors(arrays=axis), folder / AXIS)
    return folder


def _size(arrays: dict[str, np.ndarray]) -> str:
    return f"{len(arrays)} blocks of width {next(iter(arrays.values())).size}"
