"""GGUF files: their header, read with every length checked before anything is made of it, and float32 tensors.

The sizes and the arithmetic of quantised types are those of the ``gguf`` package. Its reader is not used: it compares
no length with that of the file, and makes an object of every token of a vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files.whole import reading, write_bytes

F32 = 0
"""The ggml type of plain float32 tensors."""
_ALIGNMENT = 32
_MAX_VALUES = 1 << 22
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFEntry:
    """A tensor in a GGUF file: its ggml type, its shape in the order of NumPy, and the bytes that it takes."""

    kind: int
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file."""
    nbytes: int


def read_gguf_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
    """Keys and tensors of a GGUF file of version 2 or 3. Raises ``UserError`` for a damaged or truncated file."""
    path = Path(path)
    with reading(path), path.open("rb") as file:
        return _Reader(path, file, os.fstat(file.fileno()).st_size).read()


def read_gguf(
    path: str | os.PathLike[str], *, architecture: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and float32 tensors of a GGUF file.

    Raises ``UserError`` for a damaged or truncated file, another ``architecture`` than the one that is expected, and
    tensors of another type.
    """
    keys, entries = read_gguf_header(path)
    if architecture not in (None, found := keys.get("general.architecture")):
        raise UserError(f"{path} has general.architecture {found!r}, expected {architecture!r}")
    for name, entry in entries.items():
        if entry.kind != F32:
            raise UserError(f"{path}: tensor {name!r} has ggml type {entry.kind}, expected 0 (F32)")
    arrays = {
        name: np.fromfile(path, "<f4", math.prod(entry.shape), offset=entry.offset).reshape(entry.shape)
        for name, entry in entries.items()
    }
    return keys, arrays


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
        out.append(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, F32, offset))
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
        self.path, self.file, self.size, self.counted = path, file, size, 0

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
        self.count(count)
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))
        return [self.value(kind) for _ in range(count)]

    def count(self, more: int) -> None:
        """Refuse files of more keys, values and tensors than any that is made."""
        self.counted += more
        if self.counted > _MAX_VALUES:
            raise self.damaged(f"it announces {self.counted:,} keys, values and tensors, more than {_MAX_VALUES:,}")

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
        if self.take(4) != b"GGUF":
            raise self.damaged("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            big = ": it is big-endian" if version in (2 << 24, 3 << 24) else ""
            raise UserError(f"{self.path} has version {version} of GGUF, expected 2 or 3 (little-endian){big}")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        self.count(n_tensors + n_keys)
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in keys:
                raise self.damaged(f"the key {key!r} occurs twice")
            keys[key] = self.entry()
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.number("I")
            if name in found or n_dims > 4:
                raise self.damaged(f"the tensor {name!r} occurs twice or has {n_dims} dimensions")
            dims = tuple(self.number("Q") for _ in range(n_dims))
            found[name] = self.number("I"), dims[::-1], self.number("Q")
        alignment = keys.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 1 << 16:
            raise self.damaged(f"general.alignment is {alignment!r}, expected a multiple of 8")
        if odd := next((name for name, (_, _, offset) in found.items() if offset % alignment), None):
            raise self.damaged(f"the offset of tensor {odd!r}, {found[odd][2]}, is no multiple of {alignment}")
        start = -(-self.file.tell() // alignment) * alignment
        entries = {name: self.placed(name, *where, start) for name, where in found.items()}
        end, before = start, ""
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            if entry.offset < end:
                raise self.damaged(f"the tensors {before!r} and {name!r} overlap")
            end, before = entry.offset + entry.nbytes, name
        return keys, entries

    def placed(self, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int) -> GGUFEntry:
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise UserError(f"{self.path}: tensor {name!r} has ggml type {kind}, which the gguf package does not know")
        block, width = sizes[kind]
        if shape and shape[-1] % block:
            raise self.damaged(f"the rows of tensor {name!r}, {shape[-1]} values, are no multiple of {block}")
        nbytes = math.prod(shape) // block * width
        if start + offset + nbytes > self.size:
            raise self.damaged(f"the tensor {name!r} ends at byte {start + offset + nbytes} of {self.size}")
        return GGUFEntry(kind=kind, shape=shape, offset=start + offset, nbytes=nbytes)
