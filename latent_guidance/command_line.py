"""How the commands of a module end: bad input as one message and exit status 2, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .errors import UserError


def run_commands(app: Callable[[], object]) -> None:
    """Run a command line; a UserError, or a file that the system refuses, is printed to stderr alone and ends with status 2.

    Raises:
        SystemExit: Where ``app`` raises it, and with status 2 after bad input.
    """
    import typer

    try:
        app()
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:  # a folder that is a file, that may not be written, a full disk
        typer.echo(f"{error.filename or 'a file'} could not be read or written: {error.strerror or error}", err=True)
        sys.exit(2)
