"""Which kernels compute a call, what is said about it, and what happens without a compiler."""

import os
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
import torch
from torch.func import vmap

import normkit as nk
from normkit.kernels import cpu, select

X = torch.randn(4, 6, 5, 3)
LAYER = nk.GroupNorm(6, num_groups=3)

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")


@needs_kernels
def test_the_best_kernels_are_taken():
    found = nk.explain(LAYER, X)
    assert found.kernels == "cpu"
    assert found.reason.startswith("the C++ kernels compute this (vector code: ")
    assert "1 of 4 examples, 2 of 6 channels, 15 of 15 positions" in str(found)


@needs_kernels
def test_a_block_chooses_also_when_it_is_left_by_an_error():
    for outer in ("reference", "cpu"):
        with nk.use_kernels(outer):
            with nk.use_kernels("reference"):
                assert nk.explain(LAYER, X).kernels == "reference"
            with pytest.raises(nk.InputTypeError), nk.use_kernels("reference"):
                nk.explain(None, X)
            assert nk.explain(LAYER, X).kernels == outer
    assert nk.explain(LAYER, X).kernels == "cpu"


@needs_kernels
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_chosen_kernels_are_the_ones_that_run(name, monkeypatch):
    calls, operators = [], cpu.operators
    kept = operators.pooled_forward
    monkeypatch.setattr(operators, "pooled_forward", lambda *a: calls.append(1) or kept(*a))
    with nk.use_kernels(name):
        LAYER(X)
    assert len(calls) == (name == "cpu")


def test_what_the_kernels_cannot_do_is_said():
    seen = []

    def call(x):
        seen.append(nk.explain(LAYER, x))
        return LAYER(x)

    vmap(call)(X[None])
    assert seen[0].kernels == "reference"
    assert seen[0].reason.startswith("the call is under a torch.func transform, which")
    elsewhere = nk.explain(LAYER, X.to("meta"))
    assert elsewhere.reason == "the input is on meta, which the C++ kernels do not compute"


def test_positional_norm_is_explained():
    assert "the 6 channels of each position" in str(nk.explain(nk.PositionalNorm(6), X))


def test_other_layers_are_not_explained():
    with pytest.raises(nk.InputTypeError, match="given a BatchNorm2d; it explains normkit's own"):
        nk.explain(torch.nn.BatchNorm2d(6), X)


def test_unknown_kernels_are_refused():
    text = "no kernels 'cuda'; these are known: reference, cpu, triton"
    with pytest.raises(nk.KernelError, match=text), nk.use_kernels("cuda"):
        pass


def in_a_process(code, **environment):
    """Run code in a process of its own; its output."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_environment_chooses():
    code = (
        "import torch, normkit as nk;print(nk.explain(nk.BatchNorm(2), torch.ones(2, 2)).kernels)"
    )
    assert in_a_process(code, NORMKIT_KERNELS="reference") == "reference"


def test_an_unknown_name_in_the_environment_is_refused():
    code = (
        "import torch, normkit as nk\n"
        "try: nk.BatchNorm(2)(torch.randn(4, 2))\n"
        "except nk.KernelError as error: print(error)"
    )
    assert "no kernels 'gpu'" in in_a_process(code, NORMKIT_KERNELS="gpu")


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_triton_does_not_compute_on_the_cpu_outside_its_interpreter():
    code = """
import sys, torch, normkit as nk
layer, x = nk.BatchNorm(2), torch.randn(4, 2)
layer(x)
assert "triton" not in sys.modules
with nk.use_kernels("triton"):
    layer(x)
    print(nk.explain(layer, x))
"""
    said = in_a_process(code, TRITON_INTERPRET="0").splitlines()[-1]
    assert said == (
        "reference kernels: the input is on cpu, which the Triton kernels compute only in triton's "
        "interpreter (TRITON_INTERPRET=1)"
    )


@needs_triton
def test_the_environment_chooses_triton_in_its_interpreter():
    code = (
        "import torch, normkit as nk;print(nk.explain(nk.BatchNorm(2), torch.ones(2, 2)).kernels)"
    )
    assert in_a_process(code, NORMKIT_KERNELS="triton", TRITON_INTERPRET="1") == "triton"


def test_without_triton_layers_run_and_say_why():
    code = """
import sys, torch
sys.modules["triton"] = None
import normkit as nk
try:
    with nk.use_kernels("triton"):
        pass
except nk.KernelError as error:
    print(error)
