"""Capping configurations of assistant-axis: ceilings on projections, by experiment (2601.10387).

Capping by name hides two operations. The paper's is a floor along the axis, which points to the Assistant; the released
code applies a ceiling, and the released vectors are named "role minus default", which points away. So what is read here
are ceilings, and where the axis lies beside the file the sign of the vectors is checked against it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxsteer.display import short
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import describe, read_torch
from jaxsteer.models.sites import resid_site

CAP_SIGN = (
    "by the names of the vectors role minus default, away from the Assistant, so that the cap is a ceiling; "
    "the sign of the stored caps is unverified"
)


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


def check_against_axis(caps: Iterable[Cap], axis: Mapping[str, np.ndarray]) -> bool:
    """Whether all vectors point against the axis; False where it has none of their site and width.

    Raises ``UserError`` for a vector that points to the Assistant: a ceiling on it would push the model away.
    """
    for cap in caps:
        along = axis.get(cap.site)
        if along is None or along.shape != cap.vector.shape:
            return False
        if float(along.astype(np.float64) @ cap.vector) >= 0:
            raise UserError(
                f"the vector '{short(cap.name)}' points to the Assistant, like the axis: a ceiling on it pushes the "
                f"model away from the Assistant. Its negative with the negative cap as a floor says the same"
            )
    return True
