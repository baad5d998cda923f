"""Files that are written whole or not at all, and directories: the only place that makes them.

Whatever stands in the way (a full disk, no permission, a name that is too long, a directory of that name) is a
``FileError`` that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxsteer.errors import FileError, UserError

_ADVICE = {
    errno.ENOSPC: "Free some space, or choose another place",
    errno.EDQUOT: "Free some space, or choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EISDIR: "Choose another name",
}


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong with the disk inside the block is a ``FileError`` that says that ``path`` cannot be read."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise FileError(f"{path} cannot be read: {reason}.", error) from error


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file opened for reading; ``FileError`` for a pipe or a device, which may never end. Reading never waits."""

    def opener(path: str, flags: int) -> int:
        number = os.open(path, flags | os.O_NONBLOCK)
        mode = os.fstat(number).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open says what is wrong with a directory
            os.close(number)
            raise FileError(f"{path} cannot be read: it is a pipe or a device. Give a regular file.")
        return number

    return open(path, "rb", opener=opener)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong with the disk inside the block is a ``FileError`` that says that ``path`` cannot be written."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Choose another place, or mend its permissions")
        raise FileError(f"{path} cannot be written: {error.strerror or error}. {advice}.", error) from error
    except UnicodeEncodeError as error:
        raise UserError(f"{os.fspath(path)!r} cannot be written: {error.reason} in its name or in its text.") from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under its final name only when it is complete: a crash leaves the old file, or none.

    The directory must exist. Raises ``FileError`` with nothing left behind.
    """
    path = Path(path)
    with writing(path):
        # Only the start of the name, so that the longest names can be written too.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:32]}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    with writing(path):
        data = text.encode("utf-8")
    write_bytes(path, data)


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Add UTF-8 text to the end of a file, which is made if it is missing. Raises ``FileError``."""
    with writing(path), open(path, "ab") as file:
        file.write(text.encode("utf-8"))


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Make a directory and those above it, unless they exist. Returns the path.

    Raises ``FileError`` where that is impossible; then none of them was made.
    """
    path = Path(path)
    made = [above for above in path.parents if not os.path.lexists(above)]
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            for above in made:  # from the innermost
                with contextlib.suppress(OSError):
                    above.rmdir()
            raise
    return path
