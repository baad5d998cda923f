"""The vectors that a server has: files under one directory, named by their file names, loaded and unloaded by name."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.axis.projection import calibration, scale
from jaxsteer.engine.spec import Steered, of_vectors, read_steering
from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.models.model import Model
from jaxsteer.sae import SAE
from jaxsteer.serve.errors import Refused
from jaxsteer.steer.edits import Edits
from jaxsteer.steer.imports import import_vectors
from jaxsteer.steer.vectors import CAPS, Vectors, check_vectors

SUFFIXES = (".safetensors", ".gguf", ".svec", ".npy", ".pt")


@dataclasses.dataclass
class Library:
    """What requests may be steered by. Files come from the directory that the server was started with, and no other."""

    model: Model
    directory: Path | None = None
    sae: SAE | None = None
    any_weights: bool = False
    loaded: dict[str, Vectors] = dataclasses.field(default_factory=dict)
    default: tuple[str, ...] = ()
    """Names of the vectors that every request is steered by, unless it says otherwise."""
    axis: str | None = None
    """The name of the assistant axis."""
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def files(self) -> dict[str, Path]:
        """Files that can be loaded, by name."""
        if self.directory is None:
            return {}
        found = sorted(p for p in self.directory.iterdir() if p.suffix in SUFFIXES and p.is_file())
        return {path.name: path for path in found if not path.name.startswith(".")}

    def add(self, name: str, path: Path) -> None:
        """Load a file. Raises ``UserError`` where it does not fit the model."""
        vectors = import_vectors(path)
        check_vectors(vectors, self.model, any_weights=self.any_weights)
        vectors.edits()
        with self._lock:
            self.loaded[name] = vectors

    def load(self, name: str) -> None:
        """Load a file of the directory. Raises ``Refused`` for a name that it does not hold."""
        path = self.files().get(name)
        if path is None:
            raise Refused(f"There is no file {name[:80]!r} to be loaded.", status=404, param="name", code="no_vectors")
        try:
            self.add(name, path)
        except UserError as error:
            raise Refused(str(error).replace(f"{path.parent}/", ""), param="name", code="vectors_refused") from None

    def unload(self, name: str) -> None:
        """Forget vectors. Raises ``Refused`` for those that are not loaded, and for the server's default and axis."""
        if name not in self.loaded:
            raise Refused(f"No vectors {name[:80]!r} are loaded.", status=404, param="name", code="no_vectors")
        if name in self.default or name == self.axis:
            raise Refused(f"{name!r} was given when the server was started: it stays.", param="name", code="in_use")
        with self._lock:
            self.loaded.pop(name, None)

    def find(self, name: str) -> Vectors:
        """Vectors by name. Raises ``Refused``."""
        vectors = self.loaded.get(name)
        if vectors is None:
            known = ", ".join(list(self.loaded)[:8]) or "none"
            lies = " A file has this name: POST it to /v1/steering/load first." if name in self.files() else ""
            raise Refused(
                f"No vectors {name[:80]!r} are loaded; these are: {known}.{lies}", param="steering", code="no_vectors"
            )
        return vectors

    def steered(self, asked: Any) -> Steered:
        """What a request is steered by: what it asks for, the server's default, or both. Raises ``Refused``."""
        default = [of_vectors(self.loaded[name], name) for name in self.default]
        if asked is None:
            return Steered(
                edits=Edits(tuple(edits for edits, _ in default)) if default else None,
                applied=tuple(said | {"default": True} for _, said in default),
            )
        try:
            own = read_steering(asked, self.model, self.find, self.sae)
        except UserError as error:
            raise Refused(str(error), param="steering", code="steering_refused") from None
        if not default:
            return own
        if own.merge is None:
            raise Refused(
                "This server steers every request, and yours has steering of its own: say merge true (both) or false "
                "(yours alone) in steering.",
                param="steering.merge", code="merge_missing",
            )  # fmt: skip
        if not own.merge:
            return own
        edits = [edits for edits, _ in default] + ([] if own.edits is None else list(own.edits.edits))
        applied = tuple(said | {"default": True} for _, said in default) + own.applied
        return Steered(edits=Edits(tuple(edits)), applied=applied, merge=True)

    def describe(self, name: str) -> dict[str, Any]:
        """Vectors as JSON, without their numbers."""
        v = self.find(name)
        site = v.metadata.get("site")
        scales = {s: dict(zip(("roles", "default"), ends, strict=True)) for s in v.sites if (ends := scale(v, s))}
        known = {s: {f"{k:g}": p for k, p in found.items()} for s in v.sites if (found := calibration(v, s))}
        return {
            "name": name, "operation": v.operation, "sites": list(v.sites), "site": site,
            "coefficient": None if v.operation in CAPS else v.coefficient, "units": v.coefficient_units,
            "values": dict(v.values), "norms": {s: v.norm(s) for s in v.sites},
            "mean_resid_norm": dict(v.mean_resid_norm), "positions": v.positions or "all", "sign": v.sign,
            "model": v.model, "gate": None if v.gate is None else parse_json(v.gate.to_json(), "gate"),
            "default": name in self.default, "axis": name == self.axis, "source_format": v.source_format,
            "scale": scales, "calibration": known,
        }  # fmt: skip

    def list(self) -> dict[str, Any]:
        """What is loaded and what could be, and what latents there are."""
        sae: Mapping[str, Any] | None = None
        if self.sae is not None:
            sae = {"site": self.sae.config.site_in, "latents": self.sae.n_latents}
        return {
            "object": "list", "active": bool(self.default), "default": list(self.default), "axis": self.axis,
            "data": [self.describe(name) for name in list(self.loaded)], "files": list(self.files()), "sae": sae,
        }  # fmt: skip
