"""GGUF control vectors of llama.cpp, repeng and EasySteer: read with every length checked, and written.

The ``gguf`` package reads and writes whole models: it maps files into memory without comparing lengths and brings an
HTTP client along. A control vector needs a page of struct, and ``gguf`` is the oracle in the tests.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import write_bytes
from jaxsteer.models.sites import resid_site
from jaxsteer.steer.vectors import Vectors

log = logging.getLogger(__name__)

ARCHITECTURE = "controlvector"
OURS = f"{ARCHITECTURE}.jaxsteer."
"""Prefix of our own keys; all are strings."""
_OWN = ("sign", "model", "fingerprint", "read_position", "source_format")
# Files of the same tensors whose vectors are to be projected out exist ("GLP"), and say so in keys of their own.
_SAYS_WHAT_FOR = re.compile(r"(^|\.)(operation|mode|action|glp)(\.|$)")

_ALIGNMENT = 32
_F32 = 0
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
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
                f"{path} says {key} = {value!r}, and a control vector is added. If you know what its vectors are for, "
                f"read them with jaxsteer.steer.gguf.read_gguf and make Vectors of that operation"
            )
    numbered = {}
    for name, array in tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or array.ndim != 1:
            raise UserError(f"{path} has a tensor {name!r} of shape {array.shape}; expected direction.<block>, 1-D")
        numbered[int(match.group(1))] = array
    if not numbered or len({len(array) for array in numbered.values()}) != 1:
        raise UserError(f"{path} holds vectors of widths {sorted({len(a) for a in numbered.values()})}; expected one")
    sites = {i: resid_site(i) for i in sorted(numbered)}
    own = {key.removeprefix(OURS): str(value) for key, value in keys.items() if key.startswith(OURS)}
    try:
        norms = {sites[int(i)]: float(norm) for i, norm in json.loads(own.pop("mean_resid_norm", "{}")).items()}
        recipe = {str(key): str(value) for key, value in json.loads(own.pop("metadata", "{}")).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its keys {OURS}* do not fit its vectors ({error!r})") from error
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
    array, scale = vectors.arrays[site], np.float32(vectors.coefficient)
    if vectors.coefficient_units == "mean_resid_norm":
        scale = np.float32(vectors.coefficient * vectors.stream_norm(site) / max(float(np.linalg.norm(array)), 1e-30))
    return array * scale


def read_gguf(
    path: str | os.PathLike[str], *, architecture: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and float32 tensors of a GGUF file of version 2 or 3; dimensions in the order of NumPy.

    Raises ``UserError`` for a damaged or truncated file, another ``architecture`` than the one that is expected, and
    tensors of another type.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).read(architecture)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def write_gguf(path: str | os.PathLike[str], keys: Mapping[str, str | int], tensors: Mapping[str, np.ndarray]) -> None:
    """Write strings and 32-bit counts as keys, and float32 tensors, whole or not at all."""
    out = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        out.append(_string(key))
        out.append(struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + _string(value))
    offset, data = 0, []
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        dims = array.shape[::-1]
        out.append(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _F32, offset))
        data.append(raw + bytes(-len(raw) % _ALIGNMENT))
        offset += len(data[-1])
    head = b"".join(out)
    write_bytes(path, head + bytes(-len(head) % _ALIGNMENT) + b"".join(data))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


class _Reader:
    """Reads forward; nothing is taken that the file does not have."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self.path} is damaged or no GGUF file: {why}")

    def take(self, n: int) -> bytes:
        left = self.size - self.file.tell()
        if n > left:
            raise self.damaged(f"{n} bytes are due at byte {self.file.tell()}, and {left} are left")
        return self.file.read(n)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string is not UTF-8 ({error})") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        raise self.damaged(f"a key has the value type {kind}")

    def entry(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self.value(kind)
        kind, count = self.number("I"), self.number("Q")
        return [self.value(kind) for _ in range(count)]  # a count that is too large ends at the end of the file

    def read(self, architecture: str | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if self.take(4) != b"GGUF":
            raise self.damaged("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            big = ": it is big-endian" if version in (2 << 24, 3 << 24) else ""
            raise UserError(f"{self.path} has version {version} of GGUF, expected 2 or 3 (little-endian){big}")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in keys:
                raise self.damaged(f"the key {key!r} occurs twice")
            keys[key] = self.entry()
        if architecture not in (None, found := keys.get("general.architecture")):
            raise UserError(f"{self.path} has general.architecture {found!r}, expected {architecture!r}")
        places: dict[str, tuple[tuple[int, ...], int]] = {}
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.number("I")
            if name in places or n_dims > 4:
                raise self.damaged(f"the tensor {name!r} occurs twice or has {n_dims} dimensions")
            dims = tuple(self.number("Q") for _ in range(n_dims))
            kind, offset = self.number("I"), self.number("Q")
            if kind != _F32:
                raise UserError(f"{self.path}: tensor {name!r} has ggml type {kind}, expected 0 (F32)")
            places[name] = dims[::-1], offset
        alignment = keys.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 16:
            raise self.damaged(f"general.alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        if 4 * sum(math.prod(shape) for shape, _ in places.values()) > self.size:
            raise self.damaged("its tensors together are larger than the file")
        return keys, {name: self.tensor(name, shape, start + at) for name, (shape, at) in places.items()}

    def tensor(self, name: str, shape: tuple[int, ...], at: int) -> np.ndarray:
        if at > self.size:
            raise self.damaged(f"the tensor {name!r} begins at byte {at} of {self.size}")
        self.file.seek(at)
        return np.frombuffer(self.take(4 * math.prod(shape)), "<f4").reshape(shape).astype(np.float32)
