"""Hugging Face safetensors -> Orbax v1 checkpoints, streamed by groups of leaves.

    OUT/weights/000/ ...      one Orbax v1 checkpoint per group of leaves: "embed", "layers/007/q" ...
    OUT/weights/index.json    leaf -> its group, and the sha256 of its values
    OUT/jaxsteer.json         the record: config, dtype, source, hashes, what was ignored
    OUT/tokenizer.json, config.json, ...   copied as they are

Leaves are stored per layer and stacked on the device when they are loaded, so that a part of the layers can be loaded
alone. One checkpoint per group, because each is written whole or not at all: parts that Orbax saves into one checkpoint
are merged at the end, and a kill during the merge leaves something that can be neither finished nor read.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert.files import DTYPES, Tensor, content_hash, file_states, read_headers, side_files
from checkpoints_convert.names import Leaf, assign, expected_leaves
from checkpoints_convert.work import Work, discard, kept_or_discarded, locked, work_directory, write_whole
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.hf import config_from_hf
from jaxsteer.models.restoring import orbax
from jaxsteer.models.sharding import piece_axis, stored_shape

log = logging.getLogger(__name__)

CONVERTER_VERSION = 4
"""Raised whenever the same source would give another checkpoint; part of the cache key."""
RECORD = "jaxsteer.json"
WEIGHTS = "weights"
INDEX = "index.json"
GROUP_BYTES = 256 << 20
"""Leaves are written in groups of at most this size (one leaf, if a leaf is larger)."""
THREADS = min(8, os.cpu_count() or 1)
"""Tensors are read and hashed by so many threads."""
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Job(NamedTuple):
    """What is to be converted, after everything that can be wrong with the source has been checked."""

    src: Path
    config: ModelConfig
    tensors: dict[Leaf, Tensor]
    ignored: list[str]
    dtype: str
    groups: dict[str, list[Leaf]]
    """Name of a group -> its leaves, in stream order."""

    @property
    def target(self) -> np.dtype:
        """The dtype to store."""
        return DTYPES[OUT_DTYPES[self.dtype]]

    def size(self, group: str) -> int:
        """Bytes of a group as it is stored."""
        return sum(math.prod(self.tensors[leaf].shape) for leaf in self.groups[group]) * self.target.itemsize


class Converted(NamedTuple):
    """A tensor in the dtype to store, still as it lies in the file ([out, in])."""

    values: np.ndarray
    sha256: str
    """Of ``values``, which is what the index records."""
    source_sha256: str
    """Of the bytes of the file."""


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: bool = True,
    source: str | None = None,
    revision: str | None = None,
) -> Path:
    """Convert the Hugging Face directory ``src`` into the checkpoint directory ``out``, and return ``out``.

    ``dtype`` is "float32", "float16" or "bfloat16"; by default the dtype that holds most of the weights is kept
    (float64 becomes float32). ``source`` and ``revision`` are recorded as the origin.

    Everything that can be wrong with the source is checked before any weight is read, and ``out`` appears only when it
    is complete. A conversion that was killed, interrupted or stopped by a full disk goes on where it was when it is
    called again; one that runs in another process already is waited for, and its result is used. About three groups of
    leaves are in memory at a time (docs/checkpoints.md has the bound). Raises ``UserError``, also when ``out`` exists
    or cannot be written.
    """
    src, out = Path(src), Path(os.path.abspath(out))
    work = work_directory(out)
    if not src.is_dir():
        raise UserError(
            f"{src} is not a directory. Give the directory of a Hugging Face model (config.json, *.safetensors)."
        )
    if not work.is_dir():  # else another process may be making ``out`` just now
        _check_output(out)
    if dtype is not None and dtype not in OUT_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: give one of {', '.join(OUT_DTYPES)}.")
    job = plan(src, dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(work, lambda: log.warning("Another process is converting to %s; waiting for it.", out)) as waited:
            if _is_full(out):
                discard(work)
                if waited and _is_result(out, job):
                    return out
                _check_output(out)
            with kept_or_discarded(work, out, len(job.groups)):
                _run(job, work, out, progress, source=source, revision=revision)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}. Choose another output place.") from error
    return out


def plan(src: Path, dtype: str | None) -> Job:
    """The job of converting ``src``, from its config.json and the headers of its files. Raises ``UserError``."""
    config = config_from_hf(src)
    tensors, ignored = assign(read_headers(src), config)
    chosen = dtype or _own_dtype(tensors)
    return Job(src, config, tensors, ignored, chosen, dict(_groups(tensors, DTYPES[OUT_DTYPES[chosen]].itemsize)))


def _is_full(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _check_output(out: Path) -> None:
    if _is_full(out):
        raise UserError(f"The output {out} exists already. Choose another place, or remove it first.")


def _is_result(out: Path, job: Job) -> bool:
    """Whether a checkpoint that another process has made is what this job would make."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = {"converter_version": CONVERTER_VERSION, "dtype": job.dtype, "source_hash": source_hash(job)}
    return wanted.items() <= record.items()


