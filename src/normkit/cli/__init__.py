"""The command line: parse, call, format."""

import json
import sys
from collections.abc import Sequence

from normkit.version import __version__

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program ``normkit``.

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
        from normkit.cli.app import run  # its packages are an extra

        return run(given)
    except ModuleNotFoundError as error:
        package = (error.name or "normkit").partition(".")[0]
        if package == "normkit":
            raise
        said = (
            f"the package {package} is not installed; the commands need those of the lab: "
            f"pip install 'normkit[lab]'"
        )
        sys.stderr.write(f"normkit: {said}\n")
        if "--json" in given:
            sys.stdout.write(json.dumps({"error": said, "type": type(error).__name__}) + "\n")
        return EXIT_BAD_INPUT


__all__ = ["main"]
