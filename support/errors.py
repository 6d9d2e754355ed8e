"""What ends a run in one line."""


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line on stderr, exit code 2, no traceback."""
