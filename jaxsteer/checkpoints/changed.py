"""A converted checkpoint with a delta in its weights: what ``load(source, delta=...)`` gives, as a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import lax

from checkpoints_convert.leaves import RECORD, WEIGHTS, open_leaf, read_index, read_record
from checkpoints_convert.names import expected_leaves, layer_key
from checkpoints_convert.streaming import INDEX, fingerprint
from checkpoints_convert.work_directory import LOCK, discard, sync, work_path
from jaxsteer.checkpoints.deltas import load_delta
from jaxsteer.checkpoints.loading import checkpoint_of
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, write_text
from jaxsteer.files.lock import hold_lock
from jaxsteer.files.stores import is_url
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sharding import stored_shape


def convert_with_delta(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    *,
    ignore_fields: Collection[str] = (),
) -> Path:
    """Make the checkpoint ``out`` of any model that ``load`` takes, with the delta in the file added to its weights.

    The dtype is the stored one; sums are float32 and rounded to it once. The checkpoint has the fingerprint of the
    changed model, as ``load(source, delta=...)`` has, so that vectors of the one are vectors of the other. ``out``
    appears only when it is complete; one changed matrix is in memory at a time. Raises ``UserError`` for a delta of
    other weights, sums that do not fit the dtype, and an ``out`` that exists or cannot be written.
    """
    if is_url(str(source)):
        raise UserError(
            f"{source} is in an object store: copy it to this machine first, then convert it with the delta"
        )
    change, out = load_delta(delta), Path(os.path.abspath(out))
    base = checkpoint_of(str(source), ignore_fields)
    record = read_record(base)
    config = ModelConfig.from_json(record["config"])
    change.check(str(source), config, record["fingerprint"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"The output {out} exists already. Choose another place, or remove it first.")
    work = work_path(out)
    made = work / "checkpoint"
    try:
        make_directory(out.parent)
        with hold_lock(work / LOCK):
            shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
            shutil.copytree(base, made)
            try:
                weights, index = made / WEIGHTS, read_index(made / WEIGHTS)
                for layer, (left, right) in change.factors.items():
                    leaf = ("layers", layer_key(layer), "down")
                    index["/".join(leaf)] = _add(weights, config, leaf, left, right)
                write_text(weights / INDEX, json.dumps(index, indent=0) + "\n")
                record |= {
                    "fingerprint": change.new_fingerprint,
                    "delta": {"digest": change.digest, "fingerprint": change.fingerprint, **change.metadata},
                    "weights_fingerprint": fingerprint(config, index),
                }
                write_text(made / RECORD, json.dumps(record, indent=1) + "\n")
                sync(*made.rglob("*"), made)
                if out.is_dir():
                    out.rmdir()
                os.rename(made, out)
            finally:
                shutil.rmtree(made, ignore_errors=True)
                discard(work)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}. Choose another output place.") from error
    return out


def _add(weights: Path, config: ModelConfig, leaf: tuple[str, ...], left: np.ndarray, right: np.ndarray) -> str:
    """Add ``left @ right`` to a stored leaf; the sha256 of its new values."""
    import tensorstore as ts

    shape = expected_leaves(config)[leaf][2]
    old = open_leaf(weights, leaf, stored_shape(leaf[-1], shape)).read().result()
    change = np.asarray(jnp.matmul(left, right, precision=lax.Precision.HIGHEST)).T  # stored as [out, in]
    with np.errstate(over="ignore"):
        new = np.ascontiguousarray((old.astype(np.float32) + change).astype(old.dtype))
    if not np.isfinite(new.astype(np.float32)).all():
        raise UserError(f"{'/'.join(leaf)} with the delta has values beyond the range of {old.dtype.name}")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{weights.joinpath(*leaf).absolute()}/"}}
    ts.open(spec, open=True, read=True, write=True).result().write(new).result()
    return hashlib.sha256(new.reshape(-1).view(np.uint8).data).hexdigest()
