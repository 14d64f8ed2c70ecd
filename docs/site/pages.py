"""A hook of MkDocs: pages of the repository outside ``docs``, and links that GitHub understands.

The pages are written to be read on GitHub as well. Links there lead to any file of the repository:
here they lead to that page of the site, or to a copy of the file. GitHub begins a list after any
line, Markdown proper only after an empty one.
"""

import re
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "tutorials/index.md",
}
HOME = "docs/site/home.md"
HIDDEN = "---\nhide: [navigation]\n---\n"  # a sidebar with nothing but the page itself
LINK = re.compile(r"(?<=\])\(([^)\s:]+)\)")
NAMED_BY_PATH = re.compile(r"\[([\w./-]+\.md)\](?=\(([^)\s:#]+)(?:#[^)\s]*)?\))")
FENCE = re.compile(r"^ *```")
ITEM = re.compile(r"^( *)(?:[-*]|\d+\.) ")
OTHER = re.compile(r"^ *(?:[-*] |[>|#]|\d+\. |```)|^    ")  # begins no paragraph


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, a list of the records, and every other file that a page links to."""
    for source, target in ROOT_PAGES.items():
        text = relinked((ROOT / source).read_text(encoding="utf-8"), source, target)
        text = home(text) if target == "index.md" else text
        files.append(File.generated(config, target, content=text))
    files.append(File.generated(config, "records/index.md", content=list_of_records()))
    for source in sorted(linked_files()):
        files.append(File.generated(config, site_path(source), abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the files are on the site, and give lists their empty line."""
    if page.file.generated_by is None:
        markdown = relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return with_lists(markdown)


def home(readme: str) -> str:
    """The README as the first page: where to begin stands before the first code."""
    begin = relinked((ROOT / HOME).read_text(encoding="utf-8"), HOME, "index.md")
    return HIDDEN + readme.replace("```python", f"{begin}\n```python", 1)


def site_path(source: str) -> str | None:
    """Where a file of the repository is on the site; None for folders that are not there."""
    if source in ROOT_PAGES:
        return ROOT_PAGES[source]
    if source == "docs/records":
        return "records/index.md"
    if (ROOT / source).is_dir():
        return None
    if re.fullmatch(r"examples/\w+\.py", source):
        return f"tutorials/{Path(source).stem.replace('_', '-')}.md"
    return source.removeprefix("docs/") if source.startswith("docs/") else f"files/{source}"


def relinked(markdown: str, source: str, target: str) -> str:
    """Return the page ``source`` of the repository with the links of ``target`` on the site."""

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        linked = normpath(f"{Path(source).parent.as_posix()}/{path}")
        if not path or not (ROOT / linked).exists():
            return match[0]
        found = site_path(linked)
        return (
            match[0] if found is None else f"({relpath(found, Path(target).parent)}{mark}{anchor})"
        )

    def title(match: re.Match[str]) -> str:
        page = ROOT / source
        linked = page.parent / match[2]
        if not linked.is_file():
            return match[0]
        return f"[{linked.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}]"

    return LINK.sub(link, NAMED_BY_PATH.sub(title, markdown))


def linked_files() -> set[str]:
    """Files outside ``docs`` that pages link to and that are no pages themselves."""
    found = set()
    for page in [*map(Path, ROOT_PAGES), *(p.relative_to(ROOT) for p in ROOT.glob("docs/**/*.md"))]:
        for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            linked = normpath(f"{page.parent.as_posix()}/{link.partition('#')[0]}")
            if (ROOT / linked).is_file() and (site_path(linked) or "").startswith("files/"):
                found.add(linked)
    return found


def list_of_records() -> str:
    """Every record, with its size."""
    records = sorted((ROOT / "docs" / "records").glob("*.json*"))
    rows = [f"| [{path.name}]({path.name}) | {path.stat().st_size // 1000} |" for path in records]
    head = "# Records\n\nThe measurements that the pages' tables and figures are made from.\n\n"
    return head + "\n".join(["| file | kB |", "|---|---:|", *rows]) + "\n"


def with_lists(markdown: str) -> str:
    """Put an empty line before each list that begins right after a paragraph."""
    lines, is_code, is_paragraph = [], False, False
    for line in markdown.split("\n"):
        if is_paragraph and not is_code and ITEM.match(line):
            lines.append("")
        is_code ^= bool(FENCE.match(line))
        is_paragraph = bool(line.strip()) and (is_paragraph or not lines or not lines[-1].strip())
        is_paragraph = is_paragraph and not OTHER.match(line)
        lines.append(line)
    return "\n".join(lines)
