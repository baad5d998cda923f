"""The one exception for what a user can mend."""


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


def first_line(error: BaseException) -> str:
    """What another library's error says, without the lines that follow; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
