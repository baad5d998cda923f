"""Files in the layout of ``torch.save``, written without torch: a ZIP by zipfile, a pickle opcode by opcode."""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor as torch stores it: a piece of a storage, offset and strides in elements."""

    storage: np.ndarray
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    parameter: bool = False
    kind: str | None = None
    numel: int | None = None
    key: str | None = None


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes that leave one object on the stack."""

    code: bytes


def parameter(array: np.ndarray) -> View:
    """A contiguous ``torch.nn.Parameter``."""
    view = contiguous(array)
    return dataclasses.replace(view, parameter=True)


def contiguous(array: np.ndarray) -> View:
    """The tensor whose storage is the array."""
    array = np.ascontiguousarray(array)
    strides = tuple(s // array.itemsize for s in array.strides)
    return View(array.reshape(-1), array.shape, strides)


def reference(view: View, key: str) -> bytes:
    """The persistent id of a view's storage."""
    kind = view.kind or STORAGES[view.storage.dtype.name]
    numel = view.storage.size if view.numel is None else view.numel
    parts = opcodes("storage", {}) + GLOBAL("torch", kind) + opcodes(view.key or key, {}) + opcodes("cpu", {})
    return b"(" + parts + opcodes(numel, {}) + b"tQ"


def GLOBAL(module: str, name: str) -> bytes:  # noqa: N802
    """The opcode of that name."""
    return f"c{module}\n{name}\n".encode()


def opcodes(value: Any, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    """Opcodes that push ``value``; storages are noted by identity, so that views may share one."""

    def many(values: Any) -> bytes:
        return b"".join(opcodes(v, storages) for v in values)

    if isinstance(value, Raw):
        return value.code
    if isinstance(value, np.ndarray):
        return opcodes(contiguous(value), storages)
    if isinstance(value, View):
        key, _ = storages.setdefault(id(value.storage), (str(len(storages)), value.storage))
        arguments = [value.offset, value.size, value.stride, False]
        code = GLOBAL("torch._utils", "_rebuild_tensor_v2") + b"(" + reference(value, key) + many(arguments)
        code += opcodes(OrderedDict(), storages) + b"tR"
        if value.parameter:
            code = GLOBAL("torch._utils", "_rebuild_parameter") + b"(" + code + opcodes(True, {})
            code += opcodes(OrderedDict(), storages) + b"tR"
        return code
    if isinstance(value, OrderedDict):
        code = GLOBAL("collections", "OrderedDict") + b")R(" + many(x for pair in value.items() for x in pair) + b"u"
        # A state dict carries this attribute.
        return code + b"}(" + many(["_metadata", {}]) + b"ub" if value else code
    if isinstance(value, dict):
        return b"}(" + many(x for pair in value.items() for x in pair) + b"u"
    if isinstance(value, list):
        return b"](" + many(value) + b"e"
    if isinstance(value, tuple):
        return b"(" + many(value) + b"t"
    return pickle.dumps(value, 2)[2:-1]  # None, numbers and strings need no global


def write(path: Path, value: Any, *, stem: str = "archive", **options: Any) -> Path:
    """``torch.save(value, path)``."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    code = b"\x80\x02" + opcodes(value, storages) + b"."
    return write_raw(path, code, {key: data.tobytes() for key, data in storages.values()}, stem=stem, **options)


def write_raw(
    path: Path,
    code: bytes,
    storages: dict[str, bytes] | None = None,
    *,
    stem: str = "archive",
    byteorder: str | None = "little",
    compression: int = zipfile.ZIP_STORED,
    more: dict[str, bytes] | None = None,
) -> Path:
    """A file with this pickle and these storages."""
    entries = {f"{stem}/data.pkl": code, f"{stem}/version": b"3\n"}
    if byteorder is not None:
        entries[f"{stem}/byteorder"] = byteorder.encode()
    entries |= {f"{stem}/data/{key}": data for key, data in (storages or {}).items()} | (more or {})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())
    return path


def string(text: str) -> bytes:
    """BINUNICODE."""
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw
