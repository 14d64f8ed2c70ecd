"""Build the CPU kernels with the C++ compiler at hand; install without them where there is none."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `python setup.py`, which CI's tests call

from normkit_build import OLDEST_TORCH, compiler, torch_folder
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
NOT_BY_MSVC = (
    "the kernels are written with vector types that GCC and Clang have and MSVC has not, so there "
    "are none on Windows"
)
REASON_NAME = "not_built.txt"  # beside the library, where there is none
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-maybe-uninitialized",  # gcc 12's own headers of intrinsics
]
# The vector code is compiled once for each; the processor at run time decides between them.
INSTRUCTION_SETS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


class NotBuiltError(Exception):
    """The kernels cannot be built here, and why."""


def torch_or_reason() -> Path:
    """Where torch lies."""
    found = torch_folder()
    if found is None:
        raise NotBuiltError(
            f"no torch {'.'.join(map(str, OLDEST_TORCH))} or newer was found when normkit was built"
        )
    return found


def compiler_or_reason() -> list[str]:
    """How the compiler is called."""
    found = compiler()
    if sys.platform == "win32" or (found and Path(found[0]).stem == "cl"):
        raise NotBuiltError(NOT_BY_MSVC)
    if found is None:
        raise NotBuiltError("no C++ compiler was found when normkit was built")
    return found


def run(command: list[str]) -> None:
    """Run a compiler; its own words are the reason when it fails."""
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        raise NotBuiltError(f"the compiler {command[0]} does not start: {error}") from error
    if result.returncode != 0:
        raise NotBuiltError(f"the compiler failed:\n{' '.join(command)}\n{result.stderr}")


def compile_jobs(folder: Path) -> dict[Path, list[str]]:
    """Object file -> arguments of the compiler, the baseline's vector code first.

    The linker keeps the first of equal inline functions, so a processor without wide vectors never
    meets one that was compiled for them.
    """
    variants = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {}
    major, minor = OLDEST_TORCH
    target = f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48)}ULL"
    define = ["-DNORMKIT_X86_VARIANTS"] if variants else []
    include = ["-isystem", str(torch_or_reason() / "include"), target, *define]
    vector_code = str(SOURCES / "kernels.cpp")
    jobs = {folder / "kernels.o": ["-DNORMKIT_ISA=baseline", "-c", vector_code]}
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name != "kernels.cpp":
            jobs[folder / f"{source.stem}.o"] = [*include, "-c", str(source)]
    for name, flags in variants.items():
        jobs[folder / f"kernels_{name}.o"] = [f"-DNORMKIT_ISA={name}", *flags, "-c", vector_code]
    return jobs


def build_library(output: Path, objects: Path, extra_flags: list[str]) -> None:
    """Compile every source and link the library."""
    command = [*compiler_or_reason(), *FLAGS, *extra_flags]
    jobs = compile_jobs(objects)
    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The slowest files are the vector code: start them first.
        order = sorted(jobs, key=lambda path: not path.stem.startswith("kernels"))
        list(pool.map(lambda path: run([*command, *jobs[path], "-o", str(path)]), order))
    torch_library = ["-L", str(torch_or_reason() / "lib"), "-ltorch_cpu"]
    run([*command, "-shared", *map(str, jobs), *torch_library, "-o", str(output)])


class FromNothing(build):
    """Build into an empty folder: what an earlier build left there is not of these sources."""

    def run(self) -> None:
        """Empty it, then build."""
        folder = Path(self.build_lib)
        if folder.resolve() != Path("src").resolve():
            shutil.rmtree(folder / "normkit", ignore_errors=True)
            (folder / "normkit_program.py").unlink(missing_ok=True)
        super().run()


class BuildKernels(build_ext):
    """Build the library with plain calls of the compiler, on torch's stable ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name it without a Python version: the library does not know Python."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or say why not, and leave the reason where the library would be."""
        output = Path(self.get_ext_fullpath(ext.name))
        reason = output.with_name(REASON_NAME)
        output.parent.mkdir(parents=True, exist_ok=True)
        for old in (output, reason):
            old.unlink(missing_ok=True)
        extra = os.environ.get("NORMKIT_CXXFLAGS", "").split()
        try:
            build_library(output, Path(self.build_temp) / "csrc", extra)
        except NotBuiltError as error:
            sys.stderr.write(
                f"normkit: installed without its CPU kernels (slower, same results): {error}\n"
            )
            reason.write_text(f"{error}\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        """List the library only where it was built."""
        return [path for path in super().get_outputs() if Path(path).exists()]


class AnyPython(bdist_wheel):
    """Tag the wheel for its platform alone: one file serves every Python from 3.11."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("normkit.kernels.cpu._C", sources=[], optional=True)],
    cmdclass={"build": FromNothing, "build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
