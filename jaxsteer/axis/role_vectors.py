"""``RoleVectors``: the mean state of every role and of the Assistant at every block, in one file, and what they make.

A safetensors file: ``<site>`` float32 [A, D], the Assistant last, and ``errors/<site>`` [A, D], the standard errors
over questions (NaN with one question). Metadata: format, names, model, fingerprint, and the mean norm of what was read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxsteer.axis.geometry import Geometry
from jaxsteer.axis.projection import CALIBRATION, DEFAULT_PROJECTION, ROLES_PROJECTION
from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.errors import UserError
from jaxsteer.files import parse_json, read_tensors, tensor_bytes, write_bytes
from jaxsteer.steer import Vectors

FORMAT = "jaxsteer.roles/1"
ERRORS = "errors/"
TOWARDS = "towards the Assistant: mean(default) - mean(roles)"
PERCENTILES = (1, 5, 10, 25, 50, 75)
"""Of the projections of the Assistant's rollouts, kept with the axis."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoleVectors:
    """Mean states of roles."""

    names: tuple[str, ...]
    """Of the roles; the Assistant stands behind them."""
    arrays: Mapping[str, Float[np.ndarray, "A D"]]
    """By site."""
    errors: Mapping[str, Float[np.ndarray, "A D"]]
    stream: Mapping[str, float]
    """Mean norm of the stream where the assistant speaks, by site."""
    model: str
    fingerprint: str

    def vectors(self, role: str, *, against: Literal["default", "roles"] = "default") -> Vectors:
        """The direction of a role as a steering vector: its mean minus the Assistant's, or minus the mean of the roles.

        Raises ``UserError`` for a role that it does not have.
        """
        if role not in self.names:
            raise UserError(f"there is no role {role!r}: there are {', '.join(self.names[:12])} … ({len(self.names)})")
        i = self.names.index(role)
        minus = {site: array[-1] if against == "default" else array[:-1].mean(0) for site, array in self.arrays.items()}
        return self._vectors(
            {site: array[i] - minus[site] for site, array in self.arrays.items()},
            f"towards the role {role}: mean({role}) - mean({against})",
        )

    def component(self, k: int = 1) -> Vectors:
        """Principal component k (from 1) of the roles at every site, of the length of the axis there and oriented along
        it: a control of caps and pushes along the axis. Raises ``UserError`` for one that is not computed."""
        found = {}
        for site, array in self.arrays.items():
            here = Geometry.of(array.astype(np.float64))
            if not 1 <= k <= len(here.components):
                raise UserError(f"there are components 1 to {len(here.components)}, got {k}")
            found[site] = (here.components[k - 1] * np.linalg.norm(here.axis)).astype(np.float32)
        return self._vectors(found, f"along PC{k} of the roles, oriented towards the Assistant")

    def axis(self, rollouts: Callable[[str], Float[np.ndarray, "n D"]], target: str) -> Vectors:
        """The axis at every site, with what makes positions of projections on it, and where to read by default.

        ``rollouts`` gives the states of the Assistant's rollouts at a site: percentiles of their projections are kept
        with the axis. ``target`` is where roles are placed.
        """
        default, roles, percentiles = {}, {}, {}
        for site, array in self.arrays.items():
            wide = array.astype(np.float64)
            middle = wide[:-1].mean(0)
            unit = (wide[-1] - middle) / np.linalg.norm(wide[-1] - middle)
            default[site], roles[site] = float(wide[-1] @ unit), float(middle @ unit)
            values = np.percentile(rollouts(site) @ unit, PERCENTILES)
            percentiles[site] = dict(zip(map(str, PERCENTILES), map(float, values), strict=True))
        return dataclasses.replace(
            self._vectors({site: array[-1] - array[:-1].mean(0) for site, array in self.arrays.items()}, TOWARDS),
            metadata={
                "kind": "assistant axis",
                "roles": str(len(self.names)),
                "site": target,
                DEFAULT_PROJECTION: json.dumps(default),
                ROLES_PROJECTION: json.dumps(roles),
                CALIBRATION: json.dumps(percentiles),
            },
        )

    def _vectors(self, arrays: dict[str, np.ndarray], sign: str) -> Vectors:
        return Vectors(
            arrays={site: array.astype(np.float32) for site, array in arrays.items()},
            mean_resid_norm=dict(self.stream),
            coefficient_units="mean_resid_norm",
            coefficient=0.1,
            sign=sign,
            model=self.model,
            fingerprint=self.fingerprint,
            read_position="mean of the assistant's tokens",
        )

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {site: np.ascontiguousarray(array, np.float32) for site, array in self.arrays.items()}
        tensors |= {ERRORS + site: np.ascontiguousarray(array, np.float32) for site, array in self.errors.items()}
        facts = {
            "format": FORMAT, "names": json.dumps([*self.names, DEFAULT]), "sites": json.dumps([*self.arrays]),
            "stream": json.dumps(dict(self.stream)), "model": self.model, "fingerprint": self.fingerprint,
        }  # fmt: skip
        write_bytes(path, tensor_bytes(tensors, facts))


def load_role_vectors(path: str | Path) -> RoleVectors:
    """Read a file of role vectors. Raises ``UserError`` for one that is damaged, or holds something else."""
    tensors, facts = read_tensors(path, "file of role vectors")
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} holds no role vectors: its format is {facts.get('format')!r}, expected {FORMAT!r}")
    try:
        names, sites = parse_json(facts["names"], "names"), parse_json(facts["sites"], "sites")
        return RoleVectors(
            names=tuple(names[:-1]),
            arrays={site: tensors[site] for site in sites},
            errors={site: tensors[ERRORS + site] for site in sites},
            stream={site: float(value) for site, value in parse_json(facts["stream"], "stream").items()},
            model=facts.get("model", ""),
            fingerprint=facts.get("fingerprint", ""),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its names, sites and tensors do not fit together ({error})") from error
