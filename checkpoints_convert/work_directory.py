"""The work directory of a conversion: locked, resumable, and renamed to the final name when it is complete.

    .OUT.converting/lock            held by the process that works here
    .OUT.converting/manifest.json   what is being converted, and how: other work is not gone on with but replaced
    .OUT.converting/done/layers.003.json   group layers.003 is complete on the disk; what is known about it
    .OUT.converting/checkpoint/     becomes OUT

The name follows from that of the output, so that whatever a killed process left is found by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError, first_line
from jaxsteer.files import read_json, write_text

log = logging.getLogger(__name__)

LOCK = "lock"
_MANIFEST = "manifest.json"
_WRITE_FAILURES = (
    "No space left",
    "Disk quota exceeded",
    "File too large",
    "Read-only file system",
    "Permission denied",
)


def work_path(out: Path) -> Path:
    """Where the conversion to ``out`` does its work: beside it, so that a rename finishes it."""
    return out.parent / f".{out.name}.converting"


def discard(directory: Path) -> None:
    """Remove a work directory whose lock is held, the lock last."""
    _clear(directory)
    with contextlib.suppress(OSError):
        (directory / LOCK).unlink()
        directory.rmdir()  # unless another process has come in


def _clear(directory: Path) -> None:
    (directory / _MANIFEST).unlink(missing_ok=True)  # first: without it, what is left counts for nothing
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)


class WorkDirectory:
    """A work directory whose lock is held, and which groups are finished in it."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Go on with what is in ``directory`` if it was begun with the same ``manifest``; else clear it."""
        self.directory, self.checkpoint = directory, directory / "checkpoint"
        text = json.dumps(manifest, sort_keys=True)
        # A kill between the last two steps of ``publish`` leaves a manifest without a checkpoint.
        if _text(directory / _MANIFEST) != text or not self.checkpoint.is_dir():
            _clear(directory)
            for part in (self.checkpoint, directory / "done"):
                part.mkdir()
            write_text(directory / _MANIFEST, text)

    def done(self, group: str) -> dict[str, Any] | None:
        """What ``finish`` noted about a group, or None if it is not complete."""
        note = self._note(group)
        return read_json(note) if note.is_file() else None

    def finish(self, group: str, files: Path, note: dict[str, Any]) -> None:
        """Declare a group complete, after its ``files`` have reached the disk."""
        sync(*files.rglob("*"), files, *list(files.parents)[: len(files.relative_to(self.checkpoint).parts)])
        write_text(self._note(group), json.dumps(note))

    def _note(self, group: str) -> Path:
        return self.directory / "done" / f"{group}.json"

    def publish(self, weights: Path, out: Path) -> None:
        """Make the finished checkpoint appear as ``out``, and remove what is left of the work.

        The files of groups are on the disk already (``finish``); ``weights`` is the directory that holds them.
        """
        for directory in (weights, self.checkpoint):
            sync(*(path for path in directory.iterdir() if path.is_file()), directory)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        os.rename(self.checkpoint, out)
        discard(self.directory)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def keep_or_discard(work: Path, out: Path, groups: int) -> Iterator[None]:
    """Keep or remove the work when the block does not end well.

    Groups that are finished are kept where another attempt can go on (Ctrl-C, a full disk, a source that cannot be read
    just now), and the user is told; after all other errors nothing is left. ``groups`` is how many there are in all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.warning("The conversion to %s was interrupted. %s", out, _keep(work, groups))
        raise
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # of reading: the source may come back
            raise UserError(f"{error} {_keep(work, groups)}") from error.__cause__
        discard(work)
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            discard(work)
            raise UserError(f"The output {out} appeared while it was being converted; it was left as it is.") from error
        if _is_write_failure(error):
            raise UserError(
                f"{out} could not be written ({_cause(error)}). Free some space or choose another output place. "
                f"{_keep(work, groups)}"
            ) from error
        discard(work)
        raise


def _keep(work: Path, groups: int) -> str:
    """Keep the finished groups, if there are any, and say so."""
    finished = len(list((work / "done").glob("*.json")))
    if not finished:
        discard(work)
        return "Nothing was left there."
    return (
        f"{finished} of {groups} groups of leaves are finished and kept in {work}: run the same conversion again to go "
        f"on from there, or remove that directory."
    )


def _cause(error: BaseException) -> str:
    """What stopped the writing, and of which leaf, out of TensorStore's long messages too."""
    text = first_line(error)
    leaf = re.search(r"/weights/((?:layers/\d+/)?\w+)/", text)
    sign = next((sign for sign in _WRITE_FAILURES if sign in text), None)
    return f"{sign} at {leaf[1]}" if leaf and sign else text


def _is_write_failure(error: BaseException) -> bool:
    """Whether the disk is the cause. TensorStore reports a full disk as a ValueError, only its text tells."""
    return isinstance(error, OSError) or any(sign in str(error) for sign in _WRITE_FAILURES)


def sync(*paths: Path) -> None:
    """Flush files and directories to the disk, so that what follows cannot outlive the contents."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
