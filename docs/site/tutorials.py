"""A hook of MkDocs: the examples as pages, and what both the pages and the tests read of them.

An example is a script. Its docstring has the title, what it is about, and the commands that run it,
indented. A line ``# %% Title`` begins a section; the comment below it is its text; lines
``# > ...`` are what the section prints, as ``python docs/update_examples.py`` has written it there.
"""

import ast
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from pages import relinked

FOLDER = Path(__file__).parents[2] / "examples"
SECTION, PRINTED = "# %%", "# > "
SCRIPTS = "scripts"  # the folder of the scripts, beside the pages
# Where torchvision was built for another torch, libraries that import it run all the same.
RUN = """
import runpy, sys
from normkit.lab.torchvision_ops import register_missing_operators
register_missing_operators()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of an example.

    Args:
        title: What stands after ``# %%``; empty for what comes before the first section.
        text: The comment below, as Markdown.
        code: The code, without what it prints.
        printed: What it prints, by the example.
    """

    title: str
    text: str
    code: str
    printed: str


def sections(source: str) -> list[Section]:
    """Read an example; the first section has what follows the docstring."""
    parts = re.split(rf"^{SECTION} ?", source, flags=re.MULTILINE)
    return [_read(part, is_first=number == 0) for number, part in enumerate(parts)]


def _read(part: str, *, is_first: bool) -> Section:
    if is_first:
        tree = ast.parse(part)
        title, lines = "", part.splitlines()[tree.body[0].end_lineno or 0 :]
    else:
        title, *lines = part.splitlines()
    count = 0 if is_first else next((i for i, x in enumerate(lines) if x[:1] != "#"), len(lines))
    text = "\n".join(line[2:] for line in lines[:count])
    shown = [line for line in lines[count:] if line.startswith(PRINTED.rstrip())]
    code = [line for line in lines[count:] if line not in shown]
    printed = "\n".join(line.removeprefix(PRINTED.rstrip()).removeprefix(" ") for line in shown)
    return Section(title.strip(), text, "\n".join(code).strip(), printed)


def introduction(source: str) -> str:
    """The docstring of an example."""
    return ast.get_docstring(ast.parse(source)) or ""


def command(source: str) -> list[str]:
    """How the example is run, by its docstring, with this Python."""
    (line,) = re.findall(r"^    ((?:python|torchrun) .*)$", introduction(source), re.MULTILINE)
    program, *arguments = shlex.split(line)
    start = ["-m", "torch.distributed.run"] if program == "torchrun" else ["-c", RUN]
    return [sys.executable, *start, *arguments]


def page(source: str, name: str) -> str:
    """The example as Markdown, with its script for download.

    Args:
        source: The script.
        name: Its file's name.
    """
    title, _, text = introduction(source).partition("\n")
    about, commands = re.split(r"^(?=    )", text.strip(), maxsplit=1, flags=re.MULTILINE)
    download = (
        f"[Download the script]({SCRIPTS}/{name}) or copy the code below into a file of that name. "
        f"It needs [normkit with its extra `lab`](../docs/install.md). Another version of torch or "
        f"another processor gives other trained numbers than those below."
    )
    commands = commands.replace(f"examples/{name}", name)
    parts = [f"# {title.rstrip('.')}", about.strip(), download, commands.rstrip()]
    for section in sections(source):
        parts += [f"## {section.title}" if section.title else "", section.text]
        parts += [
            _fenced("python", section.code),
            _fenced("{ .text .printed .no-copy }", section.printed),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```" if text else ""


def examples() -> Iterable[Path]:
    """The scripts."""
    return sorted(FOLDER.glob("*.py"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each example, and its script for download."""
    for path in examples():
        target = f"tutorials/{path.stem.replace('_', '-')}.md"
        text = page(path.read_text(encoding="utf-8"), path.name)
        text = relinked(text, f"examples/{path.name}", target)
        files.append(File.generated(config, target, content=text))
        script = File.generated(config, f"tutorials/{SCRIPTS}/{path.name}", abs_src_path=str(path))
        script.inclusion = InclusionLevel.INCLUDED  # mkdocs.yml excludes the scripts of docs/
        files.append(script)
    return files
