"""Vector files: vectors by site, and all that is needed to steer by them without guessing (docs/vectors.md).

One format serves persona directions, steering vectors and caps: a safetensors file whose tensors are named by site
(``blocks.14.hook_resid_post``), with optional scalars ``mean_resid_norm/<site>``, and strings as metadata:

    format              "jaxsteer.direction/1"
    sites               JSON list, in order
    operation           "add" (when it is missing), "add_keep_norm", "ablate", "floor", "ceiling", "clamp", "cache":
                        added once to cached keys and values (``caching``), or "scale": tensors (P,) scale the last P
                        tokens of a prompt (``scale_prompt``)
    values              JSON: the projection of floor, ceiling and clamp by site, in units of the stream
    coefficient         of add, ablate, cache and scale ("1" when it is missing)
    coefficient_units   "vector" (when it is missing) or "mean_resid_norm"
    sign                what going along the vector means
    model, fingerprint  what it was made on: name, and hash of config and weights
    read_position       the token at which it was read
    positions           tokens to steer where the user does not say: a name of ``select`` ("all" when it is missing)
    source_format       the format it was imported from; missing in files of our own making
    gate                JSON: site, threshold, sign ... of the gate that the edit stands behind (``Gate``); its vector
                        is the tensor ``gate/<site>``
    anything else       the recipe, as strings
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import describe, kind_of, make_directory, parse_json, read_tensors, tensor_bytes, write_bytes
from jaxsteer.models.model import Model
from jaxsteer.models.sites import KINDS, parse_site
from jaxsteer.ranges import a_number, check_types, must_be
from jaxsteer.steer import operations
from jaxsteer.steer.caching import cache_edit
from jaxsteer.steer.edits import Edit, Edits
from jaxsteer.steer.gates import Gate, gated
from jaxsteer.steer.selectors import Positions, select
from jaxsteer.steer.summary import summary

log = logging.getLogger(__name__)

FORMAT = "jaxsteer.direction/1"
NORM_KEY = "mean_resid_norm/"
GATE_KEY = "gate/"
CAPS = ("floor", "ceiling", "clamp")
"""Operations that need a value per site."""
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
"""Families that files of other tools name, in the metadata key ``family``."""
FIXED = {"cache": "a cache is changed at its newest token", "scale": "a prompt is scaled token by token"}
"""Operations that act at places of their own."""

Operation = Literal["add", "add_keep_norm", "ablate", "floor", "ceiling", "clamp", "cache", "scale"]
Units = Literal["vector", "mean_resid_norm"]

_OPTIONAL = {"coefficient": "1", "coefficient_units": "vector", "operation": "add", "values": "{}"}
_TEXTS = ("sign", "model", "fingerprint", "read_position", "source_format", "positions")
_RESERVED = frozenset({"format", "sites", "gate", *_OPTIONAL, *_TEXTS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors:
    """Vectors by site and what they mean. Raises ``UserError`` when its parts do not fit together."""

    arrays: dict[str, np.ndarray]
    """float32 by site, as measured (not of norm 1): (D,), (I,) inside the MLP, (heads, H) where there are heads."""
    operation: Operation = "add"
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    """Projection by site of floor, ceiling and clamp, in units of the stream."""
    coefficient: float = 1.0
    coefficient_units: Units = "vector"
    """Whether the coefficient multiplies the vector as it is, or the mean norm of the stream along the unit vector."""
    mean_resid_norm: dict[str, float] = dataclasses.field(default_factory=dict)
    """Mean norm of the stream by site, where it is known."""
    sign: str = ""
    model: str = ""
    fingerprint: str = ""
    read_position: str = ""
    source_format: str = ""
    positions: str = ""
    """Tokens to steer where nobody says otherwise: a name of ``select``; none for "all"."""
    gate: Gate | None = None
    """Steer only the rows whose prompt opens it."""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    """Everything else: recipe, convention of the indices, what was lost in an import."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        check_types(self)
        for name in ("arrays", "values", "mean_resid_norm", "metadata"):
            must_be(getattr(self, name), dict, name)
        for site, array in self.arrays.items():
            must_be(array, np.ndarray, f"the vector at {site}")
        for site, number in (*self.values.items(), *self.mean_resid_norm.items()):
            a_number(number, f"the value or mean norm at {site}")
        needed = set(self.arrays) if self.operation in CAPS else set()
        if set(self.values) != needed:
            raise UserError(
                f"operation {self.operation} takes a value at {_listed(needed)}, but there are values at "
                f"{_listed(self.values)}"
            )
        if clash := _RESERVED & self.metadata.keys():
            raise UserError(f"metadata may not use the keys {_listed(clash)}: these are fields of their own")
        if self.operation == "cache":
            cache_edit(self.arrays, 1.0)  # raises for what no cache holds
        if self.operation in FIXED and (self.positions or self.coefficient_units != "vector"):
            raise UserError(f"{FIXED[self.operation]}: it takes no positions, and its units are 'vector'")
        if self.positions:
            select(self.positions)  # raises for a name that it does not know
        for site, array in self.arrays.items():
            if array.dtype != np.float32 or array.ndim not in (1, 2) or not array.size:
                raise UserError(f"the vector at {site} must be float32 (D,) or (heads, H), got {_form(array)}")
            if not np.isfinite(array).all():
                raise UserError(f"the vector at {site} has NaN or infinite entries")
        if not math.isfinite(self.coefficient):
            raise UserError(f"the coefficient must be a finite number, got {self.coefficient}")
        for site, value in self.values.items():
            if not math.isfinite(value):
                raise UserError(f"the value of {self.operation} at {site} must be a finite number, got {value}")
        for site, norm in self.mean_resid_norm.items():
            if not 0 < norm < math.inf:
                raise UserError(f"the mean norm of the stream at {site} must be a number above 0, got {norm}")

    __repr__ = summary

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in order."""
        return tuple(self.arrays)

    def at(self, sites: str | Sequence[str]) -> Vectors:
        """The vectors at these sites only (names or aliases). Raises ``UserError`` for one that is not held."""
        names = [parse_site(site).name for site in ([sites] if isinstance(sites, str) else sites)]
        if absent := [name for name in names if name not in self.arrays]:
            raise UserError(f"there is no vector at {absent[0]}: the file has {_listed(self.arrays)}")
        return dataclasses.replace(
            self,
            arrays={name: self.arrays[name] for name in names},
            values={name: self.values[name] for name in names if name in self.values},
            mean_resid_norm={name: self.mean_resid_norm[name] for name in names if name in self.mean_resid_norm},
        )

    def edits(self, *, coefficient: float | None = None, positions: Positions | None = None) -> Edits:
        """The operation of the file at every site of the file; choose sites with ``at`` before.

        ``coefficient`` replaces that of the file, in the file's units, and ``positions`` those of the file ("all" where
        it names none). A vector of zeros that would be added as it is changes nothing and is left out, with a logged
        warning. Raises ``UserError`` for other vectors of zeros, where nothing is left, and where the units are the
        mean norm of the stream and the file does not hold it.
        """
        amount = self.coefficient if coefficient is None else a_number(coefficient, "the coefficient")
        if self.operation in FIXED and positions is not None:
            raise UserError(f"{FIXED[self.operation]}: it takes no positions")
        if self.operation == "cache":
            return self._behind_gate(Edits((cache_edit(self.arrays, amount),)))
        positions = self.positions or "all" if positions is None else positions
        zero = [site for site, array in self.arrays.items() if not array.any()]
        harmless = self.operation in ("add", "add_keep_norm", "scale") and self.coefficient_units == "vector"
        if zero and (not harmless or len(zero) == len(self.arrays)):
            raise UserError(
                f"the vector at {zero[0]} is zero: it has no direction. Choose other sites (Vectors.at, --steer-sites)"
            )
        if zero:
            log.warning("vectors of zeros are left out: %s", ", ".join(zero))
        by_kind: dict[str, list[str]] = {}
        for site in self.arrays:
            if site in zero:
                continue
            by_kind.setdefault(parse_site(site).kind, []).append(site)
        return self._behind_gate(Edits(tuple(self._edit(sites, amount, positions) for sites in by_kind.values())))

    def _behind_gate(self, edits: Edits) -> Edits:
        return edits if self.gate is None else Edits((gated(edits, self.gate),))

    def _edit(self, sites: list[str], amount: float, positions: Positions) -> Edit:
        width = max(len(self.arrays[site]) for site in sites) if self.operation == "scale" else 0
        arrays = [self.arrays[site] for site in sites]
        vectors = np.stack([np.pad(a, (0, width - len(a))) if width else a for a in arrays])
        if self.operation == "scale":
            return operations.scale_prompt(sites, vectors, amount)
        if self.operation in ("add", "add_keep_norm"):
            in_norms = self.coefficient_units == "mean_resid_norm"
            norms = np.asarray([self.stream_norm(site) for site in sites]) if in_norms else None
            keep = self.operation == "add_keep_norm"
            return operations.add(sites, vectors, amount, positions=positions, mean_norm=norms, keep_norm=keep)
        if self.operation == "ablate":
            return operations.ablate(sites, vectors, amount, positions=positions)
        cap = {"floor": operations.floor, "ceiling": operations.ceiling, "clamp": operations.clamp}[self.operation]
        return cap(sites, vectors, np.asarray([self.values[site] for site in sites]), positions=positions)

    def norm(self, site: str) -> float:
        """Length of the vectors at a site (of all their entries together)."""
        return float(np.linalg.norm(self.arrays[site].astype(np.float64)))  # squares of float32 overflow

    def stream_norm(self, site: str) -> float:
        """Mean norm of the stream at a site. Raises ``UserError`` where the file does not hold it."""
        if site not in self.mean_resid_norm:
            raise UserError(
                f"the coefficient is in units of the mean norm of the stream, which the file does not hold at {site}: "
                f"measure it with jaxsteer.steer.mean_norms, or give coefficients in units of the vector"
            )
        return self.mean_resid_norm[site]


RANDOMISED = ("add", "add_keep_norm", "ablate")
"""Operations whose control is a random vector."""


def random_arrays(arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Isotropic random vectors, float32, of the norms and shapes of ``arrays``, by site."""
    rng, found = np.random.default_rng(seed), {}
    for site, array in arrays.items():
        draw = rng.standard_normal(array.shape)
        norm = np.linalg.norm(array.astype(np.float64))
        found[site] = (draw / np.linalg.norm(draw) * norm).astype(np.float32)
    return found


