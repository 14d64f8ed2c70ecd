"""The page on installing says what this release has, and its commands work."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import normkit as nk

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
sys.path.insert(0, str(ROOT / "docs" / "site"))
archive = pytest.importorskip("archive", reason="mkdocs is not installed: pip install '.[docs]'")
sys.path.pop(0)


def test_versions_are_of_this_release():
    assert set(re.findall(r"normkit-(\d+\.\d+\.\d+)", PAGE)) == {nk.__version__}
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in PAGE
    oldest = PROJECT["dependencies"][0].removeprefix("torch>=")
    assert f"torch {oldest} and newer" in PAGE


def test_the_table_has_every_extra_that_is_for_users():
    extras = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert set(extras) == PROJECT["optional-dependencies"].keys() - {"docs", "test"}


def test_completion_is_installed_by_the_commands_as_printed(tmp_path):
    program = tmp_path / "bin" / "normkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m normkit "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    commands = re.findall(r"^    ((?:mkdir|normkit --tyro).*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 4
    subprocess.run(["bash", "-ec", "\n".join(commands)], env=environment, check=True)
    for path in (".local/share/bash-completion/completions/normkit", ".zfunc/_normkit"):
        assert "compare" in (tmp_path / path).read_text()


def test_the_site_has_the_archive_that_the_page_names(site):
    (name,) = set(re.findall(r"normkit-[\d.]+\.tar\.gz", PAGE))
    with tarfile.open(site / name) as packed:
        names = {path.partition("/")[2] for path in packed.getnames()}
    assert f'href="{name}"' in (site / "install.html").read_text()
    of_top = ("Makefile", "README.md", "pyproject.toml", "setup.py", "normkit_build.py")
    assert {*of_top, "constraints.txt", "mkdocs.yml", ".gitignore", ".ci/run"} <= names
    folders = ("benchmarks", "csrc", "docs", "examples", "src", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = {"__pycache__", "normkit.egg-info"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if not made & set(path.parts) and path.suffix != ".so" and path.name != "not_built.txt"
    }
    assert expected <= names
    assert not [path for path in names if path.endswith((".so", ".pyc"))]


def test_every_tutorial_has_its_script(site):
    scripts = sorted(path.name for path in (site / "tutorials" / "scripts").iterdir())
    assert scripts == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    for name in scripts:
        page = site / "tutorials" / name.replace("_", "-").replace(".py", ".html")
        assert f'href="scripts/{name}"' in page.read_text(encoding="utf-8")


def test_a_source_that_cannot_be_packed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "BUILD", "raise SystemExit('setuptools is old')")
    with pytest.raises(RuntimeError, match="cannot be built: setuptools is old"):
        archive.built(tmp_path)
