"""The kernels' contract: on a GPU in full, in triton's interpreter a part of it.

Collected where there is a GPU (marked ``gpu``), and in a process with ``TRITON_INTERPRET=1``, which
``test_interpreted.py`` starts: triton reads the variable when kernels are defined.
"""

import dataclasses
import functools
import inspect
import os
from pathlib import Path

import pytest
import torch

import normkit as nk
from normkit.kernels.select import require_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["*"]


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def triton_kernels():
    """Every test of the contract runs with these kernels."""
    require_kernels("triton")
    with nk.use_kernels("triton"):
        yield


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def fast_interpreter(request, monkeypatch):
    """Make the interpreter faster.

    It looks for the builtins of triton's language once, not again for each launch and function. It
    looks for overflows, by computing each sum of integers a second time in 64 bits, only in tests
    marked ``addresses``: the maps of the others are small.
    """
    if INTERPRETED:
        from triton.language import core
        from triton.runtime import interpreter

        def call(self, *args, **kwargs):
            if core.is_builtin(core.load):
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*args, **kwargs)

        def patch_builtin(package, builder, scope):
            for name in builtins_of(package):
                member = getattr(package, name)
                if core.is_builtin(member):
                    interpreter._patch_attr(package, name, member, builder, scope)

        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        monkeypatch.setattr(interpreter, "_patch_builtin", patch_builtin)
        if request.node.get_closest_marker("addresses") is None:
            options = interpreter.interpreter_builder.options
            monkeypatch.setattr(
                interpreter.interpreter_builder,
                "options",
                dataclasses.replace(options, sanitize_overflow=False),
            )


@functools.cache
def builtins_of(package):
    """Names in a part of triton's language that the interpreter replaces."""
    from triton.language import core

    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def take_path(path, monkeypatch):
    """Let groups be taken whole, or the map be streamed over in small blocks with many parts."""
    from normkit.kernels.triton import geometry, passes, plan, pooled, pooled_gradients

    if path == "stream":
        for module, limits in (
            (pooled, "ONE_MAP"), (pooled, "TWO_MAPS"), (pooled_gradients, "TWO_MAPS")
        ):  # fmt: skip
            monkeypatch.setattr(module, limits, geometry.Limits(0, 1))
        monkeypatch.setattr(passes, "ELEMENTS", 8)
        monkeypatch.setattr(plan, "_PLANS", {})


@pytest.fixture
def path(request, monkeypatch):
    """Indirect: ``tile`` or ``stream``."""
    take_path(request.param, monkeypatch)
    return request.param
