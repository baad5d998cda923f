"""GGUF files of float32 tensors: read with every length checked, and written whole or not at all.

The ``gguf`` package reads and writes whole models: it maps files into memory without comparing lengths and brings an
HTTP client along. A control vector needs a page of struct, and ``gguf`` is the oracle in the tests.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files.whole import write_bytes

_ALIGNMENT = 32
_F32 = 0
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


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
