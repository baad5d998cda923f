"""Vectors of other tools: which format a file has, what its indices mean, and where its signs point (docs/vectors.md).

A shift by one block does not fail, it degrades; so every import names its sites in full and notes in the metadata what
an index of the source meant (``index_meaning``), beside the ``sign``. What a file does not say is not guessed: it is
asked for (``site``) or noted as unknown.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import describe, read_json, read_torch, reading
from jaxsteer.files.npz import read_npy
from jaxsteer.files.paths import user_path
from jaxsteer.models.sites import KINDS, parse_site, resid_site
from jaxsteer.steer.capping import CAP_SIGN, caps_of, check_against_axis
from jaxsteer.steer.gguf import read_control_vector
from jaxsteer.steer.vectors import Vectors, load_vectors

Format = Literal[
    "jaxsteer", "gguf", "persona_vectors", "assistant_axis", "capping", "refusal_direction", "svec", "caa", "bare"
]
FORMATS: tuple[str, ...] = get_args(Format)

AFTER_BLOCK = "index i is the output of block i"
UNKNOWN_SIGN = "not stated by the file: try both, or give --sign"
TO_ASSISTANT = "towards the Assistant: mean(default) - mean(roles)"
_PERSONA_FILE = re.compile(r".+_(prompt_avg|response_avg|prompt_last)_diff\.pt")
_AXIS_FOLDERS = ("role_vectors", "trait_vectors")
_CAA_FILE = re.compile(r"vec_layer_(\d+)(?:_(.+))?\.pt")
_PER_HEAD = ("num_heads", "head_dim", "probe_accuracies")


def import_vectors(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    site: str | None = None,
    name: str | None = None,
    sign: str | None = None,
) -> Vectors:
    """Vectors from a file (or a folder of refusal_direction or CAA) of any tool in ``FORMATS``.

    The format is told by keys and shapes, then by file names; ``format`` decides where they do not. ``site`` says
    where a bare vector belongs, and chooses one of several vectors elsewhere. ``name`` chooses the experiment of a
    capping configuration, the position (-1, -2 ...) of mean_diffs.pt, the model in a folder of CAA, or the entry of a
    dict. ``sign`` says what going
    along the vector means. Raises ``UserError`` for a file that cannot be read, that fits no format (with its keys and
    shapes) or several.
    """
    path = user_path(path)
    ask = _Ask(path=path, format=format, site=site, name=name, sign=sign)
    try:
        found = _recognise(ask)
        return found if site is None else found.at(site)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ask:
    """The arguments of ``import_vectors``."""

    path: Path
    format: str | None
    site: str | None
    name: str | None
    sign: str | None

    def vectors(
        self, arrays: dict[str, np.ndarray], source: str, sign: str, index: str, *, named: bool = False, **more: Any
    ) -> Vectors:
        """The result: float32, with its notes."""
        if self.name is not None and not named:
            raise UserError(f"--name {self.name!r} chooses nothing in a file of format {source}")
        metadata = {"index_meaning": index, "source_file": self.path.name, **more.pop("metadata", {})}
        with np.errstate(over="ignore"):  # what is infinite is refused below
            arrays = {site: np.array(array, np.float32) for site, array in arrays.items()}
        return Vectors(
            arrays=arrays,
            sign=self.sign or sign,
            source_format=source,
            metadata={key: text for key, text in metadata.items() if text},
            **more,
        )

    def as_read(self, found: Vectors) -> Vectors:
        """The result of a format that carries its own notes."""
        if self.name is not None:
            raise UserError(f"--name {self.name!r} chooses nothing in this file; --site does")
        return dataclasses.replace(found, sign=self.sign or found.sign)


def _recognise(ask: _Ask) -> Vectors:
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
        return _svec(ask)
    return _torch(ask, read_torch(path))


def _agree(ask: _Ask, found: str) -> None:
    if ask.format not in (None, found):
        raise UserError(f"this is a file of format {found!r}, not {ask.format!r}")


def _torch(ask: _Ask, data: Any) -> Vectors:
    """What ``read_torch`` found: one tensor, or a dict that is known by its keys."""
    if isinstance(data, np.ndarray):
        return _tensor(ask, data)
    keys = set(data) if isinstance(data, dict) else set()
    if {"vectors", "experiments"} <= keys:
        _agree(ask, "capping")
        return _capping(ask, data)
    if "axis" in keys and keys <= {"axis", "metadata"}:
        _agree(ask, "assistant_axis")
        note = {"axis_metadata": json.dumps(data.get("metadata"), default=str)}
        return _assistant_axis(ask, data["axis"], TO_ASSISTANT, note)
    if {"vector", "type", "role"} <= keys:
        _agree(ask, "assistant_axis")
        note = {"role": str(data["role"]), "type": str(data["type"])}
        return _assistant_axis(ask, data["vector"], _role_sign(str(data["role"])), note)
    if ask.name is not None and ask.name in keys and isinstance(data[ask.name], np.ndarray):
        return _tensor(dataclasses.replace(ask, name=None), data[ask.name])
    raise UserError(
        f"this fits no known format. It holds {describe(data)}. Known are {', '.join(FORMATS)}; one tensor of a dict "
        f"is chosen with --name"
    )


def _tensor(ask: _Ask, array: np.ndarray) -> Vectors:
    """One tensor, told by its shape and then by the name of its file."""
    if array.dtype.kind not in "fiV" and array.dtype.name != "bfloat16":
        raise UserError(f"this holds {describe(array)}, which are no vectors")
    found = ask.format or _by_shape(ask, array)
    readers: dict[str, tuple[tuple[int, ...], Callable[[_Ask, np.ndarray], Vectors]]] = {
        "persona_vectors": ((2,), _persona_vectors),
        "assistant_axis": ((2,), _axis_by_name),
        "refusal_direction": ((1, 3), lambda a, x: _mean_diffs(a, x) if x.ndim == 3 else _refusal(a, x)),
        "caa": ((1,), _caa),
        "bare": ((1, 2), _bare),
    }
    if found not in readers or array.ndim not in readers[found][0]:
        raise UserError(f"this holds {describe(array)}, which is no file of format {found!r}")
    return readers[found][1](ask, array)


def _by_shape(ask: _Ask, array: np.ndarray) -> str:
    path = ask.path
    if array.ndim == 3:
        return "refusal_direction"
    if array.ndim == 2 and not (ask.site is not None and KINDS[parse_site(ask.site).kind].heads):
        if _PERSONA_FILE.fullmatch(path.name):
            return "persona_vectors"
        if path.name in ("assistant_axis.pt", "default_vector.pt") or path.parent.name in _AXIS_FOLDERS:
            return "assistant_axis"
        raise UserError(
            f"this holds {describe(array)}, and the name of the file does not tell what a row is. Say --format "
            f"persona_vectors (row i is hidden_states[i], the output of block i-1; L + 1 rows) or --format "
            f"assistant_axis (row i is the output of block i; L rows): a shift by one goes unnoticed"
        )
    if array.ndim == 1 and ask.site is None:
        if path.name == "direction.pt" and (path.parent / "direction_metadata.json").is_file():
            return "refusal_direction"
        if _CAA_FILE.fullmatch(path.name):
            return "caa"
    return "bare"


def _rows(array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.size:
        raise UserError(f"expected one tensor [layers, D], got {describe(array)}")
    return array


def _persona_vectors(ask: _Ask, array: np.ndarray) -> Vectors:
    """[L+1, D] by ``hidden_states``: the embedding, the outputs of blocks 0 ... L-2, and the normalised last one."""
    rows = _rows(array)
    if len(rows) < 2:
        raise UserError(f"expected L + 1 rows, got {describe(array)}")
    match = _PERSONA_FILE.fullmatch(ask.path.name)
    return ask.vectors(
        {"hook_embed": rows[0], **{resid_site(i - 1): rows[i] for i in range(1, len(rows) - 1)}},
        "persona_vectors",
        "towards the trait: mean(positive instruction) - mean(negative instruction)",
        f"row i was hidden_states[i], the output of block i-1, and row 0 the embedding; row {len(rows) - 1}, which "
        f"comes after the final norm, was dropped",
        read_position=match.group(1) if match else "",
        metadata={"n_layers": str(len(rows) - 1)},
    )


def _axis_by_name(ask: _Ask, array: np.ndarray) -> Vectors:
    """[L, D]: the axis where the file says so; else the mean activation of a role, which contrasts with nothing."""
    name, folder = ask.path.stem, ask.path.parent.name
    is_axis = folder not in _AXIS_FOLDERS and "default_vector" not in name
    return _assistant_axis(ask, array, TO_ASSISTANT if is_axis else _role_sign(name), {})


def _role_sign(role: str) -> str:
    return f"mean activation of {role!r}, not a contrast: subtract that of default_vector.pt before steering"


def _assistant_axis(ask: _Ask, array: Any, sign: str, note: dict[str, str]) -> Vectors:
    rows = _rows(array)
    return ask.vectors(
        {resid_site(i): row for i, row in enumerate(rows)},
        "assistant_axis",
        sign,
        "row i was the output of block i",
        read_position="mean over the tokens of the answer",
        metadata={"n_layers": str(len(rows)), **note},
    )


def _refusal(ask: _Ask, array: np.ndarray) -> Vectors:
    """direction.pt [D]; its layer and position stand beside it."""
    note = read_json(ask.path.parent / "direction_metadata.json") if ask.site is None else {}
    layer, position = note.get("layer"), note.get("pos")
    if ask.site is None and (type(layer) is not int or layer < 0):
        raise UserError("direction_metadata.json beside it gives no layer: name the --site")
    return ask.vectors(
        {f"blocks.{layer}.hook_resid_pre" if ask.site is None else parse_site(ask.site).name: array},
        "refusal_direction",
        "towards refusal: mean(harmful) - mean(harmless)",
        "layer i was the input of block i",
        read_position=f"token {position} of the template's end of instruction" if position is not None else "",
        metadata={
            "published_use": "ablated at the input, attention output and MLP output of every block "
            "(jaxsteer.steer.ablate_everywhere), or added at the input of this block"
        },
    )


def _mean_diffs(ask: _Ask, array: np.ndarray) -> Vectors:
    """mean_diffs.pt [n_pos, L, D]; one position is chosen."""
    beside = ask.path.parent.parent / "direction_metadata.json"
    position = ask.name if ask.name is not None else read_json(beside).get("pos") if beside.is_file() else None
    known = [str(p) for p in range(-len(array), 0)]
    if str(position) not in known:
        raise UserError(
            f"this holds {describe(array)}: mean differences at {len(array)} positions. Choose one with --name=-1: "
            f"{', '.join(known)}, counted from the end of the instruction's template"
        )
    return ask.vectors(
        {f"blocks.{i}.hook_resid_pre": row for i, row in enumerate(array[int(str(position))])},
        "refusal_direction",
        "towards refusal: mean(harmful) - mean(harmless)",
        "layer i was the input of block i",
        read_position=f"token {position} of the template's end of instruction",
        named=True,
        metadata={"n_layers": str(array.shape[1])},
    )


def _caa(ask: _Ask, array: np.ndarray) -> Vectors:
    match = _CAA_FILE.fullmatch(ask.path.name)
    if match is None and ask.site is None:
        raise UserError("the name of the file is not vec_layer_<i>_<model>.pt: name the --site")
    site = parse_site(ask.site).name if ask.site is not None else resid_site(int(match.group(1))) if match else ""
    return _caa_vectors(ask, {site: array}, match.group(2) if match else None)


def _caa_vectors(ask: _Ask, arrays: dict[str, np.ndarray], model: str | None) -> Vectors:
    folders = {ask.path.name, ask.path.parent.name, ask.path.parent.parent.name}
    return ask.vectors(
        arrays,
        "caa",
        "towards the behaviour: mean(matching answer) - mean(other answer)",
        AFTER_BLOCK,
        model=model or "",
        read_position="the letter of the answer, token -2",
        metadata={"scaled": "per layer to the mean norm over behaviours" if "normalized_vectors" in folders else ""},
    )


def _bare(ask: _Ask, array: np.ndarray) -> Vectors:
    """A vector of which nothing is known."""
    if ask.site is None:
        raise UserError(
            f"this holds {describe(array)}, a bare vector. Say where it belongs, e.g. --site "
            f"blocks.14.hook_resid_post, and what going along it means (--sign)"
        )
    site = parse_site(ask.site)
    heads = KINDS[site.kind].heads
    if array.ndim != (2 if heads else 1):
        raise UserError(f"at {site.name} a vector is {'(heads, H)' if heads else '(D,)'}; this holds {describe(array)}")
    return ask.vectors({site.name: array}, "bare", UNKNOWN_SIGN, "the site was given at the import")


def _capping(ask: _Ask, data: dict[Any, Any]) -> Vectors:
    experiments = caps_of(data)
    if ask.name not in experiments:
        some = ", ".join(list(experiments)[:6])
        raise UserError(
            f"this holds {len(experiments)} capping experiments ({some} …): choose one with --name. The authors "
            f"recommend layers_46:54-p0.25 for Qwen3-32B and layers_56:72-p0.25 for Llama-3.3-70B"
        )
    caps = experiments[ask.name]
    sites = [cap.site for cap in caps]
    if not caps or len(set(sites)) < len(sites):
        raise UserError(
            f"the experiment {ask.name!r} has {len(caps)} caps at {len(set(sites))} sites, and a vector file holds one "
            f"for each: use jaxsteer.steer.read_capping"
        )
    axis = ask.path.parent / "assistant_axis.pt"
    checked = axis.is_file() and check_against_axis(caps, import_vectors(axis, format="assistant_axis").arrays)
    return ask.vectors(
        {cap.site: cap.vector for cap in caps},
        "capping",
        CAP_SIGN + (f"; the vectors do point against the axis in {axis.name}" if checked else ""),
        "layer i is the output of block i; ranges in the experiment's name are half open",
        operation="ceiling",
        values={cap.site: cap.value for cap in caps},
        positions="every",  # as the released code applies them
        named=True,
        metadata={"experiment": ask.name, "vector_names": json.dumps([cap.name for cap in caps])},
    )


def _svec(ask: _Ask) -> Vectors:
    """JSON of activation-steering and of AISteer360."""
    data = read_json(ask.path)
    if not isinstance(data.get("directions"), dict) or not data["directions"]:
        raise UserError(f"this is no .svec file: it holds {describe(data)}, expected a dict 'directions'")
    if heads := [key for key in _PER_HEAD if data.get(key)]:
        raise UserError(f"this holds directions of single heads ({', '.join(heads)}), which are not read")
    arrays, nested = {}, False
    for index, values in data["directions"].items():
        try:
            array = np.asarray(values, np.float64)
        except (ValueError, TypeError) as error:
            raise UserError(f"the direction {index!r} is not a list of numbers") from error
        nested |= array.ndim == 2
        array = array[0] if array.ndim == 2 and len(array) == 1 else array
        if not re.fullmatch(r"0|[1-9]\d{0,5}", index) or array.ndim != 1:
            raise UserError(
                f"the direction {index!r} has shape {array.shape}; expected one vector for a block's number"
            )
        arrays[int(index)] = array
    return ask.vectors(
        {resid_site(i): arrays[i] for i in sorted(arrays)},
        "svec (AISteer360)" if nested else "svec (activation-steering)",
        UNKNOWN_SIGN if nested else f"{UNKNOWN_SIGN}; a unit principal component of pairwise differences",
        AFTER_BLOCK
        + ("" if nested else ", where it was read; activation-steering itself adds it at the input of block i"),
        model=str(data.get("model_type") or ""),
        metadata={"explained_variances": json.dumps(data.get("explained_variances") or {})},
    )


def _folder(ask: _Ask) -> Vectors:
    """A folder of refusal_direction, or of CAA's files of one model."""
    path = ask.path
    if (path / "direction.pt").is_file() and ask.format in (None, "refusal_direction"):
        inner = dataclasses.replace(ask, path=path / "direction.pt", format="refusal_direction")
        return _torch(inner, read_torch(inner.path))
    matches = {p: m for p in sorted(path.iterdir()) if (m := _CAA_FILE.fullmatch(p.name))}
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
    return _caa_vectors(dataclasses.replace(ask, name=None), arrays, models.pop())
