"""Functions of a user's own: ``my.py:make_model`` on the command line, or what Python was given."""

import ast
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from normkit.errors import NormError, SpecError
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.text import printable, shortened

SUFFIX = ".py"
LONGEST_LINE = 160  # characters of an error's last line


@dataclass(frozen=True, slots=True)
class Reference:
    """A name in a Python file, written ``my.py:make_model``."""

    path: Path
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


HELD: dict[str, Any] = {}  # what Python gave and no file names, under names of its own
PREFIX = "python:"


def name_of(given: Any, kind: str) -> str:  # noqa: ANN401 - a function or data sets
    """A text that stands for what a user gave in Python.

    ``FILE.py:NAME`` for a function at the top of a file, which other processes and the command
    line find as well; else a name that only this process knows.

    Args:
        given: A function, or anything else.
        kind: What it is, such as ``"model"``.
    """
    reference = reference_of(given) if callable(given) else None
    if reference is not None:
        return reference
    name = f"{PREFIX}{kind}:{getattr(given, '__name__', type(given).__name__)}:{_digest(given)}"
    HELD[name] = given
    return name


def _digest(given: Any) -> str:  # noqa: ANN401 - as above
    """Twelve digits over a function's source; of anything else only this process knows."""
    try:
        source = inspect.getsource(given)
    except (OSError, TypeError):
        source = repr(id(given))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def is_reference(text: str) -> bool:
    """Whether a text names something of a user's, rather than something of the lab's."""
    if text.startswith(PREFIX):
        return True
    path, _, name = text.rpartition(":")
    return text.endswith(SUFFIX) or (path.endswith(SUFFIX) and name.isidentifier())


def parse_reference(text: str, option: str) -> Reference:
    """Read ``FILE.py:NAME``.

    Raises:
        SpecError: If the name is missing or there is no such file.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(SUFFIX):
        raise SpecError(
            f"{option} was given {printable(text)}; after the file comes a colon and the name of "
            f"a function in it, such as {printable(text)}:make"
        )
    if not Path(path).is_file():
        raise SpecError(f"{option} was given {printable(text)}, and there is no file {path}")
    return Reference(Path(path).resolve(), name)


def load_function(text: str, option: str) -> Callable[..., Any]:
    """Import the file and give the function.

    Args:
        text: ``FILE.py:NAME``.
        option: Which one named it.

    Raises:
        SpecError: If there is no such file, it cannot be imported, or has no such function.
    """
    if text.startswith(PREFIX):
        return held(text, option)
    reference = parse_reference(text, option)
    module = _imported(reference.path, option)
    function = getattr(module, reference.name, None)
    if not callable(function):
        known = [
            n for n, v in vars(module).items() if callable(v) and v.__module__ == module.__name__
        ]
        raise SpecError(
            f"{option} was given {reference.name}, and {reference.path.name} has no such function; "
            f"it has {', '.join(known) or 'none'}"
        )
    return function


def held(text: str, option: str) -> Any:  # noqa: ANN401 - what a user gave
    """What Python gave under this name.

    Raises:
        SpecError: If it was another process.
    """
    if text not in HELD:
        raise SpecError(
            f"{option}: {text} is known only to the process that gave it; define the function at "
            f"the top of a file, or use one worker"
        )
    return HELD[text]


@cache
def _imported(path: Path, option: str) -> Any:  # noqa: ANN401 - a module of any content
    """Import a file under a name of its own; its folder is where its imports are looked up."""
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{option}: {printable(path)} cannot be imported; give a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what pickles its classes looks there
    register_missing_operators()  # it may import torchvision or timm
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SpecError(f"{option}: {path.name} cannot be imported: {told(error)}") from error
    return module


def module_name(path: Path) -> str:
    """Name under which a user's file is imported; the same in every process."""
    return f"_normkit_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def told(error: BaseException) -> str:
    """The last line of a traceback, with the file and line of the user's code where it arose.

    Example:
        ``NameError: name 'foo' is not defined (my.py, line 3)``
    """
    said = shortened(
        "".join(traceback.format_exception_only(error)).strip().splitlines()[-1], LONGEST_LINE
    )
    if isinstance(error, SyntaxError) and error.filename:
        return f"{said} ({Path(error.filename).name}, line {error.lineno})"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")
    ]
    ours = str(Path(__file__).parents[1])
    own = [
        f for f in frames if not f.filename.startswith(ours) and "site-packages" not in f.filename
    ]
    if not own:
        return said
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


@contextmanager
def users_errors(what: str) -> Generator[None]:
    """Say of an error in a user's function where it arose.

    Raises:
        SpecError: In place of any other exception; the library's own errors pass.
    """
    try:
        yield
    except NormError:
        raise
    except Exception as error:
        raise SpecError(f"{what} failed: {told(error)}") from error


def source_hash(*texts: str | None) -> str | None:
    """Twelve hexadecimal digits over the files that references name and what they import beside.

    Args:
        texts: ``FILE.py:NAME``; anything else, such as a model of the lab's, is left out.

    Returns:
        ``None`` if no text names a file.
    """
    named = [text for text in texts if text and is_reference(text) and text not in HELD]
    if not named:
        return None  # the digest of what Python gave is in its name
    paths = [parse_reference(text, "a run").path for text in named]
    digest = hashlib.sha256()
    for file in sorted({beside for path in paths for beside in _with_imports(path)}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _with_imports(path: Path) -> set[Path]:
    """The file, and the files in its folder that it imports, and those that they import."""
    found, waiting = set[Path](), [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # said when it is imported
        for name in _imported_names(tree):
            beside = path.parent.joinpath(*name.split("."))
            candidates = (beside.with_suffix(SUFFIX), beside / "__init__.py")
            waiting += [candidate for candidate in candidates if candidate.is_file()]
    return found


def _imported_names(tree: ast.AST) -> Generator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reference_of(function: Callable[..., Any]) -> str | None:
    """``FILE.py:NAME`` of a function that a file defines at its top; ``None`` of any other.

    Such a function can be found again by other processes, and later from the command line.
    """
    name, file = getattr(function, "__qualname__", ""), None
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        return None
    if file is None or not name.isidentifier() or not file.endswith(SUFFIX):
        return None
    module = sys.modules.get(getattr(function, "__module__", ""), None)
    if getattr(module, name, None) is not function:
        return None
    return f"{Path(file).resolve()}:{name}"
