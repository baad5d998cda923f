"""GGUF control vectors of llama.cpp, repeng and EasySteer: read and written."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import numpy as np

from jaxsteer.display import short
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import parse_json
from jaxsteer.files.gguf import read_gguf, write_gguf
from jaxsteer.models.sites import resid_site
from jaxsteer.steer.vectors import Vectors

log = logging.getLogger(__name__)

ARCHITECTURE = "controlvector"
OURS = f"{ARCHITECTURE}.jaxsteer."
"""Prefix of our own keys; all are strings."""
_OWN = ("sign", "model", "fingerprint", "read_position", "source_format")
# Files of the same tensors whose vectors are to be projected out exist ("GLP"), and say so in keys of their own.
_SAYS_WHAT_FOR = re.compile(r"(^|\.)(operation|mode|action|glp)(\.|$)")

_DIRECTION = re.compile(r"direction\.(0|[1-9]\d{0,5})")
_SITE = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


def read_control_vector(path: str | os.PathLike[str]) -> Vectors:
    """The vectors of a GGUF control vector: ``direction.i`` is added to the output of block i.

    ``direction.0`` (EasySteer writes it) and keys that we do not know are accepted; keys of our own come back as what
    they were. Raises ``UserError`` for a damaged file, one that is no control vector, tensors that are not 1-D float32
    of one width, and a file that says that its vectors are not to be added.
    """
    path = Path(path)
    keys, tensors = read_gguf(path, architecture=ARCHITECTURE)
    for key, value in keys.items():
        if _SAYS_WHAT_FOR.search(key) and value not in ("add", "additive"):
            raise UserError(
                f"{path} says {short(key)} = '{short(value)}', and a control vector is added. If you know what its "
                f"vectors are for, read them with jaxsteer.files.gguf.read_gguf and make Vectors of that operation"
            )
    numbered = {}
    for name, array in tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or array.ndim != 1:
            raise UserError(
                f"{path} has a tensor '{short(name)}' of shape {array.shape}; expected direction.<block>, 1-D"
            )
        numbered[int(match.group(1))] = array
    if not numbered or len({len(array) for array in numbered.values()}) != 1:
        raise UserError(f"{path} holds vectors of widths {sorted({len(a) for a in numbered.values()})}; expected one")
    sites = {i: resid_site(i) for i in sorted(numbered)}
    own = {key.removeprefix(OURS): str(value) for key, value in keys.items() if key.startswith(OURS)}
    try:
        stored, recipe = (
            parse_json(own.pop(name, "{}"), f"{path}, key {OURS}{name}") for name in ("mean_resid_norm", "metadata")
        )
        norms = {sites[int(i)]: float(norm) for i, norm in stored.items()}
        recipe = {str(key): str(value) for key, value in recipe.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its keys {OURS}* do not fit its vectors ({first_line(error)})") from error
    others = {key: value for key, value in keys.items() if not key.startswith(OURS) and key != "general.architecture"}
    source = own.get("source_format", "")
    try:
        return Vectors(
            arrays={sites[i]: numbered[i] for i in sites},
            mean_resid_norm=norms,
            sign=own.get("sign", "") or "not stated by the file (repeng: towards the positive examples, by majority)",
            model=own.get("model", ""),
            fingerprint=own.get("fingerprint", ""),
            read_position=own.get("read_position", ""),
            source_format="gguf" + (f" (from {source})" if source else ""),
            metadata={
                **recipe,
                "family": str(keys.get(f"{ARCHITECTURE}.model_hint", "")),
                "index_meaning": "direction.i is added to the output of block i",
                "gguf_keys": json.dumps(others, ensure_ascii=False, default=str),
            },
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_control_vector(vectors: Vectors, path: str | os.PathLike[str], *, model_hint: str) -> Path:
    """Write vectors as a GGUF control vector that adds at strength 1 what the vectors add. Returns the path.

    ``model_hint`` is llama.cpp's name of the architecture ("llama", "qwen2", "gemma2" ...). The coefficient is
    multiplied in. Vectors at the input of block i go to the output of block i-1, which is the same stream. llama.cpp
    does not steer block 0 and refuses files that ask for it: what belongs there (or before it) is left out with a
    logged warning. Raises ``UserError`` for vectors that are not added to the stream between blocks, and where nothing
    is left.
    """
    if vectors.gate is not None:
        raise UserError("a GGUF control vector is added always, and these vectors stand behind a gate: take it off")
    if vectors.operation != "add":
        raise UserError(f"a GGUF control vector is added, and the operation of these vectors is {vectors.operation!r}")
    numbered: dict[int, np.ndarray] = {}
    norms: dict[int, float] = {}
    for site in vectors.arrays:
        match = _SITE.fullmatch("blocks.0.hook_resid_pre" if site == "hook_embed" else site)
        if match is None:
            raise UserError(
                f"a GGUF control vector is added between blocks, not at {site}: expected blocks.<i>.hook_resid_post "
                f"or hook_resid_pre. Choose sites with --sites"
            )
        block = int(match.group(1)) - (match.group(2) == "pre")
        if block < 1:
            log.warning("%s is left out: llama.cpp steers from the output of block 1 on", site)
            continue
        if block in numbered:
            raise UserError(f"two vectors belong at the output of block {block}, which is the input of the next")
        numbered[block] = _added(vectors, site)
        if site in vectors.mean_resid_norm:
            norms[block] = vectors.mean_resid_norm[site]
    if not numbered:
        raise UserError("no vector is left to export: llama.cpp steers from the output of block 1 on")
    own = {name: getattr(vectors, name) for name in _OWN} | {
        "coefficient": f"{vectors.coefficient!r} in units of {vectors.coefficient_units}, multiplied in",
        "mean_resid_norm": json.dumps(norms),
        "metadata": json.dumps(vectors.metadata, ensure_ascii=False),
    }
    keys: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": model_hint,
        f"{ARCHITECTURE}.layer_count": len(numbered),
        **{OURS + name: text for name, text in own.items() if text},
    }
    write_gguf(path, keys, {f"direction.{block}": numbered[block] for block in sorted(numbered)})
    return Path(path)


def _added(vectors: Vectors, site: str) -> np.ndarray:
    array, scale = vectors.arrays[site], vectors.coefficient
    if vectors.coefficient_units == "mean_resid_norm":
        scale = vectors.coefficient * vectors.stream_norm(site) / max(float(np.linalg.norm(array)), 1e-30)
    with np.errstate(over="ignore", invalid="ignore"):
        added = array * np.float32(scale)
    if not np.isfinite(added).all():
        raise UserError(f"{vectors.coefficient:g} times the vector at {site} is beyond the range of float32")
    return added
