"""``.pt``, ``.pth`` and ``.bin`` files of torch >= 1.6, read without torch and without running anything in them.

Such a file is an uncompressed ZIP: ``<stem>/data.pkl`` (a pickle of protocol 2), ``<stem>/data/<key>`` (raw storages)
and ``<stem>/byteorder``. A pickle can call any function of Python, so it is read in four steps, each of which refuses
what torch does not write for tensors in plain containers:

1. the ZIP: nothing compressed or overlapping, so that no entry is larger than the file; no odd names
2. the opcodes of the pickle, before any of them is run
3. the unpickler's ``find_class``: a table of names that stand for themselves, and no import ever
4. the result: arrays, numbers, strings, dicts, lists, tuples, and nothing else
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxsteer.errors import UserError

TORCH_ADVICE = (
    "Where torch is installed, load it with torch.load(path, weights_only=True) and write its tensors with "
    "safetensors.torch.save_file, or with torch.save as a plain dict of tensors"
)

_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_MAX_PICKLE = 1 << 26
_MAX_DEPTH = 64
_MAX_VALUES = 10_000_000
# Tensors may share a storage, and expanded ones repeat theirs: arrays may be somewhat larger than the file.
_SHARING, _EXPANDED = 4, 1 << 28

# What torch.save writes for tensors in plain containers, at its only protocol.
_OPCODES = frozenset(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE "
    "TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT "
    "GLOBAL REDUCE BUILD BINPERSID NEWOBJ".split()
)


_RECORDS = frozenset({"steering_vectors.steering_vector.SteeringVector"})
"""Classes that only hold fields, which are read without them."""


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote: tensors as read-only NumPy arrays in the dicts, lists and tuples that held them.

    Parameters become arrays, ordered dicts (state dicts) and records of fields (``_RECORDS``) plain ones, bfloat16 is
    that of ``ml_dtypes``; devices are forgotten. Views keep their storage, offset and strides; ``numpy.array(x)`` makes
    a copy that can be written to.

    Raises ``UserError`` for a missing or damaged file, one of torch before 1.6 or of another protocol, and for every
    object that is neither a tensor nor a plain container, by its name. Nothing in the file is ever executed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
            if start == _LEGACY:
                raise UserError(f"{path} was written by torch before 1.6, which cannot be read safely. {TORCH_ADVICE}.")
            if start.startswith(b"version https:"):
                raise UserError(f"{path} is a pointer of Git LFS, not the file itself: fetch that with git lfs pull")
            if not start.startswith(b"PK"):
                raise UserError(
                    f"{path} is not a file of torch: those are ZIP files, and this one begins with {start!r}"
                )
            with zipfile.ZipFile(file) as archive:
                return _Archive(path, archive).load()
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a file of torch: {error}") from error


# A pickle may set items and attributes of whatever it holds (opcodes SETITEM, BUILD). What it holds here has neither,
# and no ``__setstate__``, which a dataclass with slots=True would have.
@dataclasses.dataclass(frozen=True, eq=False)
class _Global:
    """What ``find_class`` returns instead of a class or a function."""

    __slots__ = ("name", "call")
    name: str
    call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    __slots__ = ("data",)
    data: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    __slots__ = ("data",)
    data: np.ndarray


class _Fields(dict):
    """Stands for an object of ``_RECORDS``: its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """What BUILD does with the attributes."""
        if type(state) is not dict:
            raise ValueError("the attributes of an object are not a dict")
        self.update(state)