def source_hash(job: Job) -> str:
    """The content hash of the source, by reading it."""
    digests = {tensor.name: hashlib.sha256() for tensor in job.tensors.values()}
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda tensor: tensor.read(digests[tensor.name].update).size, job.tensors.values()):
            pass
    return content_hash(job.src, {name: digest.hexdigest() for name, digest in digests.items()})


def _manifest(job: Job, states: list[list[str | int]]) -> dict[str, Any]:
    """What must be equal for the finished groups of an earlier attempt to be parts of this conversion."""
    return {
        "converter_version": CONVERTER_VERSION,
        "files": states,
        "config": job.config.to_json(),
        "dtype": job.dtype,
        "groups": job.groups,
    }


def _run(job: Job, directory: Path, out: Path, progress: bool, *, source: str | None, revision: str | None) -> None:
    """Do what is left of the job, and publish the result."""
    states = file_states(job.src)
    work = Work(directory, _manifest(job, states))
    notes = {group: note for group in job.groups if (note := work.done(group)) is not None}
    needed = sum(job.size(group) for group in job.groups if group not in notes)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left: {needed:,} bytes are still to be written and {free:,} are free")
    weights = work.checkpoint / WEIGHTS
    weights.mkdir(exist_ok=True)
    for entry in weights.iterdir():  # parts of groups that were being written when the process ended
        if entry.is_dir() and entry.name not in notes:
            shutil.rmtree(entry)
    if notes:
        log.info("going on with the conversion to %s: %d of %d groups are done", out, len(notes), len(job.groups))
    _write_groups(job, work, weights, notes, progress)
    index = {
        leaf: {"group": group, "sha256": sha} for group in job.groups for leaf, sha in notes[group]["leaves"].items()
    }
    lines = (f"{json.dumps(leaf)}: {json.dumps(entry)}" for leaf, entry in index.items())
    write_whole(weights / INDEX, "{\n" + ",\n".join(lines) + "\n}\n")
    for name in side_files(job.src):
        shutil.copyfile(job.src / name, work.checkpoint / name)
    sources = {name: digest for note in notes.values() for name, digest in note["tensors"].items()}
    record = {
        "format": "jaxsteer-checkpoint",
        "converter_version": CONVERTER_VERSION,
        "source": source or str(job.src.name),
        "revision": revision,
        "source_hash": content_hash(job.src, sources),
        "config": job.config.to_json(),
        "dtype": job.dtype,
        "ignored_tensors": job.ignored,
        "fingerprint": fingerprint(job.config, {leaf: entry["sha256"] for leaf, entry in index.items()}),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_whole(work.checkpoint / RECORD, json.dumps(record, indent=1) + "\n")
    if file_states(job.src) != states:
        raise UserError(f"The files in {job.src} changed while they were being converted. Convert again.")
    work.publish(weights, out)


def fingerprint(config: ModelConfig, hashes: dict[str, str]) -> str:
    """sha256 over config and weights, the latter given as leaf -> sha256 of its values."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    for leaf, sha in sorted(hashes.items()):
        digest.update(f"\n{leaf} {sha}".encode())
    return digest.hexdigest()


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


def _groups(tensors: dict[Leaf, Tensor], width: int) -> Iterator[tuple[str, list[Leaf]]]:
    """The leaves in stream order, in groups that are as large as GROUP_BYTES allows, in the file and as stored."""
    number, size = 0, 0
    group: list[Leaf] = []
    for leaf, tensor in tensors.items():
        nbytes = max(tensor.nbytes, math.prod(tensor.shape) * width)
        if group and size + nbytes > GROUP_BYTES:
            yield f"{number:03d}", group
            number, group, size = number + 1, [], 0
        group.append(leaf)
        size += nbytes
    yield f"{number:03d}", group


def _write_groups(job: Job, work: Work, weights: Path, notes: dict[str, dict[str, Any]], progress: bool) -> None:
    """Write every group that has no note yet, and note it. The next group is read while one is being written."""
    from tqdm.auto import tqdm

    forms = {leaf: stored_shape(leaf[-1], shape) for leaf, (_, _, shape) in expected_leaves(job.config).items()}
    todo = [group for group in job.groups if group not in notes]
    sizes = {group: sum(job.tensors[leaf].nbytes for leaf in leaves) for group, leaves in job.groups.items()}
    small = {group for group, leaves in job.groups.items() if len(leaves) > 1 or sizes[group] <= GROUP_BYTES}
    # Two groups take turns in the same memory, and so does a large leaf alone: fresh memory is slow, above all in
    # virtual machines.
    room = max((_room(job, group) for group in small), default=0)
    memory = np.empty(max([2 * room, *(_room(job, group) for group in todo)]), np.uint8) if todo else None

    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="converting", disable=not progress) as bar,
    ):
        bar.update(sum(sizes[group] for group in notes))

        def begin(position: int) -> list[Future[Converted]]:
            assert memory is not None
            group, reading = todo[position], []
            start = room * (position % 2) if group in small else 0
            for leaf in job.groups[group]:
                tensor = job.tensors[leaf]
                reading.append(pool.submit(read, tensor, job.target, memory[start : start + tensor.nbytes]))
                start += _aligned(tensor.nbytes)
            return reading

        ahead: list[Future[Converted]] | None = None
        for position, group in enumerate(todo):
            reading, ahead = ahead or begin(position), None
            leaves = dict(zip(job.groups[group], [future.result() for future in reading], strict=True))
            del reading
            if position + 1 < len(todo) and {group, todo[position + 1]} <= small:
                ahead = begin(position + 1)
            save(weights / group, {leaf: one.values.reshape(forms[leaf]) for leaf, one in leaves.items()})
            notes[group] = {
                "leaves": {"/".join(leaf): one.sha256 for leaf, one in leaves.items()},
                "tensors": {job.tensors[leaf].name: one.source_sha256 for leaf, one in leaves.items()},
            }
            work.finish(group, weights / group, notes[group])
            bar.update(sizes[group])
            del leaves


def _room(job: Job, group: str) -> int:
    return sum(_aligned(job.tensors[leaf].nbytes) for leaf in job.groups[group])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def save(path: Path, leaves: dict[Leaf, np.ndarray]) -> None:
    """Write one Orbax checkpoint of leaves in the shapes of ``stored_shape``.

    Zarr arrays in plain files: Orbax's database format (OCDBT) holds a copy of the whole group while it is written.
    """
    ocp = orbax()
    tree: dict[str, Any] = {}
    for leaf, values in leaves.items():
        node = tree
        for key in leaf[:-1]:
            node = node.setdefault(key, {})
        node[leaf[-1]] = values

    def chunks(keys: tuple[Any, ...], value: np.ndarray) -> Any:
        axis = piece_axis(str(keys[-1].key), value.ndim)
        return None if axis is None else ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(axis,))

    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False  # weights hardly compress, and writing takes six times as long
    context.array.saving.scoped_storage_options_creator = chunks
    context.memory.deepcopy_host_arrays = False  # nobody changes them
    with context:
        ocp.save(path, tree)


def read(tensor: Tensor, target: np.dtype, into: np.ndarray | None = None) -> Converted:
    """One tensor in dtype ``target``. Raises ``UserError`` where a value does not fit, and as ``Tensor.read`` does.

    What is read goes into the memory ``into``, where this is given.
    """
    digest = hashlib.sha256()
    values = tensor.read(digest.update, into)
    if values.dtype == target:
        return Converted(values, digest.hexdigest(), digest.hexdigest())
    with np.errstate(over="ignore"):
        cast = values.astype(target)
    if np.isinf(cast.astype(np.float32)).any() and not np.isinf(values.astype(np.float64)).any():
        raise UserError(
            f"Tensor {tensor.name!r} in {tensor.file} has values beyond the range of {target.name}. Convert with "
            f"--dtype bfloat16 or float32."
        )
    return Converted(cast, hashlib.sha256(cast.reshape(-1).view(np.uint8).data).hexdigest(), digest.hexdigest())
