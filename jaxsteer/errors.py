"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do.

    The CLI prints it as one message and exits with 2.
    """
