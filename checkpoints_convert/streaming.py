"""Hugging Face safetensors -> Orbax v1 checkpoint, streamed by groups of layers.

    OUT/weights/        Orbax v1: leaves "embed", "final_norm", "unembed" and, per layer, "layers/007/q" ...
    OUT/jaxsteer.json   the record: config, dtype, source, hashes, what was ignored
    OUT/tokenizer.json, config.json, ...   copied as they are

Leaves are stored per layer and stacked on the device when they are loaded, so that conversion streams and a part of the
layers can be loaded alone.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files import DTYPES, SIDE_FILES, Tensor, content_hash, read_headers
from checkpoints_convert.names import Leaf, assign, expected_leaves, to_ours
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.hf import config_from_hf

log = logging.getLogger(__name__)

CONVERTER_VERSION = 1
"""Raised whenever the same source would give another checkpoint; part of the cache key."""
RECORD = "jaxsteer.json"
WEIGHTS = "weights"
GROUP_BYTES = 512 << 20
"""Layers are written in groups of at least this size (one layer, if a layer is larger)."""
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: bool = True,
    source: str | None = None,
    revision: str | None = None,
    source_hash: str | None = None,
) -> Path:
    """Convert the Hugging Face directory ``src`` into the checkpoint directory ``out``, and return ``out``.

    ``dtype`` is "float32", "float16" or "bfloat16"; by default the dtype that holds most of the weights is kept
    (float64 becomes float32). ``source`` and ``revision`` are recorded as the origin; ``source_hash`` is the content
    hash of ``src`` where the caller knows it already. At most one group of layers is in memory.

    Everything that can be wrong with the source is checked before any weight is read, and ``out`` appears only when it
    is complete. Raises ``UserError``, also when ``out`` exists or cannot be written.
    """
    src, out = Path(src), Path(out)
    if not src.is_dir():
        raise UserError(
            f"{src} is not a directory. Give the directory of a Hugging Face model (config.json, *.safetensors)."
        )
    _check_output(out)
    if dtype is not None and dtype not in OUT_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: give one of {', '.join(OUT_DTYPES)}.")
    config = config_from_hf(src)
    tensors, ignored = assign(read_headers(src), config)
    target = dtype or _own_dtype(tensors)
    width = DTYPES[OUT_DTYPES[target]].itemsize
    with _workspace(out, needed=sum(math.prod(t.shape) * width for t in tensors.values())) as work:
        record = {
            "format": "jaxsteer-checkpoint",
            "converter_version": CONVERTER_VERSION,
            "source": source or str(src.name),
            "revision": revision,
            "source_hash": source_hash or content_hash(src),
            "config": config.to_json(),
            "dtype": target,
            "ignored_tensors": ignored,
            "fingerprint": _write_weights(work / WEIGHTS, config, tensors, target, progress=progress),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for name in SIDE_FILES:
            if (src / name).is_file():
                shutil.copyfile(src / name, work / name)
        (work / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return out


def _check_output(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"The output {out} exists already. Choose another place, or remove it first.")


def _own_dtype(tensors: dict[Leaf, Tensor]) -> str:
    """The dtype that most weights have; the others are cast to it, which is said."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    main = max(sizes, key=lambda name: (sizes[name], name))
    chosen = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[main]
    if len(sizes) > 1 or main == "F64":
        log.warning("the checkpoint stores %s; all of it is kept as %s", ", ".join(sorted(sizes)), chosen)
    return chosen


def _groups(config: ModelConfig, width: int) -> Iterator[list[Leaf]]:
    """The leaves in stream order: first those outside the blocks, then groups of whole layers."""
    leaves = expected_leaves(config)
    group: list[Leaf] = []
    size, last = 0, ""
    for leaf, (_, _, shape) in leaves.items():
        layer = leaf[1] if len(leaf) > 1 else ""
        if layer != last and size >= GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(leaf)
        size, last = size + math.prod(shape) * width, layer
    yield group


def _write_weights(path: Path, config: ModelConfig, tensors: dict[Leaf, Tensor], dtype: str, *, progress: bool) -> str:
    """Stream all groups into the Orbax checkpoint ``path``; returns the fingerprint of config and weights."""
    from orbax.checkpoint import v1 as ocp
    from tqdm.auto import tqdm

    leaves, target = expected_leaves(config), DTYPES[OUT_DTYPES[dtype]]
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    total = sum(tensor.nbytes for tensor in tensors.values())
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and writing takes six times as long
    with context, tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
        for group in _groups(config, target.itemsize):
            tree: dict[str, Any] = {}
            for leaf in group:
                _, source, shape = leaves[leaf]
                values = to_ours(_cast(tensors[leaf], target), shape, source)
                digest.update("/".join(leaf).encode() + b"\0" + values.tobytes())
                node = tree
                for key in leaf[:-1]:
                    node = node.setdefault(key, {})
                node[leaf[-1]] = values
                bar.update(tensors[leaf].nbytes)
            ocp.partial.save(path, tree)
        ocp.partial.finalize(path)
    return digest.hexdigest()


def _cast(tensor: Tensor, target: np.dtype) -> np.ndarray:
    values = tensor.read()
    if values.dtype == target:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(target)
    if np.isinf(cast.astype(np.float32)).any() and not np.isinf(values.astype(np.float64)).any():
        raise UserError(
            f"Tensor {tensor.name!r} in {tensor.file} has values beyond the range of {target.name}. Convert with "
            f"--dtype bfloat16 or float32."
        )
    return cast


@contextlib.contextmanager
def _workspace(out: Path, *, needed: int) -> Iterator[Path]:
    """A temporary directory beside ``out`` that becomes ``out`` when the block ends well, and goes otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise UserError(
                f"Not enough space for {out}: the checkpoint takes {needed:,} bytes and {out.parent} has {free:,} free."
            )
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.converting-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}. Choose another output place.") from error
    try:
        os.chmod(work, 0o755)  # mkdtemp makes it private; a converted checkpoint is as readable as any directory
        yield work
        _sync(work)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        os.rename(work, out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise UserError(f"The output {out} appeared while it was being converted; it was left as it is.") from error
        if _is_write_failure(error):
            raise UserError(
                f"{out} could not be written ({_first_line(error)}). Free some space or choose another "
                f"output place; nothing was left there."
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_write_failure(error: BaseException) -> bool:
    """Whether the disk is the cause. TensorStore reports a full disk as a ValueError, only its text tells."""
    signs = ("No space left", "Disk quota exceeded", "File too large", "Read-only file system", "Permission denied")
    return isinstance(error, OSError) or any(sign in str(error) for sign in signs)


def _sync(directory: Path) -> None:
    """Flush every file and directory to the disk, so that the rename cannot outlive the contents."""
    for root, _, files in os.walk(directory):
        for name in [*files, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
