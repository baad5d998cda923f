"""Vectors of other tools: which format a file has, what its indices mean, and where its signs point (docs/vectors.md).

A shift by one block does not fail, it degrades; so every import names its sites in full and notes in the metadata what
an index of the source meant (``index_meaning``), beside the ``sign``. What a file does not say is not guessed: it is
asked for (``site``) or noted as unknown.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import describe, read_torch, reading
from jaxsteer.files.npz import read_npy
from jaxsteer.files.paths import user_path
from jaxsteer.models.sites import KINDS, parse_site, resid_site
from jaxsteer.steer.gguf import read_control_vector
from jaxsteer.steer.import_formats import (
    AXIS_FOLDERS,
    CAA_FILE,
    PERSONA_FILE,
    TO_ASSISTANT,
    Ask,
    assistant_axis,
    axis_by_name,
    bare,
    caa,
    caa_vectors,
    capping,
    mean_diffs,
    persona_vectors,
    refusal,
    role_sign,
    svec,
)
from jaxsteer.steer.import_libraries import (
    AXBENCH_FILE,
    EASYEDIT_FILE,
    EASYEDIT_FOLDER,
    axbench,
    easyedit,
    easyedit_folder,
    pyvene,
    steering_vectors,
)
from jaxsteer.steer.vectors import Vectors, load_vectors

Format = Literal[
    "jaxsteer", "gguf", "persona_vectors", "assistant_axis", "capping", "refusal_direction", "svec", "caa", "bare",
    "steering_vectors", "easyedit", "axbench", "pyvene",
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)


def import_vectors(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    site: str | None = None,
    name: str | None = None,
    sign: str | None = None,
) -> Vectors:
    """Vectors from a file (or a folder of refusal_direction, CAA, EasyEdit or pyvene) of any tool in ``FORMATS``.

    The format is told by keys and shapes, then by file names; ``format`` decides where they do not. ``site`` says
    where a bare vector belongs, and chooses one of several vectors elsewhere. ``name`` chooses the experiment of a
    capping configuration, the position (-1, -2 ...) of mean_diffs.pt, the model in a folder of CAA, the mode in one of
    EasyEdit, the concept of axbench, or the entry of a dict. ``sign`` says what going along the vector means. Raises
    ``UserError`` for a file that cannot be read, that fits no format (with its keys and shapes) or several.
    """
    path = user_path(path)
    ask = Ask(path=path, format=format, site=site, name=name, sign=sign)
    try:
        found = _recognise(ask)
        return found if site is None else found.at(site)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


def _recognise(ask: Ask) -> Vectors:
    path = ask.path
    if path.is_dir():
        return _folder(ask)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with reading(path), path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"GGUF"):
        _agree(ask, "gguf")
        return ask.as_read(read_control_vector(path))
    if start[8:9] == b"{":
        _agree(ask, "jaxsteer")
        return ask.as_read(load_vectors(path))
    if start.startswith(b"\x93NUMPY"):
        return _tensor(ask, read_npy(path))
    if start.lstrip()[:1] == b"{":
        _agree(ask, "svec")
        return svec(ask)
    if not start:
        raise UserError("the file is empty")
    ending = path.suffix.lower()
    if ending in _BEGIN and not start.startswith(b"PK"):
        raise UserError(f"this is no {ending} file: those begin with {_BEGIN[ending]}, and this one with {start[:8]!r}")
    return _torch(ask, read_torch(path))


_BEGIN = {
    ".safetensors": "8 bytes of length and a JSON object", ".gguf": "GGUF", ".svec": "a JSON object",
    ".npy": "\\x93NUMPY", ".json": "a JSON object",
}  # fmt: skip


def _agree(ask: Ask, found: str) -> None:
    if ask.format not in (None, found):
        raise UserError(f"this is a file of format {found!r}, not {ask.format!r}")


def _torch(ask: Ask, data: Any) -> Vectors:
    """What ``read_torch`` found: one tensor, or a dict that is known by its keys."""
    if isinstance(data, np.ndarray):
        return _tensor(ask, data)
    keys = set(data) if isinstance(data, dict) else set()
    if {"vectors", "experiments"} <= keys:
        _agree(ask, "capping")
        return capping(ask, data)
    if "axis" in keys and keys <= {"axis", "metadata"}:
        _agree(ask, "assistant_axis")
        note = {"axis_metadata": json.dumps(data.get("metadata"), default=str)}
        return assistant_axis(ask, data["axis"], TO_ASSISTANT, note)
    if {"vector", "type", "role"} <= keys:
        _agree(ask, "assistant_axis")
        note = {"role": str(data["role"]), "type": str(data["type"])}
        return assistant_axis(ask, data["vector"], role_sign(str(data["role"])), note)
    by_layer = ask.format == "steering_vectors" and keys and all(type(key) is int for key in keys)
    if keys == {"layer_activations", "layer_type"} or by_layer:
        _agree(ask, "steering_vectors")
        return steering_vectors(ask, data)
    if ask.name is not None and ask.name in keys and isinstance(data[ask.name], np.ndarray):
        return _tensor(dataclasses.replace(ask, name=None), data[ask.name])
    raise UserError(
        f"this fits no known format. It holds {describe(data)}. Known are {', '.join(FORMATS)}; one tensor of a dict "
        f"is chosen with --name"
    )


def _tensor(ask: Ask, array: np.ndarray) -> Vectors:
    """One tensor, told by its shape and then by the name of its file."""
    if array.dtype.kind not in "fiV" and array.dtype.name != "bfloat16":
        raise UserError(f"this holds {describe(array)}, which are no vectors")
    found = ask.format or _by_shape(ask, array)
    readers: dict[str, tuple[tuple[int, ...], Callable[[Ask, np.ndarray], Vectors]]] = {
        "persona_vectors": ((2,), persona_vectors),
        "assistant_axis": ((2,), axis_by_name),
        "refusal_direction": ((1, 3), lambda a, x: mean_diffs(a, x) if x.ndim == 3 else refusal(a, x)),
        "caa": ((1,), caa),
        "easyedit": ((1,), easyedit),
        "axbench": ((2,), axbench),
        "bare": ((1, 2), bare),
    }
    if found not in readers or array.ndim not in readers[found][0]:
        raise UserError(f"this holds {describe(array)}, which is no file of format {found!r}")
    return readers[found][1](ask, array)


def _by_shape(ask: Ask, array: np.ndarray) -> str:
    path = ask.path
    if array.ndim == 3:
        return "refusal_direction"
    if array.ndim == 2 and not (ask.site is not None and KINDS[parse_site(ask.site).kind].heads):
        if PERSONA_FILE.fullmatch(path.name):
            return "persona_vectors"
        if path.name in ("assistant_axis.pt", "default_vector.pt") or path.parent.name in AXIS_FOLDERS:
            return "assistant_axis"
        if AXBENCH_FILE.fullmatch(path.name):
            return "axbench"
        raise UserError(
            f"this holds {describe(array)}, and the name of the file does not tell what a row is. Say --format "
            f"persona_vectors (row i is hidden_states[i], the output of block i-1; L + 1 rows) or --format "
            f"assistant_axis (row i is the output of block i; L rows): a shift by one goes unnoticed"
        )
    if array.ndim == 1 and ask.site is None:
        if path.name == "direction.pt" and (path.parent / "direction_metadata.json").is_file():
            return "refusal_direction"
        if CAA_FILE.fullmatch(path.name):
            return "caa"
        if EASYEDIT_FILE.fullmatch(path.name) and EASYEDIT_FOLDER.fullmatch(path.parent.name):
            return "easyedit"
    return "bare"


def _folder(ask: Ask) -> Vectors:
    """A folder of refusal_direction, of pyvene, of EasyEdit, or of CAA's files of one model."""
    path = ask.path
    if (path / "config.json").is_file() and ask.format in (None, "pyvene"):
        return pyvene(ask)
    if EASYEDIT_FOLDER.fullmatch(path.name) and ask.format is None or ask.format == "easyedit":
        return easyedit_folder(ask)
    if (path / "direction.pt").is_file() and ask.format in (None, "refusal_direction"):
        inner = dataclasses.replace(ask, path=path / "direction.pt", format="refusal_direction")
        return _torch(inner, read_torch(inner.path))
    matches = {p: m for p in sorted(path.iterdir()) if (m := CAA_FILE.fullmatch(p.name))}
    matches = {p: m for p, m in matches.items() if ask.name in (None, m.group(2))}
    models = {str(m.group(2)) for m in matches.values()}
    if not matches or ask.format not in (None, "caa"):
        names = ", ".join(sorted(p.name for p in path.iterdir())[:8])
        raise UserError(f"this folder fits no known format: it holds {names or 'nothing'}. Name one file")
    if len(models) > 1 or len({int(m.group(1)) for m in matches.values()}) < len(matches):
        raise UserError(
            f"this folder holds vectors of several models: choose one with --name: {', '.join(sorted(models))}"
        )
    by_layer = {}
    for file, match in matches.items():
        array = read_torch(file)
        if not isinstance(array, np.ndarray) or array.ndim != 1:
            raise UserError(f"{file.name} holds {describe(array)}; expected one tensor [D]")
        by_layer[int(match.group(1))] = array
    arrays = {resid_site(i): by_layer[i] for i in sorted(by_layer)}
    return caa_vectors(dataclasses.replace(ask, name=None), arrays, models.pop())
