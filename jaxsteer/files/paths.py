"""Names of files and directories as users write them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from jaxsteer.errors import FileError, UserError

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def user_path(name: str | os.PathLike[str]) -> Path:
    """The path of this name, with ``~`` and ``~user`` replaced; it may be absent.

    Its methods ``exists``, ``is_file`` and ``is_dir`` raise nothing afterwards. Raises ``UserError`` for a user that is
    not known, a name that no file can have, one that is too long, and a directory that may not be entered.
    """
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except RuntimeError:
        raise UserError(f"{os.fspath(name)!r} names the home of a user who is not known here. Give the path.") from None
    except OSError as error:
        if error.errno not in _ABSENT:
            shown = os.fspath(name)
            shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
            raise FileError(f"{shown} cannot be read: {error.strerror or error}.", error) from None
    except TypeError:
        raise UserError(f"a path was expected, got {name!r}.") from None
    except ValueError as error:  # NUL, or characters that the file system has no bytes for
        raise UserError(f"{os.fspath(name)!r} is not the name of a file: {error}.") from None
    return path


def named_file(text: str) -> Path | None:
    """The file of this name, if there is one: for options that take a text or a file of texts."""
    try:
        path = user_path(text)
    except UserError:
        return None
    return path if path.is_file() else None
