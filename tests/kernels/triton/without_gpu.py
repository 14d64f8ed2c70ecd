"""Compiles every kernel that a call starts for a GPU that is not there, and runs none."""

from contextlib import contextmanager
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class _Driver:
    """What triton asks of a GPU's driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

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
