"""Safetensors and GGUF files -> sharded Zarr arrays that TensorStore writes and reads, streamed block by block.

    OUT/weights/embed/, OUT/weights/layers/007/q/ ...   one Zarr array per leaf, in chunks
    OUT/weights/index.json                              leaf -> the sha256 of its values
    OUT/jaxsteer.json                                   the record: config, dtype, source, hashes, what was ignored
    OUT/tokenizer.json, config.json, ...                copied as they are

Leaves are stored per layer and stacked on the device when they are loaded, so that a part of the layers can be loaded
alone. TensorStore is called directly because Orbax takes whole arrays: a leaf would have to be in memory.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import math
import os
import queue
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert.files import DTYPES, all_finite
from checkpoints_convert.leaves import RECORD, WEIGHTS
from checkpoints_convert.names import Leaf, assign, expected_leaves
from checkpoints_convert.sources import Source, StoredTensor, file_states, open_source
from checkpoints_convert.work_directory import LOCK, WorkDirectory, discard, keep_or_discard, work_path
from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, read_json, write_bytes, write_text
from jaxsteer.files.lock import hold_lock
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sharding import stored_chunks

log = logging.getLogger(__name__)

CONVERTER_VERSION = 5
"""Raised whenever the same source would give another checkpoint; part of the cache key."""
INDEX = "index.json"
THREADS = min(8, os.cpu_count() or 1)
"""So many leaves are converted at a time, each with one block in memory."""
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Conversion(NamedTuple):
    """What is to be converted, after everything that can be wrong with the source has been checked."""

    source: Source
    tensors: dict[Leaf, StoredTensor]
    ignored: list[str]
    dtype: str
    ignored_fields: tuple[str, ...]
    """Fields of config.json that the user has declared to change no number."""
    groups: dict[str, list[Leaf]]
    """The leaves in stream order, in what is finished at a time: one layer, or one leaf outside the layers."""

    @property
    def config(self) -> ModelConfig:
        """The config of the source."""
        return self.source.config

    @property
    def target(self) -> np.dtype:
        """The dtype to store."""
        return DTYPES[OUT_DTYPES[self.dtype]]

    def size(self, group: str) -> int:
        """Bytes of a group as it is stored."""
        return sum(math.prod(self.tensors[leaf].shape) for leaf in self.groups[group]) * self.target.itemsize


class Values:
    """The values to store of one tensor, still as it lies in the file ([out, in]): an iterable of blocks of rows.

    The digests are complete after one iteration. Raises ``UserError`` where a value is NaN or infinite or does not fit
    the dtype ``target``, and as ``Tensor.blocks`` does.
    """

    def __init__(self, tensor: StoredTensor, target: np.dtype, rows: int, memory: np.ndarray | None = None) -> None:
        self.tensor, self.target, self.rows, self.memory = tensor, target, rows, memory
        self.source_digest = hashlib.sha256()
        """Of the bytes of the file."""
        same = tensor.raw and DTYPES[tensor.dtype] == target
        self.digest = self.source_digest if same else hashlib.sha256()
        """Of the values in the dtype to store, which is what the index records."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.tensor.blocks(self.rows, self.memory, self._update):
            if self.digest is self.source_digest:
                yield block
                continue
            if not self.tensor.raw:
                self._check(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            values = block if block.dtype == self.target else self._cast(block)
            self.digest.update(values.reshape(-1).view(np.uint8).data)
            yield values

    def _update(self, data: memoryview) -> None:
        self.source_digest.update(data)
        if self.tensor.raw:
            self._check(data)

    def _check(self, data: memoryview) -> None:
        if not all_finite(data, DTYPES[self.tensor.dtype]):
            raise UserError(
                f"Tensor {self.tensor.name!r} in {self.tensor.file} holds NaN or infinity, so that nothing the model "
                f"computes could be right. Download the file again; if it is so at its source, the model is broken."
            )

    def _cast(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(self.target)
        if not all_finite(np.ascontiguousarray(cast).reshape(-1).view(np.uint8).data, self.target):
            raise UserError(
                f"Tensor {self.tensor.name!r} in {self.tensor.file} has values beyond the range of {self.target.name}. "
                f"Convert with --dtype bfloat16 or float32."
            )
        return cast


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: bool = True,
    source: str | None = None,
    revision: str | None = None,
    ignore_fields: Collection[str] = (),
) -> Path:
    """Convert ``src``, a Hugging Face directory or a GGUF file, into the checkpoint ``out``, and return ``out``.

    ``dtype`` is "float32", "float16" or "bfloat16"; by default the dtype that holds most of the weights is kept
    (float64 becomes float32). ``source`` and ``revision`` are recorded as the origin. ``ignore_fields`` are names of
    fields of config.json that change no number although jaxsteer does not know them.

    Everything that can be wrong with the source is checked before any weight is read, and ``out`` appears only when it
    is complete. A conversion that was killed, interrupted or stopped by a full disk goes on where it was when it is
    called again; one that runs in another process already is waited for, and its result is used. Some blocks of leaves
    are in memory at a time, whatever the sizes of leaves (docs/checkpoints.md). Raises ``UserError``, also when ``out``
    exists or cannot be written.
    """
    src, out = Path(src), Path(os.path.abspath(out))
    work = work_path(out)
    if not work.is_dir():  # else another process may be making ``out`` just now
        _check_output(out)
    if dtype is not None and dtype not in OUT_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: give one of {', '.join(OUT_DTYPES)}.")
    job = plan_conversion(src, dtype, ignore_fields)
    try:
        make_directory(out.parent)
        with hold_lock(
            work / LOCK, lambda: log.warning("Another process is converting to %s; waiting for it.", out)
        ) as waited:
            if _is_full(out):
                discard(work)
                if waited and _is_result(out, job):
                    return out
                _check_output(out)
            with keep_or_discard(work, out, len(job.groups)):
                _run(job, work, out, progress, source=source, revision=revision)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}. Choose another output place.") from error
    return out


