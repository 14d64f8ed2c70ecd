"""The program `normkit`: its commands, and what it says when something is wrong."""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from itertools import dropwhile, takewhile

import tyro

from normkit.cli.advice import Recommend, Validate
from normkit.cli.bench import Bench
from normkit.cli.compare import Compare
from normkit.cli.convert import Convert
from normkit.cli.diagnose import Diagnose
from normkit.cli.explain import Explain
from normkit.cli.listing import List
from normkit.cli.reproduce import Reproduce
from normkit.cli.shared import MAX_DIGITS
from normkit.cli.streams import drop_output, is_closed, prepare_streams, wide_enough
from normkit.cli.tune import Tune
from normkit.errors import NormError, SpecError
from normkit.text import escaped, shortened

EXIT_BAD_INPUT = 2  # tyro's own code for a flag that it does not know
LONGEST_WORD = 400  # of an error's message; a path or a list of numbers may be long
EXIT_BROKEN_PIPE = 141  # what a shell reports of a program that nobody listens to any more
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


def run(given: Sequence[str]) -> int:
    """Parse the command line, run the command, and say what is wrong.

    With ``--json`` the standard output gets JSON in any case: errors are an object with the keys
    ``error`` and ``type``.

    Args:
        given: What follows the program's name.

    Returns:
        The exit code: 0, 1 if runs failed, 2 for bad input, 130 after an interrupt.
    """
    prepare_streams()
    try:
        with wide_enough():
            code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        drop_output()
        return EXIT_BROKEN_PIPE if is_closed(sys.stderr) else 0
    except OSError as error:
        if error.filename is not None:
            raise  # of a file, so not of the output
        drop_output()
        sys.stderr.write(f"normkit: the output cannot be written: {error.strerror}\n")
        return EXIT_BAD_INPUT


def _run(given: Sequence[str]) -> int:
    command = None
    try:
        command = _parse(given)
        return command.run()
    except NormError as error:
        return _refuse(error, given)
    except (KeyboardInterrupt, ImportError) as interrupt:
        if not _is_interrupt(interrupt):
            raise
        # Where it came inside of an exec("..."), as dataclasses do while they are imported, Python
        # remembers it until the next one, and would end the process by the signal.
        exec("")
        keeps = isinstance(command, Compare | Reproduce)
        kept = "finished runs are kept" if keeps else "no file is half written"
        return _refuse(interrupt, given, f"interrupted; {kept}", EXIT_INTERRUPTED)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether a user's interrupt is behind an error.

    One that comes while an extension module is imported ends in an ``ImportError``.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _refuse(
    error: BaseException, given: Sequence[str], text: str = "", code: int = EXIT_BAD_INPUT
) -> int:
    """Say what is wrong, in one sentence, and where it was asked for also as JSON."""
    said = text or _said(error)
    sys.stderr.write(f"normkit: {said}\n")
    if "--json" in given:
        sys.stdout.write(json.dumps({"error": said, "type": type(error).__name__}) + "\n")
    return code


def _said(error: BaseException) -> str:
    """What an error says, without control characters, and endless words cut."""
    return re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:40]}...", escaped(str(error)))


def _parse(given: Sequence[str]) -> Command:
    """Read the command line.

    Raises:
        SpecError: If it cannot be read and ``--json`` is in it, or it has an endless number.
    """
    endless = [word for word in given if re.fullmatch(rf"[+-]?\d{{{MAX_DIGITS},}}", word)]
    if endless:
        raise SpecError(
            f"a number of {len(endless[0])} digits was given, {endless[0][:20]}...; no option "
            f"takes one so long"
        )
    if "--json" not in given:
        return _read(given)
    with redirect_stderr(StringIO()) as told:
        try:
            _read([word for word in given if word != "--json"])  # its complaints name no --json
            return _read(given)
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
            raise SpecError(_unboxed(told.getvalue())) from stop


def _unboxed(text: str) -> str:
    """What stands under the title of tyro's box, to the next rule, in one line."""
    sides, rule = "|\N{BOX DRAWINGS LIGHT VERTICAL}", "-\N{BOX DRAWINGS LIGHT HORIZONTAL} "
    lines = [line.strip(sides) for line in text.splitlines()[1:]]
    below = dropwhile(lambda line: not line.strip(rule), lines)
    return shortened(" ".join(takewhile(lambda line: line.strip(rule), below)))


def _read(given: Sequence[str]) -> Command:
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="normkit",
        description="Normalization for PyTorch: compare norms on your model and data. "
        "--version alone prints the version.",
        args=given,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
