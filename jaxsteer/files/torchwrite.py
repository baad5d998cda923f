"""Files that ``torch.load`` reads as one tensor, written without torch."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxsteer.files.whole import write_bytes


def write_torch(path: Path, array: Float[np.ndarray, ...]) -> None:
    """``torch.save`` of a float32 tensor, whole or not at all: a ZIP with the tensor's bytes and a pickle of opcodes
    that call what rebuilds it."""
    array = np.ascontiguousarray(array, "<f4")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + _int(array.size) + b"tQ"
    numbers = _int(0) + _ints(array.shape) + _ints(strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89" + hooks + b"tR."
    entries = {"data.pkl": code, "byteorder": b"little", "data/0": array.tobytes(), "version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)  # one date: the same file every time
    write_bytes(path, buffer.getvalue())


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _ints(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
