"""What builds normkit: setuptools, with torch's headers found or asked for.

The kernels are compiled against torch's headers, but the environment that pip makes for a build is
empty. Torch is looked for in the environment that normkit is installed into, and where there is
none it becomes a requirement of the build.
"""

import os
import re
import shutil
import site
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

NEEDED = 77  # of setuptools: licences as SPDX expressions, wheels without the package of that name
OLDEST_TORCH = (2, 11)  # the stable ABI that the library asks for


def _require_setuptools() -> None:
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or int(found.partition(".")[0]) < NEEDED:
        raise SystemExit(
            f"normkit is built by setuptools {NEEDED} or newer, and there is {found} here: "
            f'run  pip install --upgrade "setuptools>={NEEDED}"  first'
        )


_require_setuptools()

from setuptools import build_meta  # noqa: E402 - after what says that it is missing
from setuptools.build_meta import *  # noqa: E402, F403 - every hook but those below


def get_requires_for_build_wheel(config_settings=None):  # noqa: ANN001, ANN201 - PEP 517's
    """What a wheel needs to be built."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_needed()


def get_requires_for_build_editable(config_settings=None):  # noqa: ANN001, ANN201 - PEP 660's
    """What an editable install needs to be built."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_needed()


def _torch_if_needed() -> list[str]:
    """Torch, where it is not at hand and there is a compiler to use it."""
    if torch_folder() is not None or compiler() is None or sys.platform == "win32":
        return []
    return [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]


def torch_folder() -> Path | None:
    """Where a torch that is new enough lies, without the seconds that importing it takes.

    It is the one that can be imported, else that of the environment that normkit is installed into.
    """
    spec = find_spec("torch")
    imported = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    paths = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))
    folders = [*paths, *site.getsitepackages(), site.getusersitepackages()]
    for folder in (*imported, *(Path(each) / "torch" for each in folders)):
        if _is_new_enough(folder):
            return folder
    return None


def _is_new_enough(folder: Path) -> bool:
    about = folder / "version.py"
    if not (folder / "include").is_dir() or not about.is_file():
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", about.read_text(encoding="utf-8"))
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_TORCH


def compiler() -> list[str] | None:
    """The C++ compiler, if there is one: ``$CXX``, else what the system calls one."""
    named = os.environ.get("CXX")
    if named:
        return named.split()
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    return None if found is None else [found]
