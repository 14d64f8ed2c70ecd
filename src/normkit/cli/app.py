"""The program `normkit`: its commands, its error messages and its exit codes."""

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
from normkit.cli.options import tidied
from normkit.cli.reproduce import Reproduce
from normkit.cli.shared import MAX_DIGITS
from normkit.cli.streams import drop_output, is_closed, prepare_streams, wide_enough
from normkit.cli.tune import Tune
from normkit.errors import NormError, SpecError
from normkit.text import escaped, shortened

EXIT_BAD_INPUT = 2  # tyro's own code for a flag that it does not know
LONGEST_WORD = 400  # characters of a word in an error message; longer ones are cut
EXIT_BROKEN_PIPE = 141  # what a shell reports if the reader of the output is gone
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
    """Parse the command line, run the command, and report errors.

    With ``--json`` the standard output is always JSON: an error is an object with the keys
    ``error`` and ``type``.

    Args:
        given: The words after the program's name.

    Returns:
        The exit code: 0, 1 if runs failed, 2 for bad input, 130 after an interrupt.
    """
    prepare_streams()
    try:
        with wide_enough():
            code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        drop_output()
        return EXIT_BROKEN_PIPE if is_closed(sys.stderr) else 0
    except OSError as error:
        if error.filename is not None:
            raise  # the error is about a file, not about the output
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
        # If the interrupt came inside an exec("..."), which dataclasses call at import, Python
        # would remember it and end the process by the signal. Another exec clears that.
        exec("")
        keeps = isinstance(command, Compare | Reproduce)
        kept = "finished runs are kept" if keeps else "no file is half written"
        return _refuse(interrupt, given, f"interrupted; {kept}", EXIT_INTERRUPTED)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error was caused by a user's interrupt.

    An interrupt during the import of an extension module is raised as an ``ImportError``.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _refuse(
    error: BaseException, given: Sequence[str], text: str = "", code: int = EXIT_BAD_INPUT
) -> int:
    """Write an error to the standard error, and with ``--json`` also as JSON."""
    said = text or _said(error)
    sys.stderr.write(f"normkit: {said}\n")
    if "--json" in given:
        sys.stdout.write(json.dumps({"error": said, "type": type(error).__name__}) + "\n")
    return code


def _said(error: BaseException) -> str:
    """The text of an error, without control characters and with long words cut."""
    return re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:40]}...", escaped(str(error)))


def _parse(given: Sequence[str]) -> Command:
    """Parse the command line; tyro prints its own errors and exits, unless ``--json`` is given.

    Raises:
        SpecError: If a number is too long, or ``--json`` is given and tyro cannot parse the rest.
    """
    long = [word for word in given if re.fullmatch(rf"[+-]?\d{{{MAX_DIGITS},}}", word)]
    if long:
        raise SpecError(
            f"a number of {len(long[0])} digits was given, {long[0][:20]}...; no option "
            f"takes one so long"
        )
    if "--json" not in given:
        return _read(given)
    with redirect_stderr(StringIO()) as written:
        try:
            # Parse without --json first: tyro's error should name the wrong option, not --json.
            _read([word for word in given if word != "--json"])
            return _read(given)
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
            raise SpecError(_unboxed(written.getvalue())) from stop


def _unboxed(text: str) -> str:
    """The first paragraph in the box that tyro draws around an error, in one line."""
    sides, rule = "|\N{BOX DRAWINGS LIGHT VERTICAL}", "-\N{BOX DRAWINGS LIGHT HORIZONTAL} "
    lines = [line.strip(sides) for line in text.splitlines()[1:]]
    below = dropwhile(lambda line: not line.strip(rule), lines)
    return shortened(" ".join(takewhile(lambda line: line.strip(rule), below)))


def _read(given: Sequence[str]) -> Command:
    return tyro.extras.subcommand_cli_from_dict(
        {name: tidied(command) for name, command in COMMANDS.items()},
        prog="normkit",
        description="Normalization for PyTorch: compare norms on your model and data. "
        "--version alone prints the version.",
        args=given,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
