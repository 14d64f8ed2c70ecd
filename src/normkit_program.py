"""The start of the command `normkit`, which imports its libraries and runs it.

This file is not part of the package: importing the package takes about a second, in which an
interrupt would end in a traceback. --version and --help are answered without that import.
"""

import re
import signal
import sys

COMMANDS = {
    "compare": "Train one network with several norms at several batch sizes, and show which is "
    "best.",
    "recommend": "Rank norms for a batch size, with the papers' measurements.",
    "convert": "Replace the norms of a model by others and save its weights.",
    "validate": "Find what is wrong with the norms of a model at a batch size.",
    "diagnose": "Find out why a trained model evaluates badly, by how much, and what helps.",
    "tune": "Choose the share of the example's own statistics at evaluation, and test it.",
    "explain": "Draw a feature map with the elements that share statistics in one colour.",
    "list": "List the methods, data sets, models and tasks that the other commands know.",
    "bench": "Time our layers and torch's in turns, and compare them.",
    "reproduce": "Repeat figures and tables of the papers, and judge their claims by the results.",
}
"""The commands, each with the first sentence of its help."""


def main() -> int:
    """Answer --version and --help; for other commands import and run the program.

    Returns:
        The program's exit code. An interrupt during the import ends the process at once.
    """
    given = sys.argv[1:]
    if given == ["--version"]:
        say_version()
        return 0
    if given in (["--help"], ["-h"]):
        sys.stdout.write(help_text())
        return 0
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from normkit.cli import main as run  # the import must come after SIGINT is reset

    signal.signal(signal.SIGINT, handler)
    return run()


def say_version() -> None:
    """Write the version, and to the standard error which packages the commands lack."""
    from importlib.metadata import version  # for this alone

    sys.stdout.write(f"normkit {version('normkit')}\n")
    missing = packages_not_installed("lab")
    if missing:
        sys.stderr.write(
            f"normkit: the commands need the extra lab: pip install 'normkit[lab]' "
            f"(not installed: {', '.join(missing)})\n"
        )


def packages_not_installed(extra: str) -> list[str]:
    """Packages of an extra that are not installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    missing = []
    for line in requires("normkit") or ():
        requirement, _, condition = line.partition(";")
        if condition.strip() not in (f'extra == "{extra}"', f"extra == '{extra}'"):
            continue
        name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def help_text() -> str:
    """The commands, and how to get more help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: normkit COMMAND [OPTIONS]",
            "",
            "Normalization for PyTorch: compare norms on your model and data.",
            "",
            *lines,
            "",
            "normkit COMMAND --help has the options of a command; normkit --version the version;",
            "normkit --tyro-print-completion bash (or zsh) the completion for your shell.",
            "",
        ]
    )
