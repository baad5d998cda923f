"""What a search keeps on disk so that it can go on after any end: results of finished waves, and the last state.

The directory holds ``search.json`` (which search it is), ``wave-00000.npz`` ... (what finished waves found) and
``state`` (Orbax checkpoints of the wave that is being searched, written while the search runs on). Everything is
written whole or not at all, and the last good checkpoint is deleted only after the next one is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.errors import UserError, first_line
from jaxsteer.files import read_json, write_bytes, write_text
from jaxsteer.files.npz import read_npz
from jaxsteer.processes import from_first, is_first

SEARCH, STATE = "search.json", "state"


class Store:
    """The directory of one search. A context manager: leaving it waits for what is still being written."""

    def __init__(self, folder: Path, *, every_s: float = 60.0, resume: bool = False) -> None:
        """``resume`` goes on with what the directory holds; otherwise that is removed when the search opens it."""
        self._folder, self._every, self._resume = folder, every_s, resume
        self._saved = time.monotonic()
        self._checkpointer: Any = None
        self._pending: Any = None
        self._last = "the start"

    def __enter__(self) -> Store:
        # What goes wrong is raised here as one error; Orbax also logs it, with its traceback.
        self._level, absl = logging.getLogger("absl").level, logging.getLogger("absl")
        absl.setLevel(logging.CRITICAL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._checkpointer is not None:
                self._settle()
                self._checkpointer.close()
        except Exception as error:  # closing raises again what a save has raised
            if kind is None:
                raise error if isinstance(error, UserError) else self._failed(error) from error
        finally:
            self._checkpointer = None
            logging.getLogger("absl").setLevel(self._level)

    def open(self, same: dict[str, Any]) -> dict[str, Any]:
        """Open the directory for the search of which ``same`` is known; returns what ``begin`` kept of it, or nothing.

        Raises ``UserError`` when the directory holds another search, and when it cannot be written.
        """
        from orbax.checkpoint import v1 as ocp

        self._same = same
        began = from_first(self._look)
        self._checkpointer = ocp.training.Checkpointer(
            (self._folder / STATE).absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )
        return began

    def _look(self) -> dict[str, Any]:
        path = self._folder / SEARCH
        try:
            if self._resume and path.exists():
                try:
                    known = read_json(path)
                    wave = known["began"].get("wave", 1) if isinstance(known.get("began"), dict) else None
                except UserError as error:
                    raise UserError(f"{error} Leave out --resume to begin again.") from error
                if "same" not in known or type(wave) is not int or wave < 1:
                    raise UserError(f"{path} is damaged: leave out --resume to begin again")
                if known["same"] != self._same:
                    raise UserError(
                        f"{self._folder} holds the state of another search ({known['same']} there, {self._same} now): "
                        "leave out --resume to begin again, or give another directory"
                    )
                return known["began"]
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise self._failed(error) from error
        return {}

    def begin(self, began: dict[str, Any]) -> None:
        """Keep what a resumed search must do alike."""
        try:
            if is_first():
                write_text(self._folder / SEARCH, json.dumps({"same": self._same, "began": began}))
        except OSError as error:
            raise self._failed(error) from error

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
        self._settle()
        data = io.BytesIO()
        np.savez(data, **arrays)  # type: ignore[arg-type]
        try:
            if is_first():
                self._check()
                write_bytes(self._wave(wave), data.getvalue())
        except OSError as error:
            raise self._failed(error) from error
        self._last = f"wave {wave + 1}"

    def restore(self, wave: int, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """State and notes of the last checkpoint of ``wave``, or ``None``. ``like`` has the arrays' shapes."""
        latest = self._checkpointer.latest
        if latest is None or not self._resume:
            return None
        leaves, tree = jax.tree.flatten(like)
        try:
            notes = dict(self._checkpointer.metadata(latest.step).custom_metadata)  # the list of checkpoints lacks it
            if notes["wave"] != wave:
                return None
            found = self._checkpointer.load(latest.step, _named([np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]))
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged checkpoint
            raise UserError(
                f"the state in {latest.path} cannot be read ({_reason(error)}): leave out --resume to begin again"
            ) from error
        self._last = str(notes["where"])
        return jax.tree.unflatten(tree, [np.asarray(found[name]) for name in sorted(found)]), notes

    def due(self) -> bool:
        """Whether the last checkpoint is old; the same in all processes."""
        return bool(from_first(lambda: time.monotonic() - self._saved >= self._every))

    def save(self, number: int, state: Any, notes: dict[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint in the background: a tree of NumPy arrays and JSON notes, with ``wave`` and ``where``.

        ``number`` grows from checkpoint to checkpoint. Raises ``UserError`` for this one or the one before.
        """
        self._settle()
        latest = self._checkpointer.latest
        if latest is not None and latest.step == number:
            return  # it is the same state
        try:
            self._check()
            leaves = _named(jax.tree.leaves(state))
            response = self._checkpointer.save_async(number, leaves, force=True, custom_metadata=notes)
            self._pending = response, str(notes["where"])
        except Exception as error:
            raise self._failed(error) from error
        self._saved = time.monotonic()
        if wait:
            self._settle()

    def _settle(self) -> None:
        if self._pending is None:
            return
        (response, where), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._failed(error) from error
        self._last = where

    def _check(self) -> None:
        if not (self._folder / SEARCH).exists():  # Orbax would make the directory anew, elsewhere than it was
            raise FileNotFoundError(2, "the directory has vanished", str(self._folder))

    def _wave(self, wave: int) -> Path:
        return self._folder / f"wave-{wave:05d}.npz"

    def _failed(self, error: Exception) -> UserError:
        return UserError(
            f"the search cannot be saved in {self._folder} ({_reason(error)}). What was saved up to {self._last} is "
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


def _named(leaves: list[Any]) -> dict[str, Any]:
    """By names that do not depend on an algorithm's own types."""
    return {f"leaf{i:05d}": leaf for i, leaf in enumerate(leaves)}


def _reason(error: BaseException) -> str:
    while not isinstance(error, OSError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='?(\d+)", str(error)):  # TensorStore's way of an OSError
        return os.strerror(int(code[1]))
    return first_line(error)