"""
    said = in_a_process(code)
    assert said.startswith("the triton kernels were asked for; triton is not installed; `pip")


def test_gpus_get_the_triton_kernels_or_the_reason_why_not(monkeypatch):
    x = torch.empty(2, 2, device="meta")
    monkeypatch.setitem(select._BEST, "meta", "triton")
    monkeypatch.setattr(select, "_triton_obstacle", lambda device: None)
    by_triton = select.Decision("operator", "triton", "the Triton kernels compute this")
    monkeypatch.setattr(select, "_by_triton", lambda: by_triton)
    assert select.decide(x) is by_triton
    monkeypatch.setattr(select, "_triton_obstacle", lambda device: "the GPU is old")
    assert select.decide(x) == select.Decision("formula", "reference", "the GPU is old")


def test_without_the_library_layers_run_and_say_why():
    code = """
from pathlib import Path
import torch
exists = Path.exists
Path.exists = lambda path: path.name != "_C.so" and exists(path)
import normkit as nk
x = torch.randn(4, 6, 5, 3, requires_grad=True)
for layer in (nk.BatchNorm(6), nk.GroupNorm(6, num_groups=3), nk.PositionalNorm(6)):
    layer(x).sum().backward()
    print(nk.explain(layer, x).kernels)
print(nk.explain(layer, x).reason)
try:
    with nk.use_kernels("cpu"):
        pass
except nk.KernelError as error:
    print(error)
"""
    lines = in_a_process(code).splitlines()
    assert lines[:3] == ["reference"] * 3
    assert lines[3].startswith("the CPU kernels were not built")
    assert lines[4].startswith("the cpu kernels were asked for; the CPU kernels were not built")


def test_importing_takes_no_library_but_torch_and_jaxtyping():
    code = """
import sys, torch
def packages(): return {module.split(".")[0] for module in sys.modules}
before = packages()
import normkit
print(*sorted(packages() - before - set(sys.stdlib_module_names)))
"""
    found = set(in_a_process(code).split())
    assert found <= {"normkit", "jaxtyping", "wadler_lindig", "typing_extensions"}


def test_blocks_of_several_threads_do_not_disturb_each_other():
    x, layer, seen = torch.randn(2, 4, 3), nk.BatchNorm(4), {}
    steps = threading.Barrier(2)

    def run(name, first, second):
        with nk.use_kernels(first):
            steps.wait()
            seen[name] = [nk.explain(layer, x).kernels]
            with nk.use_kernels(second):
                steps.wait()
                seen[name].append(nk.explain(layer, x).kernels)
            steps.wait()
            seen[name].append(nk.explain(layer, x).kernels)
            if name == "b":
                steps.wait()  # a has left its block before b leaves its own
        if name == "a":
            steps.wait()
        seen[name].append(nk.explain(layer, x).kernels)

    before = nk.explain(layer, x).kernels
    threads = [
        threading.Thread(target=run, args=("a", "reference", "cpu")),
        threading.Thread(target=run, args=("b", "cpu", "reference")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen["a"][:3] == ["reference", "cpu", "reference"]
    assert seen["b"][:3] == ["cpu", "reference", "cpu"]
    assert nk.explain(layer, x).kernels == before


def test_a_thread_without_a_block_takes_part_in_the_one_that_is_open():
    x, layer, seen = torch.randn(2, 4, 3), nk.BatchNorm(4), []
    with nk.use_kernels("reference"):
        thread = threading.Thread(target=lambda: seen.append(nk.explain(layer, x).kernels))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_explain_says_what_a_call_does_otherwise():
    x = torch.randn(2, 6, 3)
    layer = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True)
    assert "torch's operators" not in nk.explain(layer, x).reason
    layer.batch.running_mean = torch.zeros(12)[::2]
    reason = nk.explain(layer, x).reason
    assert "with torch's operators on tables, because the estimates are not contiguous" in reason
    for composite in (layer, nk.InstanceBatchNorm(6)):
        composite.batch.register_forward_hook(lambda *args: None)
        assert "by itself, because hooks watch one of them" in nk.explain(composite, x).reason
    mask = torch.ones(2, 3, dtype=torch.bool)
    found = nk.explain(nk.BatchNorm(6), x, mask)
    assert (found.kernels, "over a mask" in found.reason) == ("reference", True)


def test_the_function_takes_the_layers_own_mix_logit():
    layer, x = nk.GroupNormPlus(6, num_groups=3), torch.randn(4, 6, 5)
    for logit in (layer.mix_logit, layer.mix_logit[0]):
        y = nk.functional.group_norm_plus(x, 3, logit, training=True)
        assert torch.allclose(y, nk.GroupNormPlus(6, num_groups=3)(x), atol=1e-6)
