"""The program `normkit`: its commands, and what it says when something is wrong."""

import os
import sys
from collections.abc import Sequence

import tyro

from normkit.cli.advice import Recommend, Validate
from normkit.cli.bench import Bench
from normkit.cli.compare import Compare
from normkit.cli.convert import Convert
from normkit.cli.diagnose import Diagnose
from normkit.cli.explain import Explain
from normkit.cli.listing import List
from normkit.cli.reproduce import Reproduce
from normkit.cli.tune import Tune
from normkit.errors import NormError
from normkit.lab.environment import package_version

EXIT_BAD_INPUT = 2  # tyro's own code for a flag that it does not know
EXIT_INTERRUPTED = 130  # what a shell reports after Ctrl-C

COMMANDS = {
    "compare": Compare,
    "recommend": Recommend,
    "convert": Convert,
    "validate": Validate,
    "diagnose": Diagnose,
    "tune": Tune,
    "explain": Explain,
    "list": List,
    "bench": Bench,
    "reproduce": Reproduce,
}
Command = (
    Compare | Recommend | Convert | Validate | Diagnose | Tune | Explain | List | Bench | Reproduce
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: What follows the program's name; ``None`` for the command line's own.

    Returns:
        The exit code: 0, 1 if runs failed, 2 for bad input, 130 after an interrupt.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        sys.stdout.write(f"normkit {package_version()}\n")
        return 0
    command = None
    try:
        try:
            command = _parse(given)
            return command.run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NormError as error:
        sys.stderr.write(f"normkit: {error}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        keeps = isinstance(command, Compare | Reproduce)
        kept = "finished runs are kept" if keeps else "nothing was written"
        sys.stderr.write(f"normkit: interrupted; {kept}\n")
        return EXIT_INTERRUPTED


def _parse(arguments: Sequence[str]) -> Command:
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="normkit",
        description="Normalization for PyTorch: compare norms on your model and data. "
        "--version alone prints the version.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
