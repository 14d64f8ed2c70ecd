"""What `import normkit` imports, and what it waits with."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import normkit as nk


def test_every_public_name_is_there():
    assert sorted(nk.__all__) == sorted(set(nk.__all__))
    for name in nk.__all__:
        assert getattr(nk, name) is not None
        assert name in dir(nk)


def test_what_comes_later_is_what_type_checkers_see():
    tree = ast.parse(Path(nk.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "normkit"
    }
    assert seen == nk.LAZY_IMPORTS


def test_importing_it_does_not_import_what_comes_later():
    code = f"""
import sys, normkit
early = [m for m in {list(nk.LAZY_IMPORTS)} if m in sys.modules]
assert not early, early
normkit.convert_norm
assert "normkit.convert" in sys.modules and "normkit.tune" not in sys.modules
assert callable(normkit.fold) and callable(normkit.weights.standardize)
import normkit.folding.plan
assert callable(normkit.fold)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'normkit' has no attribute 'convert_nrom'"):
        nk.convert_nrom  # noqa: B018 - looked up on purpose
