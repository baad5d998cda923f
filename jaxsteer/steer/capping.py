"""Capping configurations of assistant-axis: ceilings on projections, by experiment (2601.10387).

Capping by name hides two operations. The paper's is a floor along the axis, which points to the Assistant; the released
code applies a ceiling, and the released vectors are named "role minus default", which points away. So what is read here
are ceilings, and where the axis lies beside the file the sign of the vectors is checked against it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsteer.display import short
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import describe, read_torch
from jaxsteer.models.sites import resid_site
from jaxsteer.steer.vectors import Vectors

CAP_SIGN = "role minus default, away from the Assistant, so that the cap is a ceiling (published ones are negative)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap:
    """One ceiling of a capping configuration: the projection on ``vector`` at ``site`` may not exceed ``value``."""

    name: str
    site: str
    vector: np.ndarray
    """float32 (D,), as stored."""
    value: float
    """In units of the stream, along the unit vector."""


def read_capping(path: str | os.PathLike[str]) -> dict[str, tuple[Cap, ...]]:
    """Every experiment of a ``capping_config.pt`` of assistant-axis, as ceilings.

    ``jaxsteer.steer.ceiling(cap.site, cap.vector, cap.value, positions=slice(0, None))`` is what the authors apply.
    Interventions without a cap are left out, as there. Raises ``UserError`` for a file of another kind.
    """
    data = read_torch(path)
    if not isinstance(data, dict) or not {"vectors", "experiments"} <= data.keys():
        raise UserError(f"{path} is no capping configuration: it holds {describe(data)}")
    try:
        return caps_of(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def caps_of(data: Mapping[Any, Any]) -> dict[str, tuple[Cap, ...]]:
    """The experiments of a configuration that has been read."""
    try:
        return {
            str(experiment["id"]): tuple(
                _cap(item, data["vectors"][item["vector"]]) for item in experiment["interventions"] if "cap" in item
            )
            for experiment in data["experiments"]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"this is no whole capping configuration: {first_line(error)}; it holds {describe(data)}"
        ) from error


def _cap(item: dict[str, Any], stored: dict[str, Any]) -> Cap:
    vector, layer = stored["vector"], stored["layer"]
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or type(layer) is not int or layer < 0:
        raise UserError(
            f"the vector {short(item['vector'])} is {describe(vector)} at layer {short(layer)}; expected [D] at a layer"
        )
    value = np.asarray(item["cap"], np.float64)
    if value.size != 1 or not np.isfinite(value):
        raise UserError(f"the cap of '{short(item['vector'])}' is '{short(item['cap'])}', not a number")
    name = str(item["vector"])
    return Cap(name=name, site=resid_site(layer), vector=np.array(vector, np.float32), value=float(value.item()))


def check_caps(caps: Vectors, axis: Vectors) -> None:
    """Refuse caps that would push a model away from the Assistant; ``axis`` points towards it.

    The vector of a floor has to lie along the axis of its site, and that of a ceiling against it. Raises ``UserError``
    for one that does not, for operations that are no caps, and for an axis without the site or of another width.
    """
    if caps.operation not in ("floor", "ceiling"):
        raise UserError(f"the operation of these vectors is {caps.operation!r}, which is no floor and no ceiling")
    for site, vector in caps.arrays.items():
        along = axis.at(site).arrays[site]
        if along.shape != vector.shape:
            raise UserError(
                f"the axis at {site} has shape {along.shape}, and the cap {vector.shape}: they belong to other models"
            )
        cosine = _cosine(along, vector)
        if caps.operation == "ceiling" and cosine >= 0:
            raise UserError(
                f"the vector of the ceiling at {site} points to the Assistant (cosine {cosine:.2f} with the axis): the "
                f"ceiling would push the model away from the Assistant. Its negative with the negative cap as a floor "
                f"says the same; a floor on the vector itself keeps the Assistant"
            )
        if caps.operation == "floor" and cosine <= 0:
            raise UserError(
                f"the vector of the floor at {site} points away from the Assistant (cosine {cosine:.2f} with the "
                f"axis): the floor would push the model away from the Assistant. A ceiling on it keeps the Assistant"
            )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))
