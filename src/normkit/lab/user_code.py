"""Functions of a user's own: ``my.py:make_model`` on the command line, or what Python was given."""

import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from normkit.errors import NormError, SpecError
from normkit.lab.sources import SUFFIX, files_hash, import_names
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.text import printable, shortened

PACKAGES = Path(__file__).parents[2]  # the folder that normkit was installed in
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
_seen: dict[tuple[str, int], str | None] = {}  # the source of a function when it was first given


def name_of(given: Any, kind: str) -> str:
    """A text that stands for what a user gave in Python.

    ``FILE.py:NAME`` for a function at the top of a file, which other processes and the command
    line find as well; else a name that only this process knows.

    Args:
        given: A function, or anything else.
        kind: What it is, such as ``"model"``.
    """
    reference = reference_of(given) if callable(given) else None
    if reference is None:
        digest = f":{_digest(given)}" if callable(given) else ""  # data have a fingerprint
        reference = f"{PREFIX}{kind}:{getattr(given, '__name__', type(given).__name__)}{digest}"
    else:
        _require_unchanged(reference, given)
    HELD[reference] = given
    return reference


def _require_unchanged(reference: str, given: Any) -> None:
    """Refuse a function whose file was edited after Python had read it."""
    now = source_hash(reference)
    if _seen.setdefault((reference, id(given)), now) != now:
        raise SpecError(
            f"{printable(reference)} was edited after it was imported, so the file is not what "
            f"runs; import it anew, or start Python again"
        )


def _digest(given: Any, seen: frozenset[int] = frozenset()) -> str:
    """Twelve digits over a function: its source, its defaults, and what it uses from around it.

    Functions and classes that it uses count by their source, as deep as they can be read; anything
    else by its text.
    """
    try:
        parts = [inspect.getsource(given)]
    except (OSError, TypeError):
        parts = [repr(given)]
    if not isinstance(given, type) and hasattr(given, "__code__"):
        around = inspect.getclosurevars(given)
        parts.append(repr((given.__defaults__, given.__kwdefaults__)))
        used = sorted({**around.nonlocals, **around.globals}.items())
        for name, value in used:
            known = id(value) in seen or getattr(value, "__module__", None) != given.__module__
            if callable(value) and not known:
                parts.append(_digest(value, seen | {id(given)}))
            elif not callable(value) and not isinstance(value, ModuleType):
                parts.append(f"{name}={value!r}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def absolute(text: str) -> str:
    """A reference with the whole path of its file; any other text as it is."""
    if not is_reference(text) or text.startswith(PREFIX):
        return text
    path, _, name = text.rpartition(":")
    if not path.endswith(SUFFIX) or _is_of_normkit(path):
        return text
    return f"{Path(path).expanduser().resolve()}:{name}"


def _is_of_normkit(path: str) -> bool:
    """Whether a path such as ``normkit/lab/stochastic.py`` is one of normkit's, and no other's."""
    return path.startswith("normkit/") and not Path(path).is_file() and (PACKAGES / path).is_file()


def is_reference(text: str) -> bool:
    """Whether a text names something of a user's, rather than something of the lab's."""
    if text.startswith(PREFIX):
        return True
    path, _, name = text.rpartition(":")
    return text.endswith(SUFFIX) or (path.endswith(SUFFIX) and name.isidentifier())


def parse_reference(text: str, option: str) -> Reference:
    """Read ``FILE.py:NAME``; ``normkit/lab/...py`` is a file of normkit's, wherever that is.

    Raises:
        SpecError: If the name is missing or there is no such file.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(SUFFIX):
        raise SpecError(
            f"{option} was given {printable(text)}; after the file comes a colon and the name of "
            f"a function in it, such as {printable(text)}:make"
        )
    file = PACKAGES / path if _is_of_normkit(path) else Path(path)
    if not file.is_file():
        raise SpecError(f"{option} was given {printable(text)}, and there is no file {path}")
    return Reference(file.resolve(), name)


def load_function(text: str, option: str) -> Callable[..., Any]:
    """Import the file and give the function.

    Args:
        text: ``FILE.py:NAME``.
        option: Which one named it.

    Raises:
        SpecError: If there is no such file, it cannot be imported, or has no such function.
    """
    if text in HELD or text.startswith(PREFIX):
        return held(text, option)
    reference = parse_reference(text, option)
    module = _imported(reference.path, files_hash([reference.path]), option)
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


def held(text: str, option: str) -> Any:
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


_modules: dict[tuple[Path, str], ModuleType] = {}  # by file and what it said when it was read


def _imported(path: Path, source: str, option: str) -> ModuleType:
    """Import a file under a name of its own, anew where it or what it imports has changed.

    Its folder is where its imports are looked up; afterwards it is the last place for others. No
    compiled files are written there: Python would take one for an edited file of the same size and
    second.
    """
    if (path, source) in _modules:
        return _modules[path, source]
    name, folder = module_name(path), str(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{option}: {printable(path)} cannot be imported; give a Python file")
    module = importlib.util.module_from_spec(spec)
    for beside in import_names(path):  # of another folder, or as it was before
        sys.modules.pop(beside, None)
    sys.modules[name] = module  # what pickles its classes looks there
    register_missing_operators()  # it may import torchvision or timm
    sys.path.insert(0, folder)
    wrote_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SpecError(f"{option}: {path.name} cannot be imported: {told(error)}") from error
    finally:
        sys.dont_write_bytecode = wrote_bytecode
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    _modules[path, source] = module
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
    theirs = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"))
    own = [
        f for f in frames if not f.filename.startswith(theirs) and "site-packages" not in f.filename
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
        texts: ``FILE.py:NAME``; anything else, such as a model of the lab's, is left out. The
            digest of what Python gave and no file names is in its name.

    Returns:
        ``None`` if no text names a file.
    """
    named = [t for t in texts if t and is_reference(t) and not t.startswith(PREFIX)]
    return files_hash([parse_reference(t, "a run").path for t in named]) if named else None


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
