"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do; the CLI prints it and exits with 2."""