def random_controls(vectors: Vectors, draws: int = 3, seed: int = 0) -> list[Vectors]:
    """Controls of ``vectors``: random ones of equal norm at the same sites, with the same strength, positions and gate.

    Their edits have the form of those of ``vectors`` and run in one program with them. Raises ``UserError`` for other
    operations than ``RANDOMISED``: a cap's value, a cache and a scale belong to a direction or to a prompt.
    """
    if vectors.operation not in RANDOMISED:
        raise UserError(f"{vectors.operation} has no random control; these have: {', '.join(RANDOMISED)}")
    seeds = [int(np.random.default_rng([seed, draw]).integers(2**31)) for draw in range(draws)]
    return [
        dataclasses.replace(
            vectors,
            arrays=random_arrays(vectors.arrays, one),
            sign="random",
            metadata={**vectors.metadata, "estimator": f"random control, seed {one}"},
        )
        for one in seeds
    ]


def save_vectors(vectors: Vectors, path: str | os.PathLike[str]) -> Path:
    """Write a vector file, whole or not at all; its directory is made. Returns the path.

    Raises ``UserError`` for a name that ends as the files of other tools do (.pt, .gguf, .npy, .svec, .json).
    """
    path = Path(path)
    if path.suffix.lower() in (".pt", ".pth", ".gguf", ".npy", ".npz", ".svec", ".json"):
        raise UserError(f"{path} would be a safetensors file under another tool's name: end it in .safetensors")
    tensors = {site: np.ascontiguousarray(array, np.float32) for site, array in vectors.arrays.items()}
    tensors |= {NORM_KEY + site: np.asarray(norm, np.float32) for site, norm in vectors.mean_resid_norm.items()}
    if vectors.gate is not None:
        tensors[GATE_KEY + vectors.gate.site] = np.ascontiguousarray(vectors.gate.vector)
    written = {
        "gate": "" if vectors.gate is None else vectors.gate.to_json(),
        "operation": vectors.operation,
        "values": json.dumps(vectors.values),
        "coefficient": repr(vectors.coefficient),
        "coefficient_units": vectors.coefficient_units,
        **{name: getattr(vectors, name) for name in _TEXTS},
    }
    metadata = {
        **vectors.metadata,
        "format": FORMAT,
        "sites": json.dumps(list(vectors.sites)),  # safetensors sorts tensors by name
        **{name: text for name, text in written.items() if text},
    }
    make_directory(path.parent)
    write_bytes(path, tensor_bytes(tensors, metadata))
    return path


