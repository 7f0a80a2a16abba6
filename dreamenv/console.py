"""What every command line does alike: options from a signature, and errors in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamenv.artifacts import storage_errors
from dreamenv.errors import DreamenvError


def run_command_line(
    command: Callable[..., Any], arguments: Sequence[str] | None = None, positional: bool = False, description: str = ""
) -> Any:
    """Fill a function's or a dataclass's parameters from the command line and call it; returns what it returned.

    Args:
        command: what to call; its docstring and fields are the help.
        arguments: instead of the process's own.
        positional: whether parameters without a default are given by their place.
        description: of the help, instead of the docstring.

    Raises:
        SystemExit: with `error: ...` on standard error and status 2 for a mistake of the user, 3 for a missing package.
    """
    import tyro

    wanted: Any = command
    if positional:
        wanted = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(command)
    with errors_in_one_line():
        options: dict[str, Any] = {"description": description} if description else {}
        return tyro.cli(wanted, args=arguments, **options)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn this project's errors, and missing packages, into one line and an exit status: 2 and 3."""
    try:
        with storage_errors(Path.cwd()):
            yield
    except (DreamenvError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, DreamenvError) else 3) from None
