"""safetensors files of ours: every tensor and the metadata, as NumPy has them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (makes bfloat16 known to NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path


def read_tensors(path: str | os.PathLike[str], what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name and metadata of a safetensors file that should be a ``what``.

    Raises ``UserError`` for a missing or damaged file, one that is not regular, and dtypes that NumPy does not have.
    """
    path = user_path(path)
    if not path.exists():
        raise UserError(f"there is no {what} {path}")
    if not path.is_file():
        raise UserError(f"{path} is no regular file: expected a {what} (.safetensors)")
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                try:
                    tensors[name] = file.get_tensor(name)
                except (AttributeError, TypeError, SafetensorError) as error:  # NumPy has no dtype of this name
                    dtype = file.get_slice(name).get_dtype()
                    raise UserError(f"{path}: the tensor {name!r} has dtype {dtype}, expected F32") from error
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def tensor_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file. The same tensors and metadata always give the same bytes.

    The library writes the metadata in an order that it draws anew each time; here they are sorted.
    """
    whole = save(dict(tensors), dict(metadata) if metadata else None)
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    if (given := header.pop("__metadata__", None)) is not None:
        header = {"__metadata__": dict(sorted(given.items())), **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]