def load_vectors(path: str | os.PathLike[str], *, model: Model | None = None, any_weights: bool = False) -> Vectors:
    """Read a vector file of ours (``import_vectors`` reads those of others), checked against ``model`` if given.

    Raises ``UserError`` for a missing or damaged file, another format, and whatever ``check_vectors`` refuses.
    """
    tensors, metadata = read_tensors(path, "direction file")
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a vector file of jaxsteer: its metadata says format {metadata.get('format')!r}, expected "
            f"{FORMAT!r}. It holds {describe(tensors)}. One tensor of a .npy or .pt file is imported with --site"
        )
    facts = _OPTIONAL | metadata
    try:
        sites = _sites(facts, tensors)
        values = parse_json(facts["values"], "values")
        if not isinstance(values, dict):
            raise UserError(f"values must be an object of numbers by site, got {kind_of(values)}")
        vectors = Vectors(
            arrays={site: tensors[site] for site in sites},
            mean_resid_norm={site: float(tensors[NORM_KEY + site]) for site in sites if NORM_KEY + site in tensors},
            operation=_one_of(facts["operation"], get_args(Operation)),
            values={site: _number(value, f"the value at {site}") for site, value in values.items()},
            coefficient=_number(parse_json(facts["coefficient"], "coefficient", nan=True), "coefficient"),
            coefficient_units=_one_of(facts["coefficient_units"], ("vector", "mean_resid_norm")),
            **{name: facts.get(name, "") for name in _TEXTS},
            gate=Gate.from_json(facts["gate"], _gate_vectors(tensors)) if "gate" in facts else None,
            metadata={name: text for name, text in metadata.items() if name not in _RESERVED},
        )
    except UserError as error:
        raise UserError(f"{path} is damaged: its metadata and tensors do not fit together ({error})") from error
    if model is not None:
        check_vectors(vectors, model, any_weights=any_weights)
    return vectors


