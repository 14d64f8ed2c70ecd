"""The command line: parse, call, format."""

import json
import sys
from collections.abc import Sequence

from normkit.errors import PackageError
from normkit.lab.extra import lab_packages
from normkit.version import __version__

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of the program ``normkit``.

    Args:
        arguments: The words after the program's name; ``None`` takes those of the command line.

    Returns:
        The exit code: 0, 1 if runs failed, 2 for bad input, 130 after an interrupt.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        sys.stdout.write(f"normkit {__version__}\n")
        return 0
    try:
        with lab_packages():
            from normkit.cli.app import run  # its packages are an extra

            return run(given)
    except PackageError as error:
        sys.stderr.write(f"normkit: {error}\n")
        if "--json" in given:
            said = {"error": str(error), "type": type(error).__name__}
            sys.stdout.write(json.dumps(said) + "\n")
        return EXIT_BAD_INPUT


__all__ = ["main"]
