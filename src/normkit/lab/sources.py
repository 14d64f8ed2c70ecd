"""Which Python files a file of a user's imports, and a digest over them."""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIX = ".py"


def files_hash(paths: Sequence[Path]) -> str:
    """Twelve hexadecimal digits over files and those in their folders that they import."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(_with_imports(path)):
            digest.update(str(file.relative_to(path.parent)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def import_names(path: Path) -> list[str]:
    """Names by which Python knows the files beside that a file imports."""
    names = []
    for file in _with_imports(path) - {path}:
        parts = file.relative_to(path.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def _with_imports(path: Path) -> set[Path]:
    """The file, and the files in and below its folder that it imports, and those they import."""
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
        for name in _imported(tree, file, path.parent):
            waiting += _files_of(name, path.parent)
    return found


def _files_of(name: tuple[str, ...], root: Path) -> Iterator[Path]:
    """The file or package of a name, and the packages that it is in."""
    for end in range(1, len(name) + 1):
        beside = root.joinpath(*name[:end])
        candidates = (beside.with_suffix(SUFFIX), beside / "__init__.py")
        yield from (candidate for candidate in candidates if candidate.is_file())


def _imported(tree: ast.AST, file: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """Names that are imported, from the folder of the first file on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                package = file.parent.relative_to(root).parts
                base = (*package[: len(package) + 1 - node.level], *base)
            yield base
            yield from ((*base, alias.name) for alias in node.names)
