"""How many Python functions of ours a call goes through before an operator computes it."""

import sys
from pathlib import Path

import pytest
import torch

import normkit as nk
from cases import MAIN, PLAIN

OURS = str(Path(nk.__file__).parent)


def calls_before_the_operator(layer, x):
    """Names of our functions from ``forward`` to the first registered operator."""
    found, is_through = [], False

    def note(frame, event, _):
        nonlocal is_through
        code = frame.f_code
        is_through |= event == "call" and code.co_qualname == "OpOverload.__call__"
        if event == "call" and not is_through and code.co_filename.startswith(OURS):
            found.append(code.co_qualname)

    layer(x)  # what is looked up once
    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert is_through
    return found


@pytest.mark.skipif(not nk.kernels.cpu.available(), reason="needs the C++ kernels")
@pytest.mark.parametrize("case", [c for c in MAIN if c.name != "gw"], ids=str)
def test_a_training_call_takes_few_steps_to_the_operator(case):
    x = torch.randn(4, 6, 5, 3, requires_grad=True)
    found = calls_before_the_operator(case.make(), x)
    assert found[0] == "NormLayer.forward"
    assert len(found) <= (15 if case in PLAIN else 30), found
