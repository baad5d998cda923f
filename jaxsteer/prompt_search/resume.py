"""What a search keeps on disk so that it can go on after any end: results of finished waves, and the last state.

The directory holds ``search.json`` (which search it is), ``wave-00000.npz`` ... (what finished waves found) and
``state`` (Orbax checkpoints of the wave that is being searched, written while the search runs on). Everything is
written whole or not at all, and the last good checkpoint is deleted only after the next one is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.errors import UserError, first_line
from jaxsteer.files import read_json, write_bytes, write_text
from jaxsteer.files.npz import read_npz
from jaxsteer.processes import from_first, is_first

SEARCH, STATE = "search.json", "state"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a search that goes on must do as it began."""

    batch: int
    """Candidates scored at once."""
    wave: int
    """Problems searched together."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what can be no sizes."""
        if not all(type(size) is int and size >= 1 for size in (self.batch, self.wave)):
            raise ValueError(f"batch {self.batch!r} and wave {self.wave!r} must be integers of 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notes:
    """What a checkpoint says beside its arrays."""

    wave: int
    """Number of the wave."""
    step: int
    """Steps that its problems have done."""
    where: str
    """The same for people."""
    rejected: list[dict[str, Any]]
    """Prompts that were taken out of archives, as JSON."""
    seconds: float
    """Of the whole search."""


class Store:
    """The directory of one search. A context manager: leaving it waits for what is still being written.

    ``open`` comes first, and ``begin`` after it where the directory held nothing. What cannot be written or read is one
    ``UserError`` that says what is safe and what to do.
    """

    def __init__(self, folder: Path, *, every_s: float = 60.0, resume: bool = False) -> None:
        """``resume`` goes on with what the directory holds; otherwise that is removed when the search opens it."""
        self._folder, self._every, self._resume = folder, every_s, resume
        self._saved = time.monotonic()
        self._checkpointer: Any = None
        self._pending: tuple[Any, str] | None = None
        self._safe = "the start"  # up to where everything is on disk

    def __enter__(self) -> Store:
        # What goes wrong is raised here as one error; Orbax also logs it, with its traceback.
        self._level, absl = logging.getLogger("absl").level, logging.getLogger("absl")
        absl.setLevel(logging.CRITICAL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._checkpointer is not None:
                self._wait()
                self._checkpointer.close()
        except Exception as error:  # closing raises again what a save has raised
            if kind is None:
                raise error if isinstance(error, UserError) else self._failure(error) from error
        finally:
            self._checkpointer = None
            logging.getLogger("absl").setLevel(self._level)

    def open(self, identity: dict[str, Any]) -> Sizes | None:
        """Open the directory for the search that ``identity`` describes; the sizes that it began with, if it did.

        Raises ``UserError`` when the directory holds another search, and when it cannot be written.
        """
        from orbax.checkpoint import v1 as ocp

        self._identity = identity
        begun = from_first(self._read_or_clear)
        path = (self._folder / STATE).absolute()
        try:
            self._checkpointer = ocp.training.Checkpointer(
                path,
                preservation_policy=ocp.training.preservation_policies.LatestN(2),
                cleanup_tmp_directories=True,
            )
        except ValueError as error:  # of damaged notes beside a checkpoint
            raise UserError(
                f"the state in {path} cannot be read ({_reason(error)}): leave out --resume to begin again"
            ) from error
        return Sizes(**begun) if begun else None

    def begin(self, sizes: Sizes) -> None:
        """Keep what a resumed search must do as this one."""
        with self._writing():
            if is_first():
                known = {"same": self._identity, "began": dataclasses.asdict(sizes)}
                write_text(self._folder / SEARCH, json.dumps(known))

    def finished(self, wave: int) -> dict[str, np.ndarray] | None:
        """What ``finish`` kept of a wave, or ``None``."""
        path = self._wave(wave)
        if not from_first(path.exists):
            return None
        try:
            return read_npz(path, texts=True)
        except UserError as error:
            raise UserError(f"{error} Leave out --resume to begin again.") from error

    def finish(self, wave: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep what a wave found. Its checkpoints are of no more use."""
        self._wait()
        data = io.BytesIO()
        np.savez(data, **arrays)  # type: ignore[arg-type]
        with self._writing():
            if is_first():
                self._require_directory()
                write_bytes(self._wave(wave), data.getvalue())
        self._safe = f"wave {wave + 1}"

    def restore(self, wave: int, like: Any) -> tuple[Any, Notes] | None:
        """State and notes of the last checkpoint of ``wave``, or ``None``. ``like`` has the arrays' shapes."""
        latest = self._checkpointer.latest
        if latest is None or not self._resume:
            return None
        leaves, tree = jax.tree.flatten(like)
        try:
            # The list of checkpoints lacks these.
            notes = Notes(**self._checkpointer.metadata(latest.step).custom_metadata)
            if notes.wave != wave:
                return None
            empty = _by_name([np.zeros(leaf.shape, leaf.dtype) for leaf in leaves])
            arrays = self._checkpointer.load(latest.step, empty)
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged checkpoint
            raise UserError(
                f"the state in {latest.path} cannot be read ({_reason(error)}): leave out --resume to begin again"
            ) from error
        self._safe = notes.where
        return jax.tree.unflatten(tree, [np.asarray(arrays[name]) for name in sorted(arrays)]), notes

    def due(self) -> bool:
        """Whether the last checkpoint is old; the same in all processes."""
        return bool(from_first(lambda: time.monotonic() - self._saved >= self._every))

    def save(self, number: int, state: Any, notes: Notes, *, wait: bool = False) -> None:
        """Write a checkpoint of a tree of NumPy arrays in the background.

        ``number`` grows from checkpoint to checkpoint. Raises ``UserError`` for this one or the one before.
        """
        self._wait()
        latest = self._checkpointer.latest
        if latest is not None and latest.step == number:
            return  # it is the same state
        with self._writing():
            self._require_directory()
            leaves = _by_name(jax.tree.leaves(state))
            metadata = dataclasses.asdict(notes)
            response = self._checkpointer.save_async(number, leaves, force=True, custom_metadata=metadata)
        self._pending, self._saved = (response, notes.where), time.monotonic()
        if wait:
            self._wait()

    def _wait(self) -> None:
        """Until the checkpoint that is being written is whole."""
        if self._pending is None:
            return
        (response, where), self._pending = self._pending, None
        with self._writing():
            response.result()
        self._safe = where

    def _read_or_clear(self) -> dict[str, Any]:
        """What ``begin`` kept of this search, where it is to be resumed; else an empty directory, and nothing."""
        path = self._folder / SEARCH
        with self._writing():
            if self._resume and path.exists():
                try:
                    known = read_json(path)
                    identity, begun = known["same"], dataclasses.asdict(Sizes(**known["began"]))
                except UserError as error:
                    raise UserError(f"{error} Leave out --resume to begin again.") from error
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(f"{path} is damaged: leave out --resume to begin again") from error
                if identity != self._identity:
                    raise UserError(
                        f"{self._folder} holds the state of another search ({identity} there, {self._identity} now): "
                        "leave out --resume to begin again, or give another directory"
                    )
                return begun
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        return {}

    def _require_directory(self) -> None:
        if not (self._folder / SEARCH).exists():  # Orbax would make the directory anew, elsewhere than it was
            raise FileNotFoundError(2, "the directory has vanished", str(self._folder))

    def _wave(self, wave: int) -> Path:
        return self._folder / f"wave-{wave:05d}.npz"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Whatever goes wrong inside is one error."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Orbax raises many types
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        return UserError(
            f"the search cannot be saved in {self._folder} ({_reason(error)}). What was saved up to {self._safe} is "
            "whole: make room or bring the directory back, then run the same command with --resume"
        )


def digest(*trees: Any) -> str:
    """A hash of the arrays of trees, to recognise a search by."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        found.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def _by_name(leaves: list[Any]) -> dict[str, Any]:
    """Under names that do not depend on an algorithm's own types."""
    return {f"leaf{i:05d}": leaf for i, leaf in enumerate(leaves)}


def _reason(error: BaseException) -> str:
    while not isinstance(error, OSError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='?(\d+)", str(error)):  # TensorStore's way of an OSError
        return os.strerror(int(code[1]))
    return first_line(error)
