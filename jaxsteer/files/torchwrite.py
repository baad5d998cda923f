"""Files that ``torch.load`` reads, written without torch."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files.whole import write_bytes

_SMALL = 1 << 31


def write_torch(path: Path, value: Any) -> None:
    """``torch.save`` of a float32 tensor, or of tensors, texts and numbers in dicts and lists: whole or not at all.

    Arrays become float32; keys are texts. The file is a ZIP with the bytes of each tensor and a pickle of opcodes that
    call what rebuilds them. The same value gives the same bytes. Raises ``UserError`` for other values, and for whole
    numbers of more than 32 bits.
    """
    tensors: list[bytes] = []
    code = b"\x80\x02" + _value(value, tensors) + b"."
    entries = {"data.pkl": code, "byteorder": b"little"}
    entries |= {f"data/{number}": data for number, data in enumerate(tensors)} | {"version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)  # one date: the same file every time
    write_bytes(path, buffer.getvalue())


def _value(value: Any, tensors: list[bytes]) -> bytes:
    """Opcodes that leave ``value`` on the stack; bytes of tensors are added to ``tensors``."""
    if isinstance(value, np.ndarray):
        return _tensor(value, tensors)
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int) and -_SMALL <= value < _SMALL:
        return _int(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, dict):
        return b"}(" + b"".join(_text(key) + _value(inner, tensors) for key, inner in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_value(inner, tensors) for inner in value) + b"e"
    raise UserError(f"a file of torch cannot be written with {str(value)[:60]!r} in it: {type(value).__name__}")


def _tensor(array: np.ndarray, tensors: list[bytes]) -> bytes:
    array = np.ascontiguousarray(array, "<f4")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    key = _text(str(len(tensors)))
    tensors.append(array.tobytes())
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + key + _text("cpu") + _int(array.size) + b"tQ"
    numbers = _int(0) + _ints(array.shape) + _ints(strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89" + hooks + b"tR"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _ints(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
