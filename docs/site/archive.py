"""A hook of MkDocs: the source archive that pip installs, and the link to it."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
MARK = "<!-- on the site: the archive -->"
FOLDERS = (".ci", ".github", "benchmarks", "csrc", "docs", "examples", "src", "tests")
BUILD = "import sys, normkit_build; normkit_build.build_sdist(sys.argv[1])"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the archive."""
    with TemporaryDirectory() as folder:
        path = built(Path(folder))
        files.append(File.generated(config, path.name, content=path.read_bytes()))
    return files


def built(folder: Path) -> Path:
    """Build the archive from a copy of the project: setuptools writes beside what it packs."""
    copy = folder / "sources"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "not_built.txt")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=copy,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the source archive cannot be built: {done.stderr}")
    (path,) = folder.glob("*.tar.gz")
    return path


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the link to the archive where the page has the mark."""
    if MARK not in markdown:
        return markdown
    (name,) = (file.src_uri for file in files if file.src_uri.endswith(".tar.gz"))
    return markdown.replace(
        MARK,
        f"Download [{name}]({name}), the whole project, into the folder that you work in.",
    )
