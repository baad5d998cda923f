"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do.

    The CLI prints it as one message and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, without the lines that follow; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