def check_vectors(vectors: Vectors, model: Model, *, any_weights: bool = False) -> None:
    """Refuse vectors that do not belong to ``model``: of another shape, beyond its layers, made on other weights.

    Other weights are a ``UserError`` unless ``any_weights``; then, and where the file does not say what it was made on,
    they are a logged warning.
    """
    if vectors.gate is not None:
        gated(Edits(()), vectors.gate).check(model.config)
    for site, array in vectors.arrays.items():
        kind = KINDS[parse_site(site, model.config.n_layers).kind]
        shape = kind.token_shape(model.config) if vectors.operation != "scale" else array.shape[:1]
        if kind.over_keys:
            raise UserError(f"{site} holds numbers for keys, not vectors")
        kind.shape(model.config)  # which refuses sites that the model does not have
        if array.shape != shape:
            there = f"width {shape[0]}" if len(shape) == 1 else f"the shape {shape}"
            raise UserError(
                f"the vector at {site} has shape {array.shape}, but values there have {there} in {model.name}: it "
                f"belongs to another model ({vectors.model or 'unknown'})"
            )
    family, own = (
        name.lower().removesuffix("_text") for name in (vectors.metadata.get("family", ""), model.config.family)
    )
    if family in FAMILIES and family != own and not any_weights:
        raise UserError(
            f"these vectors were made on a model of the family {family}, and {model.name} is of {own}: they belong to "
            f"another model. If they are meant for it all the same, say any_weights=True (--any-weights)"
        )
    if vectors.fingerprint == model.fingerprint:
        return
    if not vectors.fingerprint or any_weights:
        log.warning(
            "these vectors were made on %s (weights %.12s), not on the weights of %s (%.12s): they may mean nothing "
            "here",
            vectors.model or "an unknown model", vectors.fingerprint or "unknown", model.name, model.fingerprint,
        )  # fmt: skip
        return
    raise UserError(
        f"these vectors were made on {vectors.model or 'an unknown model'} (weights {vectors.fingerprint[:12]}), not "
        f"on the weights of {model.name} ({model.fingerprint[:12]}). If they are meant for it all the same, say "
        f"any_weights=True (--any-weights)"
    )


def _sites(facts: dict[str, str], tensors: dict[str, np.ndarray]) -> list[str]:
    """The sites that a file lists, each once and with its tensor; there are no other tensors than theirs."""
    if "sites" not in facts:
        raise UserError("the metadata has no entry 'sites'")
    sites = parse_json(facts["sites"], "sites")
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise UserError(f"sites must be a list of names, got {facts['sites'][:80]}")
    names = [parse_site(site).name for site in sites]
    if twice := next((site for site, name in zip(sites, names) if names.count(name) > 1), None):
        raise UserError(f"sites has {twice!r} twice")
    if absent := [site for site in sites if site not in tensors]:
        raise UserError(f"there is no tensor {absent[0]!r}, which sites names")
    norms = [NORM_KEY + site for site in sites]
    gates = [GATE_KEY + site for site in _gate_vectors(tensors)] if "gate" in facts else []
    if extra := sorted(tensors.keys() - {*sites, *norms, *gates}):
        raise UserError(f"the tensor {extra[0]!r} belongs to no site of sites")
    if wide := [norm for norm in norms if norm in tensors and tensors[norm].size != 1]:
        raise UserError(f"the tensor {wide[0]!r} must be one number, got {_form(tensors[wide[0]])}")
    return sites


def _gate_vectors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(GATE_KEY): array for name, array in tensors.items() if name.startswith(GATE_KEY)}


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{what} must be a number, got {kind_of(value)}")
    return float(value)


def _one_of(text: str, known: Iterable[str]) -> Any:
    if text not in known:
        raise UserError(f"{text!r} is none of {', '.join(known)}")
    return text


def _listed(names: Iterable[str]) -> str:
    given = sorted(names)
    return ", ".join(given[:8]) + (f" … ({len(given)})" if len(given) > 8 else "") if given else "no site"


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
