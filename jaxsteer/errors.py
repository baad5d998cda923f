"""The one exception for what a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do.

    The CLI prints it as one message and exits with 2.
    """


class FileError(UserError, OSError):
    """A file or directory that cannot be read or written. ``errno`` and ``strerror`` are the system's."""

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        """``message`` names the file; ``cause`` is the system's error."""
        super().__init__(message)
        self.errno, self.strerror = (None, message) if cause is None else (cause.errno, cause.strerror or str(cause))

    def __str__(self) -> str:
        """The message alone, without the number that ``OSError`` puts before it."""
        return str(self.args[0])


def refuse_unknown(names: Iterable[str], known: Iterable[str], what: str, where: str = "") -> None:
    """Raise ``UserError``, with the nearest known one, for the first of ``names`` that is not ``known``."""
    known = tuple(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}there is no {what} {name!r}: did you mean {near!r}?")


def first_line(error: BaseException) -> str:
    """What another library's error says, without the lines that follow; its type where it says nothing."""
    if isinstance(error, KeyError):
        return f"there is no {str(error)[:80]}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