def plan_conversion(src: Path, dtype: str | None, ignore_fields: Collection[str] = ()) -> Conversion:
    """The job of converting ``src``, from its JSON files and the headers of its weights. Raises ``UserError``."""
    source = open_source(src, ignore_fields)
    tensors, ignored = assign(source.tensors, source.config)
    chosen = dtype or _main_dtype(tensors)
    groups: dict[str, list[Leaf]] = {}
    for leaf in tensors:
        groups.setdefault(".".join(leaf[:2]), []).append(leaf)
    return Conversion(source, tensors, [*ignored, *source.ignored], chosen, tuple(ignore_fields), groups)


def _is_full(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _check_output(out: Path) -> None:
    if _is_full(out):
        raise UserError(f"The output {out} exists already. Choose another place, or remove it first.")


def _is_result(out: Path, job: Conversion) -> bool:
    """Whether a checkpoint that another process has made is what this job would make."""
    try:
        record = read_json(out / RECORD)
    except UserError:
        return False
    wanted = {"converter_version": CONVERTER_VERSION, "dtype": job.dtype, "source_hash": source_hash(job)}
    return wanted.items() <= record.items()


def source_hash(job: Conversion) -> str:
    """The content hash of the source, by reading it."""

    def digest(tensor: StoredTensor) -> tuple[str, str]:
        found = hashlib.sha256()
        for _ in tensor.blocks(1 + (8 << 20) // max(1, tensor.row_bytes), update=found.update):
            pass
        return tensor.name, found.hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return job.source.content_hash(dict(pool.map(digest, job.tensors.values())))


def _manifest(job: Conversion, states: list[list[str | int]]) -> dict[str, Any]:
    """What must be equal for the finished groups of an earlier attempt to be parts of this conversion."""
    return {
        "converter_version": CONVERTER_VERSION,
        "files": states,
        "config": job.config.to_json(),
        "dtype": job.dtype,
        "groups": job.groups,
    }


def _run(
    job: Conversion, directory: Path, out: Path, progress: bool, *, source: str | None, revision: str | None
) -> None:
    """Do what is left of the job, and publish the result."""
    states = file_states(job.source.path)
    work = WorkDirectory(directory, _manifest(job, states))
    notes = {group: note for group in job.groups if (note := work.done(group)) is not None}
    needed = sum(job.size(group) for group in job.groups if group not in notes)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left: {needed:,} bytes are still to be written and {free:,} are free")
    weights = work.checkpoint / WEIGHTS
    _remove_unfinished(work.checkpoint, weights, {group_path(weights, group) for group in notes})
    if notes:
        log.info("going on with the conversion to %s: %d of %d groups are done", out, len(notes), len(job.groups))
    _write_groups(job, work, weights, notes, progress)
    index = {leaf: sha for group in job.groups for leaf, sha in notes[group]["leaves"].items()}
    write_text(weights / INDEX, json.dumps(index, indent=0) + "\n")
    for name, content in job.source.side.items():
        write_bytes(work.checkpoint / name, content)
    sources = {name: digest for note in notes.values() for name, digest in note["tensors"].items()}
    record = {
        "format": "jaxsteer-checkpoint",
        "converter_version": CONVERTER_VERSION,
        "source": source or job.source.path.name,
        "revision": revision,
        "source_hash": job.source.content_hash(sources),
        "config": job.config.to_json(),
        "dtype": job.dtype,
        "ignored_tensors": job.ignored,
        "finite": True,  # ``Values`` has looked at every weight; where this is missing, loading does
        "ignored_config_fields": sorted(job.ignored_fields),
        "fingerprint": fingerprint(job.config, index),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_text(work.checkpoint / RECORD, json.dumps(record, indent=1) + "\n")
    if file_states(job.source.path) != states:
        raise UserError(f"The files of {job.source.path} changed while they were being converted. Convert again.")
    work.publish(weights, out)


def fingerprint(config: ModelConfig, hashes: dict[str, str]) -> str:
    """sha256 over config and weights, the latter given as leaf -> sha256 of its values."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    for leaf, sha in sorted(hashes.items()):
        digest.update(f"\n{leaf} {sha}".encode())
    return digest.hexdigest()


def _main_dtype(tensors: dict[Leaf, StoredTensor]) -> str:
    """The dtype that most weights have; the others are cast to it, which is said."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    main = max(sizes, key=lambda name: (sizes[name], name))
    chosen = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[main]
    if len(sizes) > 1 or main == "F64":
        log.warning("the checkpoint stores %s; all of it is kept as %s", ", ".join(sorted(sizes)), chosen)
    return chosen


def group_path(weights: Path, group: str) -> Path:
    """The directory of a group of leaves."""
    return weights.joinpath(*group.split("."))


def _remove_unfinished(checkpoint: Path, weights: Path, finished: set[Path]) -> None:
    """What a process that ended was writing, when the directories in ``finished`` were complete."""
    (weights / "layers").mkdir(parents=True, exist_ok=True)
    for path in [*checkpoint.iterdir(), *weights.iterdir(), *(weights / "layers").iterdir()]:
        if path.is_file():
            path.unlink()
        elif path not in {weights, weights / "layers", *finished}:
            shutil.rmtree(path)


def _write_groups(
    job: Conversion, work: WorkDirectory, weights: Path, notes: dict[str, dict[str, Any]], progress: bool
) -> None:
    """Write every group that has no note yet, and note it; several leaves at a time, in stream order."""
    from tqdm.auto import tqdm

    shapes = {leaf: shape for leaf, (_, _, shape) in expected_leaves(job.config).items()}
    todo = [group for group in job.groups if group not in notes]
    # The same memory serves all leaves: fresh memory is slow, above all in virtual machines.
    memories: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    size = max((block_bytes(job, leaf, shapes[leaf]) for group in todo for leaf in job.groups[group]), default=0)
    for _ in range(THREADS):
        memories.put(np.empty(size, np.uint8))

    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(
            total=sum(tensor.nbytes for tensor in job.tensors.values()),
            unit="B",
            unit_scale=True,
            desc="converting",
            disable=not progress,
        ) as bar,
    ):
        bar.update(sum(job.tensors[leaf].nbytes for group in notes for leaf in job.groups[group]))

        def write(leaf: Leaf) -> Values:
            memory = memories.get()
            try:
                return write_leaf(job, leaf, shapes[leaf], weights, memory, bar.update)
            finally:
                memories.put(memory)

        writing = {group: [pool.submit(write, leaf) for leaf in job.groups[group]] for group in todo}
        try:
            for group in todo:
                leaves = dict(zip(job.groups[group], [future.result() for future in writing.pop(group)], strict=True))
                notes[group] = {
                    "leaves": {"/".join(leaf): one.digest.hexdigest() for leaf, one in leaves.items()},
                    "tensors": {job.tensors[leaf].name: one.source_digest.hexdigest() for leaf, one in leaves.items()},
                }
                work.finish(group, group_path(weights, group), notes[group])
        finally:
            pool.shutdown(cancel_futures=True)


def block_rows(shape: tuple[int, ...], name: str, width: int) -> int:
    """Rows in a block of a leaf that is stored in values of ``width`` bytes: as many as are in a chunk."""
    return stored_chunks(name, shape, width)[0]


def block_bytes(job: Conversion, leaf: Leaf, shape: tuple[int, ...]) -> int:
    """Size of a block of a leaf in the file."""
    return block_rows(shape, leaf[-1], job.target.itemsize) * job.tensors[leaf].row_bytes


def write_leaf(
    job: Conversion,
    leaf: Leaf,
    shape: tuple[int, ...],
    weights: Path,
    memory: np.ndarray,
    wrote: Callable[[int], object] = lambda nbytes: None,
) -> Values:
    """Write one leaf of shape ``shape`` as an uncompressed Zarr array; the result has its digests.

    ``memory`` takes a block of the file; ``wrote`` is told the size of each block in the file.
    """
    tensor = job.tensors[leaf]
    store = _create(weights.joinpath(*leaf), tensor.shape, stored_chunks(leaf[-1], shape, job.target.itemsize), job)
    values = Values(tensor, job.target, block_rows(shape, leaf[-1], job.target.itemsize), memory)
    start = 0
    for block in values:
        # A block that is a chunk is written from where it lies; one that is several is copied.
        store[start : start + len(block)].write(block, can_reference_source_data_indefinitely=True).result()
        start += len(block)
        wrote(len(block) * tensor.row_bytes)
    return values


def _create(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], job: Conversion) -> Any:
    import tensorstore as ts

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": shape,
            "chunks": chunks,
            "dtype": "bfloat16" if job.dtype == "bfloat16" else job.target.str,
            "compressor": None,  # weights hardly compress, and writing takes six times as long
        },
        "store_data_equal_to_fill_value": True,
        "context": {"file_io_sync": False},  # ``WorkDirectory.finish`` does it
    }
    return ts.open(spec, create=True).result()
