"""NumPy's ``.npy`` and ``.npz``: nothing is unpickled, and nothing is allocated that the file does not hold."""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import FileError, UserError, first_line
from jaxsteer.files.whole import reading, write_bytes

_EXPANDED, _SLACK = 16, 1 << 28
"""Compressed archives may expand to so many times their size, and to this many bytes more."""
_KINDS = "biufV"
_FAULTS = (ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of numbers in a ``.npy`` file. Raises ``UserError`` for any other file, and for a damaged one."""
    path = Path(path)
    try:
        with reading(path), path.open("rb") as file:
            return _array(file, os.fstat(file.fileno()).st_size, _KINDS)
    except FileError:
        raise
    except _FAULTS as error:
        raise UserError(f"{path} is no readable .npy file of numbers: {error}.") from error


def read_npz(path: str | os.PathLike[str], *, texts: bool = False) -> dict[str, np.ndarray]:
    """The arrays of numbers, and with ``texts`` of text, in a ``.npz`` file. Raises as ``read_npy``."""
    path, kinds = Path(path), _KINDS + "U" * texts
    try:
        with reading(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            size = os.fstat(file.fileno()).st_size
            if sum(entry.file_size for entry in entries) > _EXPANDED * size + _SLACK:
                raise ValueError(f"its arrays together would be more than {_EXPANDED} times larger than the file")
            arrays: dict[str, np.ndarray] = {}
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"the array {name!r} occurs twice")
                with archive.open(entry) as stream:
                    arrays[name] = _array(stream, entry.file_size, kinds)  # type: ignore[arg-type]
            return arrays
    except FileError:
        raise
    except _FAULTS as error:
        raise UserError(f"{path} is no readable .npz file of plain NumPy arrays: {error}.") from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A compressed ``.npz`` of arrays by name, whole or not at all; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict[str, Any](arrays))
    write_bytes(path, buffer.getvalue())


def _array(file: io.BufferedIOBase, size: int, kinds: str) -> np.ndarray:
    """The array in a stream of ``size`` bytes; its header is believed only as far as the bytes go."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format has version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # the header is an expression, and NumPy parses it with Python's own parser
        raise ValueError(f"its header cannot be read: {first_line(error)}") from error
    if dtype.kind not in kinds or dtype.hasobject or dtype.names is not None:
        raise ValueError(f"it holds {dtype}, which are no numbers")
    if not all(type(length) is int for length in shape):  # NumPy takes True for 1
        raise ValueError(f"its header says the shape {shape}")
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or nbytes != size - file.tell():
        raise ValueError(f"its header says {dtype} {shape}, {nbytes} bytes, and {size - file.tell()} follow")
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise ValueError(f"it ends after {len(data)} of {nbytes} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
