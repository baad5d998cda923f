"""The leaves of a converted checkpoint: every one is a Zarr array of its own, listed in an index.

``weights/embed``, ``weights/layers/007/q`` ...; ``checkpoints_convert.streaming`` writes them,
``jaxsteer.checkpoints.restoring`` puts them on devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError, first_line
from jaxsteer.files import read_json
from jaxsteer.models.config import ModelConfig

RECORD = "jaxsteer.json"
"""What a converted checkpoint says of itself."""
WEIGHTS = "weights"
DTYPES = ("float32", "float16", "bfloat16")
Leaf = tuple[str, ...]
"""Path of a leaf in the checkpoint: ("embed",) or ("layers", "007", "q")."""


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The record of a converted checkpoint, with what loading needs: a config, the stored dtype, the fingerprint.

    Raises ``UserError`` for a directory that has none, and for one that was damaged.
    """
    record = read_json(checkpoint / RECORD)
    if record.get("format") != "jaxsteer-checkpoint" or not {"config", "dtype", "fingerprint"} <= record.keys():
        raise UserError(f"{checkpoint / RECORD} is not the record of a converted checkpoint. Convert it again.")
    try:
        if not isinstance(record["config"], dict):
            raise TypeError("its config is no object")
        ModelConfig.from_json(record["config"])
        if record["dtype"] not in DTYPES:
            raise ValueError(f"the dtype {record['dtype']!r} is none of {', '.join(DTYPES)}")
        for name, kind in (("fingerprint", str), ("ignored_tensors", list), ("ignored_config_fields", list)):
            if not isinstance(record.get(name, kind()), kind):
                raise ValueError(f"{name} is {record[name]!r}")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{checkpoint / RECORD} is damaged: {error}. Convert the model again.") from error
    return record


def read_index(weights: Path) -> dict[str, str]:
    """Leaf ("embed", "layers/007/q") -> the sha256 of its values."""
    if not (weights / "index.json").is_file():
        raise UserError(
            f"The checkpoint {weights.parent} cannot be read: it has no weights/index.json. It is damaged, or an older "
            f"version of jaxsteer wrote it. Convert the model again."
        )
    index = read_json(weights / "index.json")
    if strange := [name for name, digest in index.items() if not isinstance(digest, str)]:
        raise UserError(f"{weights / 'index.json'} is damaged: {strange[0]!r} has no hash. Convert the model again.")
    return index


def open_leaf(weights: Path, leaf: Leaf, shape: tuple[int, ...]) -> Any:
    """The ``tensorstore.TensorStore`` of a stored leaf, which must have the shape ``shape``. Raises ``UserError``."""
    return finish_opening(weights, leaf, shape, start_opening(weights, leaf))


def start_opening(weights: Path, leaf: Leaf, url: str | None = None) -> Any:
    """A future of an opened leaf. In an object store each takes a while, so that all are opened at once."""
    import tensorstore as ts

    path = weights.joinpath(*leaf).absolute()
    where = {"driver": "file", "path": f"{path}/"} if url is None else f"{url}/{'/'.join(leaf)}/"
    # A chunk that is missing would else be read as zeros.
    return ts.open({"driver": "zarr", "kvstore": where, "fill_missing_data_reads": False}, read=True)


def finish_opening(weights: Path, leaf: Leaf, shape: tuple[int, ...], opening: Any) -> Any:
    """The opened leaf, which must have the shape ``shape``. Raises ``UserError``."""
    store = wait_for(weights, leaf, opening)
    if store.shape != shape:
        raise UserError(
            f"The checkpoint {weights.parent} cannot be read: its leaf {'/'.join(leaf)} is stored as "
            f"{list(store.shape)}, and a model of this config has {list(shape)}. Convert the model again."
        )
    return store


def wait_for(weights: Path, leaf: Leaf, future: Any) -> Any:
    """What TensorStore gives. Raises ``UserError`` for a damaged array."""
    try:
        return future.result()
    except (ValueError, OSError, NotImplementedError) as error:  # TensorStore's, for a damaged array
        reason = first_line(error)
        raise UserError(
            f"The checkpoint {weights.parent} cannot be read at {'/'.join(leaf)} ({reason}). Convert the model again."
        ) from error


def read_rows(weights: Path, leaf: Leaf, store: Any, rows: slice) -> np.ndarray:
    """Rows of an opened leaf, in the dtype that is stored. Raises ``UserError`` when they cannot be read."""
    return wait_for(weights, leaf, store[rows].read())
