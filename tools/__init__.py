"""Command-line tools besides train_ppo.py; the docstring of each says what it is for."""

import contextlib
import sys

from support.common.errors import UserError


@contextlib.contextmanager
def exits_on_user_error(program: str):
    """End the program with exit code 2 and one line if a UserError is raised inside."""
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
