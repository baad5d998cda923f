"""Is a converted checkpoint what its source says, bit for bit? Or at least what was written, by its own hashes?"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files import DTYPES, side_files
from checkpoints_convert.leaves import RECORD, WEIGHTS, open_leaf, read_index, read_record, read_rows
from checkpoints_convert.names import Leaf, expected_leaves
from checkpoints_convert.streaming import (
    CONVERTER_VERSION,
    OUT_DTYPES,
    THREADS,
    Conversion,
    Values,
    block_rows,
    fingerprint,
    plan_conversion,
)
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.sharding import stored_shape


def verify(
    out: str | os.PathLike[str], src: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> list[str]:
    """The differences between the checkpoint directory ``out`` and what it should be; none if all is well.

    Every leaf is read and compared with the sha256 that was recorded when it was written. With the Hugging Face
    directory ``src`` every leaf is also made anew from it and compared bit for bit, and so are the config, the source's
    hash and the files that travel. Some blocks of leaves are in memory at a time. Raises ``UserError`` if
    ``out`` is no checkpoint of this version or ``src`` is no model.
    """
    from tqdm.auto import tqdm

    out = Path(out)
    record = read_record(out)
    if record.get("converter_version") != CONVERTER_VERSION:
        raise UserError(
            f"{out} was not written by version {CONVERTER_VERSION} of the converter, the only one that this version of "
            f"jaxsteer can verify. Convert the model again."
        )
    if src is not None and "delta" in record:
        raise UserError(f"{out} has a delta in its weights, which {src} has not: verify it alone, by its own hashes")
    config, index = ModelConfig.from_json(record["config"]), read_index(out / WEIGHTS)
    ignored = record.get("ignored_config_fields", ())
    job = None if src is None else plan_conversion(Path(src), record["dtype"], ignored)
    differences = _check_index(record, config, index)
    if job is not None and job.config != config:
        names = [field.name for field in dataclasses.fields(config)]
        changed = [name for name in names if getattr(job.config, name) != getattr(config, name)]
        differences.append(f"config: the source differs in {', '.join(changed)}")
        return differences  # the leaves are those of another model
    digests: dict[str, str] = {}
    total = sum(math.prod(shape) for _, _, shape in expected_leaves(config).values())
    with tqdm(total=total, unit="weights", unit_scale=True, desc="verifying", disable=not progress) as bar:
        for leaf, size, found, digest in _check_leaves(out / WEIGHTS, config, index, record["dtype"], job):
            differences += [f"{'/'.join(leaf)}: {what}" for what in found]
            if job is not None and digest is not None:
                digests[job.tensors[leaf].name] = digest
            bar.update(size)
    return differences + ([] if job is None else _check_files(out, job, record, digests))


def report(differences: list[str], out: Path | str, src: Path | str | None = None) -> int:
    """Print what ``verify`` found; returns the exit code."""
    against = f"{src}, bit for bit" if src is not None else "its own hashes"
    if not differences:
        print(f"{out} agrees with {against}")
        return 0
    print(f"{out} does not agree with {against}: {len(differences)} differences")
    for difference in differences:
        print(f"  {difference}")
    return 1


def _check_index(record: dict[str, Any], config: ModelConfig, index: dict[str, str]) -> list[str]:
    wanted = {"/".join(leaf) for leaf in expected_leaves(config)}
    differences = [f"{leaf}: not in the index" for leaf in sorted(wanted - index.keys())]
    differences += [f"{leaf}: in the index, but not a leaf of this model" for leaf in sorted(index.keys() - wanted)]
    if fingerprint(config, index) != record.get("weights_fingerprint", record["fingerprint"]):
        differences.append(f"fingerprint: that in {RECORD} does not follow from the config and the index")
    return differences


def _check_files(out: Path, job: Conversion, record: dict[str, Any], digests: dict[str, str]) -> list[str]:
    differences = []
    if len(digests) == len(job.tensors) and job.source.content_hash(digests) != record["source_hash"]:
        differences.append("source: its hash is not the recorded one (headers, side files or tensors have changed)")
    if job.ignored != record["ignored_tensors"]:
        differences.append("ignored tensors: the source has others than those recorded")
    side = job.source.side
    for name in sorted({*side, *side_files(out)}):
        here = out / name
        if not here.is_file() or name not in side:
            differences.append(f"{name}: only in the {'source' if name in side else 'checkpoint'}")
        elif here.read_bytes() != side[name]:
            differences.append(f"{name}: differs from the source's")
    return differences


def _check_leaves(
    weights: Path, config: ModelConfig, index: dict[str, str], dtype: str, job: Conversion | None
) -> Iterator[tuple[Leaf, int, list[str], str | None]]:
    """Check several leaves at a time; yields (leaf, its size, its differences, sha256 of the source's tensor)."""
    target = DTYPES[OUT_DTYPES[dtype]]
    leaves = [(leaf, shape) for leaf, (_, _, shape) in expected_leaves(config).items() if "/".join(leaf) in index]

    def check(leaf: Leaf, shape: tuple[int, ...]) -> tuple[list[str], str | None]:
        try:
            store = open_leaf(weights, leaf, stored_shape(leaf[-1], shape))
            if store.dtype.numpy_dtype != target:
                return [f"stored as {store.dtype.name}, expected {target.name}"], None
            rows = block_rows(shape, leaf[-1], target.itemsize)
            if job is None:
                return _check_hash(weights, leaf, store, rows, index["/".join(leaf)]), None
            made = Values(job.tensors[leaf], target, rows)
            return _check_values(weights, leaf, store, made, index["/".join(leaf)])
        except UserError as error:
            return [str(error)], None

    with ThreadPoolExecutor(THREADS) as pool:
        checks = [pool.submit(check, leaf, shape) for leaf, shape in leaves]
        try:
            for (leaf, shape), future in zip(leaves, checks, strict=True):
                yield leaf, math.prod(shape), *future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _check_hash(weights: Path, leaf: Leaf, store: Any, rows: int, recorded: str) -> list[str]:
    """What is wrong with one stored leaf, by the sha256 that was recorded."""
    digest = hashlib.sha256()
    for start in range(0, store.shape[0], rows):
        digest.update(_bits(read_rows(weights, leaf, store, slice(start, min(start + rows, store.shape[0])))).data)
    same = digest.hexdigest() == recorded
    return [] if same else ["the weights on the disk are not those that were written (sha256)"]


def _check_values(weights: Path, leaf: Leaf, store: Any, made: Values, recorded: str) -> tuple[list[str], str | None]:
    """What is wrong with one stored leaf, by its source; and the sha256 of the source's tensor."""
    start = wrong = 0
    for block in made:
        values = read_rows(weights, leaf, store, slice(start, start + len(block)))
        wrong += int(np.count_nonzero(_bits(values, values.itemsize) != _bits(block, block.itemsize)))
        start += len(block)
    differences = [f"{wrong:,} of {math.prod(store.shape):,} values differ from the source"] if wrong else []
    if made.digest.hexdigest() != recorded:
        differences.append("the source gives another sha256 than was recorded")
    return differences, made.source_digest.hexdigest()


def _bits(values: np.ndarray, width: int = 1) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{width}")