class _Dict(dict):
    """Stands for ``OrderedDict``. Attributes (state dicts carry ``_metadata``) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Archive:
    """One open file, its entries checked."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.size = path.stat().st_size
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename
            if name.startswith("/") or "\\" in name or ".." in name.split("/") or name in self.entries:
                self.refuse(
                    f"its ZIP has the entry {name!r} (twice, or outside of its folder), which torch never writes"
                )
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                self.refuse(f"its entry {name!r} is compressed, which torch never does")
            self.entries[name] = info
        if sum(info.file_size for info in self.entries.values()) > self.size:
            self.refuse("its entries overlap: together they are larger than the file")
        stems = [name.removesuffix("/data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(stems) != 1:
            self.refuse(f"it holds {len(stems)} entries */data.pkl where a file of torch.save holds one")
        self.stem = stems[0]
        self.budget = _SHARING * self.size + _EXPANDED
        self.storages: dict[str, bytes] = {}
        order = self.read("byteorder") if f"{self.stem}/byteorder" in self.entries else b"little"
        if order not in (b"little", b"big"):
            self.refuse(f"its byte order is {order[:20]!r}, neither little nor big")
        self.swap = order.decode() != sys.byteorder

    def refuse(self, why: str) -> NoReturn:
        """Raise the error of a file that is refused."""
        shown = "".join(c if c.isprintable() else "?" for c in why[:400])  # names in the file may be of any length
        raise UserError(f"{self.path} is refused: {shown}{'…' if len(why) > 400 else ''}. {TORCH_ADVICE}.")

    def read(self, name: str) -> bytes:
        """One entry, whole, its checksum compared."""
        info = self.entries.get(f"{self.stem}/{name}")
        if info is None:
            self.refuse(f"its storage {name!r} is missing")
        return self.archive.read(info)

    def load(self) -> Any:
        """The object in the pickle."""
        if self.entries[f"{self.stem}/data.pkl"].file_size > _MAX_PICKLE:
            self.refuse(f"its pickle is larger than {_MAX_PICKLE >> 20} MiB, so that it holds more than tensors")
        data = self.read("data.pkl")
        try:
            self.check_opcodes(data)
            found = _Unpickler(io.BytesIO(data), self).load()
            return self.plain(found, 0, {})[0]
        except UserError:
            raise
        except Exception as error:  # the documentation of pickle: a damaged one may raise anything
            self.refuse(f"its pickle is damaged ({type(error).__name__}: {error})")

    def check_opcodes(self, data: bytes) -> None:
        """Refuse a pickle that holds other instructions than torch writes, before one of them is run."""
        end = 0
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                self.find(*str(argument).split(" ", 1))  # first, because a name tells more than what is done with it
            if opcode.name not in _OPCODES:
                what = f" {argument!r}" if argument is not None else ""
                self.refuse(f"its pickle has the instruction {opcode.name}{what}, which torch.save does not write")
            if opcode.name == "PROTO" and argument != 2:
                self.refuse(f"its pickle has protocol {argument}; torch.save writes protocol 2 unless told otherwise")
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data):  # memory is taken for all numbers below
                self.refuse(f"its pickle numbers an object {argument}, beyond its own length")
            end = (position or 0) + 1
        if end != len(data):
            self.refuse("its pickle goes on after its end")

    def storage(self, persistent_id: Any) -> _Storage:
        """The storage of a persistent id ``("storage", torch.<Kind>Storage, key, device, numel)``."""
        ok = type(persistent_id) is tuple and len(persistent_id) == 5 and persistent_id[0] == "storage"
        kind, key, numel = (persistent_id[1], persistent_id[2], persistent_id[4]) if ok else (None, None, None)
        if type(kind) is not _Global or type(key) is not str or type(numel) is not int or numel < 0:
            self.refuse(f"it holds the reference {_short(persistent_id)}, which is not one to a storage of tensors")
        dtype = _DTYPES.get(kind.name.removeprefix("torch."))
        if dtype is None:
            self.refuse(f"it uses {kind.name} as the kind of a storage")
        name = f"data/{key}"
        if key not in self.storages:
            self.storages[key] = self.read(name)
        raw = self.storages[key]
        if numel * dtype.itemsize > len(raw):
            self.refuse(f"its storage {name!r} has {len(raw)} bytes, too few for {numel} values of {dtype}")
        # Through integers of the same width: bfloat16 knows no byte order, and a bool may be 0 or 1 only.
        data = np.frombuffer(raw, f"u{dtype.itemsize}", numel)
        data = data.byteswap() if self.swap else data
        return _Storage(data != 0 if dtype == np.bool_ else data.view(dtype))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
        """``torch._utils._rebuild_tensor_v2``: a view of a storage; offset and strides count elements."""
        if type(storage) is not _Storage:
            self.refuse(f"it makes a tensor of {_short(storage)}, which is not a storage")
        if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 32:
            self.refuse(f"it has a tensor of size {_short(size)} and strides {_short(stride)}")
        if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            self.refuse(f"it has a tensor of size {size}, strides {stride} and offset {offset}: expected counts >= 0")
        data = storage.data
        if 0 in size:
            return _Tensor(np.empty(size, data.dtype))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= data.size:
            self.refuse(
                f"it has a tensor of size {size}, strides {stride} and offset {offset}, which ends at element {last} "
                f"of a storage of {data.size}"
            )
        self.budget -= math.prod(size) * data.itemsize
        if self.budget < 0:
            self.refuse("its tensors are many times larger than the file")
        view: np.ndarray = np.ndarray(
            size, data.dtype, data, offset * data.itemsize, tuple(step * data.itemsize for step in stride)
        )
        view.flags.writeable = False
        return _Tensor(view)

    def parameter(self, data: Any, requires_grad: Any, hooks: Any) -> _Tensor:
        """``torch._utils._rebuild_parameter``: its tensor."""
        if type(data) is not _Tensor:
            self.refuse(f"it makes a parameter of {_short(data)}, which is not a tensor")
        return data

    def find(self, module: str, name: str) -> _Global | type[_Fields]:
        """What stands for a global. Whole names are looked up, so that dotted ones find nothing."""
        full = f"{module}.{name}"
        if full in _RECORDS:
            return _Fields
        if full == "collections.OrderedDict":
            return _Global(full, lambda pairs=(): _Dict(pairs))
        if full == "torch._utils._rebuild_tensor_v2":
            return _Global(full, self.tensor)
        if full == "torch._utils._rebuild_parameter":
            return _Global(full, self.parameter)
        if module == "torch" and name in _DTYPES:
            return _Global(full, lambda *_: self.refuse(f"it calls {full}, which torch never does"))
        self.refuse(
            f"it holds {full}, and only tensors, numbers, strings and plain containers are read, because anything else "
            "could run code"
        )

    def plain(self, value: Any, depth: int, seen: dict[int, tuple[Any, int]]) -> tuple[Any, int]:
        """``value`` with ordered dicts made plain, and how many values a walk over it meets.

        A container is converted once, however often it occurs. One that holds itself ends at the depth; one whose parts
        are shared so often that nobody could walk over it ends at the count.
        """
        if value is None or type(value) in (bool, int, float, str):
            return value, 1
        if type(value) is _Tensor:
            return value.data, 1
        if depth > _MAX_DEPTH:
            self.refuse(f"its containers nest deeper than {_MAX_DEPTH}")
        if id(value) in seen:
            return seen[id(value)]
        if type(value) not in (list, tuple, dict, _Dict, _Fields):
            name = value.name if type(value) is _Global else type(value).__name__
            self.refuse(f"it holds {name} as a value, not as part of a tensor")
        is_dict = type(value) in (dict, _Dict, _Fields)
        inner = [part for item in value.items() for part in item] if is_dict else value
        parts = [self.plain(part, depth + 1, seen) for part in inner]
        values, size = [part for part, _ in parts], 1 + sum(n for _, n in parts)
        if size > _MAX_VALUES:
            self.refuse(f"its containers hold more than {_MAX_VALUES} values")
        made = dict(zip(values[::2], values[1::2], strict=True)) if is_dict else type(value)(values)
        seen[id(value)] = made, size
        return seen[id(value)]


class _Unpickler(pickle.Unpickler):
    """Knows the names in ``_Archive.find`` and nothing else; imports nothing."""

    def __init__(self, file: io.BytesIO, archive: _Archive) -> None:
        super().__init__(file)
        self._archive = archive

    def find_class(self, module_name: str, global_name: str) -> Any:
        return self._archive.find(module_name, global_name)

    def persistent_load(self, pid: Any) -> Any:
        return self._archive.storage(pid)


def _short(value: object) -> str:
    text = value.name if type(value) is _Global else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe(value: Any) -> str:
    """Keys, types and shapes of what ``read_torch`` returns, in a line: for the error where they fit nothing."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, dict):
        inner = [f"{_short(k)}: {_many(v) if isinstance(v, dict | list) else describe(v)}" for k, v in value.items()]
        return "{" + ", ".join(inner[:8]) + (f", … {len(inner) - 8} more" if len(inner) > 8 else "") + "}"
    return _many(value) if isinstance(value, list | tuple) else f"{type(value).__name__}"


def _many(value: Any) -> str:
    keys = f" of {', '.join(map(_short, list(value)[:3]))} …" if isinstance(value, dict) and value else ""
    return f"{type(value).__name__} of length {len(value)}{keys}"
