"""Vectors as files of assistant-axis (arXiv 2601.10387), which ``import_vectors`` reads back.

Such files hold less than ours: no operation, no units, no model. What they mean is in their names and shapes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import make_directory
from jaxsteer.files.torchwrite import write_torch
from jaxsteer.models.sites import parse_site
from jaxsteer.steer.vectors import Vectors

AWAY = "role_minus_default"


def write_by_block(vectors: Vectors, path: str | os.PathLike[str], *, role: str | None = None) -> Path:
    """One float32 tensor [L, D], whose row i is the vector at the output of block i; with ``role`` its mean activation,
    in the dict that the released pipeline writes for a role.

    The vectors are written as they are, without coefficient. Raises ``UserError`` for caps and gates, which the format
    does not hold, for vectors at other sites, and where a block between the first and the last one held is missing.
    """
    if vectors.operation != "add" or vectors.gate is not None:
        raise UserError(
            f"a tensor of a vector for each block is added, and the operation of these vectors is {vectors.operation!r}"
            f"{' behind a gate' if vectors.gate is not None else ''}"
        )
    by_block = {_block(site): array for site, array in vectors.arrays.items()}
    if missing := set(range(len(by_block))) - by_block.keys():
        raise UserError(
            f"there is no vector at the output of block {min(missing)}: the format holds one for every block from 0 on"
        )
    rows = np.stack([by_block[block] for block in range(len(by_block))])
    kind = "mean" if role == "default" else "pos_3"
    return _write(path, rows if role is None else {"vector": rows, "type": kind, "role": role})


def write_capping(experiments: Mapping[str, Vectors], path: str | os.PathLike[str]) -> Path:
    """Caps by the name of their experiment, as a ``capping_config.pt``.

    The format holds ceilings on vectors that point away from the Assistant. A floor becomes one: floor(h, u, t) is
    ceiling(h, -u, -t). Which tokens are capped is not part of it: the released code caps all. Raises ``UserError`` for
    operations that are no caps, for gates, and for caps at other sites than the outputs of blocks.
    """
    stored: dict[str, dict[str, np.ndarray | int]] = {}
    listed = []
    for name, caps in experiments.items():
        if caps.operation not in ("floor", "ceiling") or caps.gate is not None:
            raise UserError(
                f"{name}: a capping configuration holds floors and ceilings, and the operation of these vectors is "
                f"{caps.operation!r}{' behind a gate' if caps.gate is not None else ''}"
            )
        sign = -1.0 if caps.operation == "floor" else 1.0
        items = []
        for site, array in caps.arrays.items():
            vector = (sign * array).astype(np.float32)
            items.append({"vector": _stored(stored, _block(site), vector), "cap": sign * caps.values[site]})
        listed.append({"id": name, "interventions": items})
    return _write(path, {"vectors": stored, "experiments": listed})


def layers_name(caps: Vectors) -> str:
    """Name of an experiment in the manner of the released ones: "layers_46:54" caps blocks 46 to 53."""
    blocks = sorted(_block(site) for site in caps.arrays)
    return f"layers_{blocks[0]}:{blocks[-1] + 1}"


def _stored(stored: dict[str, dict[str, np.ndarray | int]], block: int, vector: np.ndarray) -> str:
    """The name under which a vector stands: experiments with the same vector share one."""
    number = 0
    while True:
        name = f"layer_{block}/{AWAY}{f'_{number}' if number else ''}"
        if name not in stored:
            stored[name] = {"vector": vector, "layer": block}
            return name
        if np.array_equal(np.asarray(stored[name]["vector"]), vector):
            return name
        number += 1


def _block(site: str) -> int:
    found = parse_site(site)
    if found.kind != "hook_resid_post":
        raise UserError(
            f"the format holds vectors at outputs of blocks, not at {site}: expected blocks.<i>.hook_resid_post. "
            f"Choose sites with --sites"
        )
    return found.layer


def _write(path: str | os.PathLike[str], value: Any) -> Path:
    path = Path(path)
    make_directory(path.parent)
    write_torch(path, value)
    return path
