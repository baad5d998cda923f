"""Steering as JSON: what a request asks for, turned into edits, or refused by name. Nothing in it names a path.

``{"edits": [...], "merge": false}``, each edit one of

    {"vector": NAME, "sites": [...], "coefficient": 2, "units": "vector", "positions": "response"}
                     the vectors of a loaded file, with the flags of the command line; all but the name may be left out
    {"vector": NAME, "sites": [...], "operation": "floor", "value": 3.5, "positions": "all"}
                     the projection on such vectors bounded by one value at every site: floor, ceiling or clamp
    {"operation": "add", "site": "blocks.2.hook_resid_post", "values": [...], "coefficient": 2, "positions": "all"}
                     a vector in the request: add, add_keep_norm, ablate; floor, ceiling and clamp with "value"
    {"latents": [3, 17], "operation": "amplify", "amount": 2.5, "positions": "all"}
                     latents of the SAE that the server has: amplify (0 erases) or calibrate

or EasySteer's ``{"vectors": [{"source": NAME, "scale": 2, "layers": [10], "normalize": false, "apply": {...}}]}``, of
which ``algorithm`` "direct" is here. A gate that a file holds stands before its edits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsteer.engine.table import PLACES
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.model import Model
from jaxsteer.models.sites import parse_site
from jaxsteer.models.taps import Intervention
from jaxsteer.sae import SAE
from jaxsteer.sae.steering import steer_latents
from jaxsteer.steer import operations
from jaxsteer.steer.edits import Edits
from jaxsteer.steer.selectors import select
from jaxsteer.steer.vectors import CAPS, FIXED, Vectors

MOST_EDITS = 16
_OURS = ("edits", "merge")
_EASY = ("vectors", "conflict", "debug", "merge")
_INLINE: dict[str, Callable[..., Any]] = {
    "add": operations.add,
    "add_keep_norm": lambda *given, **how: operations.add(*given, **how, keep_norm=True),
    "ablate": operations.ablate,
    "floor": operations.floor,
    "ceiling": operations.ceiling,
    "clamp": operations.clamp,
}
POSITIONS = (
    "all", "every", "prompt", "last", "response", "last_and_response", "system", "user", "assistant", "template",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steered:
    """What a request is steered by."""

    edits: Edits | None
    """None: by nothing."""
    applied: tuple[Mapping[str, Any], ...]
    """Each of these edits as JSON, its defaults filled in."""
    merge: bool | None = None
    """Whether these come beside what the server always does (True) or in its place (False); None: not said."""


def read_steering(asked: Any, model: Model, find: Callable[[str], Vectors], sae: SAE | None = None) -> Steered:
    """The edits of a request's ``steering`` field. ``find`` gives the vectors that are loaded under a name.

    Raises ``UserError`` for everything that is not understood, with the place in the field where it stands.
    """
    if not isinstance(asked, Mapping):
        raise UserError(f"steering must be an object with edits (or EasySteer's vectors), got {_kind(asked)}")
    if not {"edits", "vectors"} & set(asked):
        refuse_unknown(asked, (*_OURS, *_EASY), "field", "steering: ")
    if ("edits" in asked) == ("vectors" in asked):
        raise UserError("steering has either edits or vectors: give exactly one of the two")
    easy = "vectors" in asked
    refuse_unknown(asked, _EASY if easy else _OURS, "field", "steering: ")
    merge = asked.get("merge")
    if merge is not None and not isinstance(merge, bool):
        raise UserError(f"steering.merge must be true or false, got {_kind(merge)}")
    items = asked["vectors" if easy else "edits"]
    if not isinstance(items, list):
        raise UserError(f"steering.{'vectors' if easy else 'edits'} must be a list, got {_kind(items)}")
    if len(items) > MOST_EDITS:
        raise UserError(f"steering lists at most {MOST_EDITS} edits, got {len(items)}")
    if easy:
        _check_easy(asked, len(items))
    edits: list[Intervention] = []
    applied: list[Mapping[str, Any]] = []
    for i, item in enumerate(items):
        where = f"steering.{'vectors' if easy else 'edits'}[{i}]"
        try:
            if not isinstance(item, Mapping):
                raise UserError(f"an edit must be an object, got {_kind(item)}")
            one, said = _easy(item, find) if easy else _ours(item, find, sae, model)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        edits.append(one)
        applied.append(said)
    made = Edits(tuple(edits)) if edits else None
    if made is not None:
        made.check(model.config, 1)
    return Steered(edits=made, applied=tuple(applied), merge=merge)


def of_vectors(
    vectors: Vectors,
    name: str,
    *,
    sites: Sequence[str] = (),
    coefficient: float | None = None,
    units: str | None = None,
    positions: Any = None,
) -> tuple[Edits, dict[str, Any]]:
    """The edits of a vector file as the command line makes them, and what they are, as JSON.

    Raises ``UserError`` for sites, units or positions that the file does not allow.
    """
    whole = "site" in vectors.metadata or vectors.operation in FIXED
    chosen = tuple(sites) or ((vectors.metadata["site"],) if whole and "site" in vectors.metadata else vectors.sites)
    own = vectors.at(chosen)
    if units is not None:
        own = dataclasses.replace(own, coefficient_units=units)  # type: ignore[arg-type]
    edits = own.edits(coefficient=coefficient, positions=positions)
    said: dict[str, Any] = {"vector": name, "operation": own.operation, "sites": list(own.sites)}
    if own.operation in CAPS:
        said["values"] = dict(own.values)
    else:
        said["coefficient"] = own.coefficient if coefficient is None else coefficient
        said["units"] = own.coefficient_units
    said["positions"] = own.positions or "all" if positions is None else positions
    if own.gate is not None:
        said["gate"] = {"site": own.gate.site, "threshold": own.gate.threshold, "sign": own.gate.sign}
    return edits, said


def _ours(
    item: Mapping[str, Any], find: Callable[[str], Vectors], sae: SAE | None, model: Model
) -> tuple[Intervention, dict[str, Any]]:
    if "vector" in item:
        refuse_unknown(item, ("vector", "sites", "coefficient", "units", "operation", "value", "positions"), "field")
        sites = _texts(item.get("sites", ()), "sites")
        if "sites" in item and not sites:
            raise UserError("sites is an empty list: name sites, or leave it out for those of the file")
        units = item.get("units")
        if units not in (None, "vector", "mean_resid_norm"):
            raise UserError(f'units are "vector" or "mean_resid_norm", got {_kind(units)}')
        vectors = _bounded(find(_text(item["vector"], "vector")), item)
        coefficient = None if item.get("coefficient") is None else _number(item["coefficient"], "coefficient")
        if coefficient is not None and vectors.operation in CAPS:
            raise UserError(f"{vectors.operation} has values of its own and takes no coefficient")
        return of_vectors(
            vectors, item["vector"], sites=sites, coefficient=coefficient, units=units,
            positions=_positions(item.get("positions")),
        )  # fmt: skip
    if "latents" in item:
        return _latents(item, sae)
    if "operation" not in item:
        raise UserError('an edit names a loaded "vector", or has an "operation" with "site" and "values", or "latents"')
    return _inline(item, model)


def _bounded(vectors: Vectors, item: Mapping[str, Any]) -> Vectors:
    """The vectors as directions whose projection is bounded, where an edit says so."""
    operation = item.get("operation")
    if operation is None:
        if "value" in item:
            raise UserError(f"a value belongs to an operation: {', '.join(CAPS)}")
        return vectors
    if operation not in CAPS:
        raise UserError(f"loaded vectors are bounded by {', '.join(CAPS)}, got {_kind(operation)}")
    if vectors.operation in CAPS or vectors.operation in FIXED:
        raise UserError(f"the vectors are of the operation {vectors.operation} already: leave out operation and value")
    if "value" not in item or item.get("coefficient") is not None or item.get("units") is not None:
        raise UserError(f"{operation} takes a value, in units of the stream, and neither coefficient nor units")
    values = dict.fromkeys(vectors.arrays, _number(item["value"], "value"))
    return dataclasses.replace(vectors, operation=operation, values=values, coefficient=1.0, coefficient_units="vector")


def _latents(item: Mapping[str, Any], sae: SAE | None) -> tuple[Intervention, dict[str, Any]]:
    refuse_unknown(item, ("latents", "operation", "amount", "positions"), "field")
    if sae is None:
        raise UserError("this server has no SAE: it is started with --sae")
    latents, operation = item["latents"], item.get("operation", "amplify")
    if not isinstance(latents, list) or not all(isinstance(c, int) and not isinstance(c, bool) for c in latents):
        raise UserError(f"latents are a list of numbers of latents, got {_kind(latents)}")
    if operation not in ("amplify", "calibrate"):
        raise UserError(f'latents are steered by "amplify" or "calibrate", got {_kind(operation)}')
    if "amount" not in item:
        raise UserError("the amount is missing: a factor of amplify (0 erases), a value of calibrate")
    amount, positions = _number(item["amount"], "amount"), _positions(item.get("positions"))
    edit = steer_latents(sae, latents, operation, amount, positions=positions or "all")
    said = {"latents": latents, "operation": operation, "amount": amount, "site": edit.site.name}
    return edit, said | {"positions": positions or "all"}


def _inline(item: Mapping[str, Any], model: Model) -> tuple[Intervention, dict[str, Any]]:
    operation = _text(item["operation"], "operation")
    if operation not in _INLINE:
        raise UserError(f"there is no operation {operation!r}; these are: {', '.join(_INLINE)}")
    strength = "value" if operation in CAPS else "coefficient"
    if (other := ({"value", "coefficient"} - {strength}).pop()) in item:
        raise UserError(f"{operation} takes a {strength}, and no {other}")
    refuse_unknown(item, ("operation", "site", "values", strength, "positions"), "field")
    for name in ("site", "values", *(["value"] if operation in CAPS else [])):
        if name not in item:
            raise UserError(f"{operation} needs {name}")
    site = _site(_text(item["site"], "site"), model)
    values = item["values"]
    if not isinstance(values, list) or not 0 < len(values) <= 1 << 17:
        raise UserError(f"values are the numbers of a vector, got {_kind(values)}")
    vector = np.asarray([_number(v, "values") for v in values], np.float64)
    number, positions = _number(item.get(strength, 1.0), strength), _positions(item.get("positions"))
    edit = _INLINE[operation](site, vector, number, positions=positions or "all")
    said = {"operation": operation, "site": site, strength: number, "norm": float(np.linalg.norm(vector))}
    return edit, said | {"positions": positions or "all"}


def _site(name: str, model: Model) -> str:
    """A site that a table can steer, by any of its names."""
    layers = model.config.n_layers
    try:
        site = parse_site(name, layers)
    except UserError:
        site = None
    if site is None or site.kind not in PLACES:
        raise UserError(
            f"{name[:60]!r} is no site that can be steered here: these are blocks.N.KIND, N from 0 to {layers - 1}, "
            f"KIND one of {', '.join(PLACES)}"
        )
    return site.name


def _positions(given: Any) -> str | list[int] | None:
    if given is None:
        return None
    if isinstance(given, list) and given and all(isinstance(p, int) and not isinstance(p, bool) for p in given):
        return given
    if given not in POSITIONS:
        raise UserError(f"positions are a list of positions or one of {', '.join(POSITIONS)}, got {_kind(given)}")
    return str(given)


# EasySteer


def _check_easy(asked: Mapping[str, Any], count: int) -> None:
    if asked.get("debug") not in (None, False):
        raise UserError("steering.debug is not supported")
    conflict = asked.get("conflict")
    if conflict not in (None, "sequential") and count > 1:
        raise UserError(f'vectors act one after the other here: conflict "sequential", got {_kind(conflict)}')


def _easy(item: Mapping[str, Any], find: Callable[[str], Vectors]) -> tuple[Intervention, dict[str, Any]]:
    refuse_unknown(item, ("source", "algorithm", "scale", "layers", "normalize", "apply", "params", "name"), "field")
    algorithm = item.get("algorithm", "direct")
    if algorithm != "direct":
        raise UserError(f'the algorithm {_kind(algorithm)} is not supported: "direct" is, and edits have more')
    if item.get("params"):
        raise UserError("params belong to algorithms that are not supported")
    if "source" not in item:
        raise UserError("the source is missing: the name of vectors that are loaded here (GET /v1/steering)")
    name = _text(item["source"], "source")
    vectors, normalize = find(name), item.get("normalize", False)
    if vectors.operation not in ("add", "add_keep_norm"):
        raise UserError(f"{name} is of the operation {vectors.operation}: ask for it by edits")
    if not isinstance(normalize, bool):
        raise UserError(f"normalize must be true or false, got {_kind(normalize)}")
    sites = list(vectors.sites)
    if (layers := item.get("layers")) is not None:
        if not isinstance(layers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
            raise UserError(f"layers are a list of numbers, got {_kind(layers)}")
        sites = [site for site in sites if parse_site(site).layer in layers]
        if missing := sorted(set(layers) - {parse_site(site).layer for site in sites}):
            raise UserError(f"{name} has no vector at layer {missing[0]}")
    scale = _number(item.get("scale", 1.0), "scale")
    own = dataclasses.replace(
        vectors.at(sites), operation="add_keep_norm" if normalize else "add", coefficient_units="vector", positions=""
    )
    positions, said = _apply(item.get("apply"))
    edits = own.edits(coefficient=scale, positions=positions)
    return edits, {
        "vector": name, "operation": own.operation, "sites": sites, "coefficient": scale, "units": "vector",
        "positions": said,
    }  # fmt: skip


def _apply(given: Any) -> tuple[Any, str]:
    """Where EasySteer steers: at all tokens of prompt and generation, the first included."""
    if given is None:
        return "every", "every"
    if not isinstance(given, Mapping):
        raise UserError(f"apply must be an object with prompt and generation, got {_kind(given)}")
    refuse_unknown(given, ("prompt", "generation"), "field", "apply: ")
    prompt, generation = (given.get(name, False) for name in ("prompt", "generation"))
    if not isinstance(prompt, bool) or not isinstance(generation, bool):
        raise UserError("apply.prompt and apply.generation are true or false: windows and tokens are not supported")
    if prompt and generation:
        return "every", "every"
    if prompt:
        return select("prompt", include_first=True), "prompt"
    if generation:
        return "response", "response"
    raise UserError("apply leaves out prompt and generation: the vector would do nothing")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {_kind(value)}")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} must be a name, got {_kind(value)}")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise UserError(f"{name} must be a list of names, got {_kind(value)}")
    return tuple(given)


def _kind(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"{type(value).__name__} {value!r:.60}"
