"""Compiles every kernel that a call starts for a GPU that is not there, and runs none."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from normkit.kernels.triton import plan

STARTED = []
"""Every start. One list: a compiled kernel keeps what starts it."""


class _Driver:
    """What triton asks of a GPU's driver; what would start notes its name and its arguments."""

    def __init__(self, capability):
        self.capability = capability
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source, metadata):
        def start(*arguments):
            STARTED.append((metadata.name, arguments[:4], arguments[9:]))

        return start

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiled_for(capability):
    """Inside, kernels are compiled to machine code when they are started, and do not run.

    Yields:
        Every kernel that was compiled, with the name of its function.
    """
    found = []
    start = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        kernel = start(self, *args, grid=grid, warmup=True, **options)
        found.append((self.__name__, kernel))
        return kernel

    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        with patch.object(triton.JITFunction, "run", compile_only):
            yield found
    finally:
        driver._active = before


@contextmanager
def started_on(capability):
    """Inside, kernels are compiled and started as on a GPU, and do not run.

    Yields:
        Every start: the kernel's name, its grid and stream, and its arguments.
    """
    before = driver._active
    driver.set_active(_Driver(capability))
    STARTED.clear()
    try:
        with patch.object(plan, "_current_stream", lambda device: 0):
            yield STARTED
    finally:
        driver._active = before
