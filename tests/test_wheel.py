"""The wheel that `make wheel` builds, and how other wheels are built.

``NORMKIT_WHEEL`` names one; `make test-oldest` gives its own.
"""

import os
import re
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import normkit as nk

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = PROJECT["tool"]["cibuildwheel"]


@pytest.fixture(scope="module")
def wheel():
    path = os.environ.get("NORMKIT_WHEEL")
    if path is None:
        pytest.skip("NORMKIT_WHEEL is not set (make test-oldest sets it)")
    return Path(path)


def test_one_wheel_serves_every_python(wheel):
    about = rf"normkit-{re.escape(nk.__version__)}-py3-none-manylinux_2_\d+_(x86_64|aarch64)\.whl"
    assert re.fullmatch(about, wheel.name)
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(about).decode())
    assert metadata["Requires-Python"] == PROJECT["project"]["requires-python"]
    required = metadata.get_all("Requires-Dist")
    assert set(PROJECT["project"]["dependencies"]) <= set(required)


def test_the_wheel_has_the_kernels_and_all_files_of_the_package_and_no_others(wheel):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    source = ROOT / "src"
    package = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    }
    built = {"normkit/kernels/cpu/_C.so"}
    absent = built | {"normkit/kernels/cpu/not_built.txt"}
    info = {name for name in names if ".dist-info/" in name}
    assert any(name.endswith("licenses/LICENSE") for name in info)
    assert names - info == (package - absent) | built


def test_the_platforms_of_the_workflow_are_those_that_are_configured():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    jobs = workflow["jobs"]["wheel"]["strategy"]["matrix"]["include"]
    configured = {name.partition("-")[2].replace("_", "-", 1) for name in BUILD["build"].split()}
    assert {job["platform"] for job in jobs} == configured


def test_wheels_are_compiled_beside_the_oldest_torch_and_leave_torchs_libraries_out():
    oldest = re.search(
        r"^torch==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE
    )
    for part in (BUILD, BUILD["linux"]):
        assert f"torch=={oldest.group(1)}" in part["before-build"]
    assert "--exclude libtorch_cpu.so" in BUILD["linux"]["repair-wheel-command"]
    assert "--exclude libtorch_cpu.so" in (ROOT / "Makefile").read_text()
