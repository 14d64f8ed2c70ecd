"""Run the examples and put what they print into them, below the section that prints it.

python docs/update_examples.py [NAME ...]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

from tutorials import PRINTED, SECTION, command, examples, sections

MARK = "\x1e"
# Of torchrun's processes the first one prints.
PRINT_MARK = f'__import__("os").environ.get("RANK", "0") == "0" and print("{MARK}")'


def main() -> None:
    """Rewrite the examples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="examples, such as own_norm; all by default")
    names = parser.parse_args().names
    for path in examples():
        if not names or path.stem in names:
            path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


def updated(source: str) -> str:
    """Return the example with what it prints now."""
    marked = written(source, [PRINT_MARK] * len(sections(source)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.py"
        path.write_text(marked, encoding="utf-8")
        arguments = [str(path) if each.endswith(".py") else each for each in command(source)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            arguments, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    return written(source, [_comment(part) for part in run.stdout.split(f"{MARK}\n")])


def _comment(printed: str) -> str:
    return "\n".join(f"{PRINTED}{line}".rstrip() for line in printed.strip("\n").splitlines())


def written(source: str, endings: list[str]) -> str:
    """Write an example again, with another ending after each section's code."""
    parts = re.split(rf"^(?={SECTION})", source, flags=re.MULTILINE)
    return "".join(_ended(part, ending) for part, ending in zip(parts, endings, strict=False))


def _ended(part: str, ending: str) -> str:
    shown = PRINTED.rstrip()
    text = "".join(line for line in part.splitlines(True) if not line.startswith(shown))
    code = text.rstrip()
    return (
        f"{code}\n\n{ending}{part[len(part.rstrip()) :]}"
        if ending
        else f"{code}{text[len(code) :]}"
    )


if __name__ == "__main__":
    main()
