"""Every contract on values holds for every set of kernels."""

import shutil

import pytest

import normkit as nk


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    """Run the test with one set of kernels, then with the other."""
    if request.param == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("there is no C++ compiler, so there are no CPU kernels")
    with nk.use_kernels(request.param):
        yield request.param
