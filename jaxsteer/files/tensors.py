"""safetensors files of ours: every tensor and the metadata, as NumPy has them."""

from __future__ import annotations

import os

import ml_dtypes  # noqa: F401  (makes bfloat16 known to NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open

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
