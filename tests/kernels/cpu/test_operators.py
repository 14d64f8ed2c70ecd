"""PositionalNorm, given statistics, the four primitives, and the shape functions for tracers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from kernels.cpu import definition
from normkit.kernels import calls, cpu, nodes
from normkit.kernels.cpu import library

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")

LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": definition.channels_last}
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2},
    torch.float16: {"rtol": 3e-3, "atol": 5e-3},
}


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def positional(x, weight, bias):
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    return definition.affine((x - mean) / (var + 1e-5).sqrt(), weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 7), (3, 70, 9, 13), (4, 6), (2, 33, 400), (1, 2, 3, 3, 3)], ids=str
)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_positional_norm(shape, dtype, layout, offset):
    if offset and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("16 bits do not hold the offset")
    x, grad, weight, bias = draw(shape, shape, shape[1], shape[1])
    x, grad = LAYOUTS[layout]((x + offset).to(dtype)), grad.to(dtype)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = positional(*exact)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.detach().requires_grad_()]
    inputs += [t.to(wide).detach().requires_grad_() for t in (weight, bias)]
    y, table = nodes.normalize_positions(cpu.operators, *inputs, 1e-5)
    assert y.stride() == x.stride()
    assert_close(y, expected.to(dtype), **TOLERANCE[dtype])
    assert_close(table[0], exact[0].mean(1).flatten(), rtol=1e-6, atol=1e-5)
    grads = torch.autograd.grad(y, inputs, grad)
    for one, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        scale = wanted.abs().max().item() + 1
        assert_close(one.double() / scale, wanted / scale, **TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_groups", [1, 3, 6, 12])
@pytest.mark.parametrize("shape", [(2, 6, 4, 6), (17, 6, 2, 2), (2, 6, 150, 160)], ids=str)
def test_given_statistics(shape, num_groups, layout):
    x, grad, weight, bias, mean = draw(shape, shape, 6, 6, num_groups)
    var = torch.rand(num_groups, dtype=torch.float64) + 0.5
    x = LAYOUTS[layout](x)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    rows = x.reshape(shape[0], num_groups, -1)
    normalized = (rows - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    expected = definition.affine(normalized.reshape(shape), weight, bias)
    y = nodes.normalize_given(cpu.operators, x, (mean, var), weight, bias, (num_groups, 1e-5))
    assert_close(y, expected)
    for one, wanted in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        assert_close(one, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ["one for each example", "one for all"])
@pytest.mark.parametrize(
    ("shape", "segment_size"),
    [((3, 5, 6, 4), 24), ((3, 5, 6, 4), 8), ((4, 7), 1), ((2, 70, 3, 3), 9), ((2, 3, 4), 1)],
    ids=str,
)
def test_the_four_primitives(shape, segment_size, dtype, layout, rows):
    num_segments = shape[1] * (torch.Size(shape[2:]).numel() // segment_size)
    table_shape = (1 if rows == "one for all" else shape[0], num_segments)
    x, grad, mean, k1, k2, k3 = draw(shape, shape, *[table_shape] * 4)
    x, grad = (LAYOUTS[layout](t.to(dtype)) for t in (x, grad))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, k1, k2, k3 = (t.to(wide) for t in (mean, k1, k2, k3))
    cells, grads = (t.double().reshape(shape[0], num_segments, -1) for t in (x, grad))
    m, a, b, c = (t.double()[..., None] for t in (mean, k1, k2, k3))
    operators = torch.ops.normkit
    tolerance = TOLERANCE[dtype]

    found = operators.moments(x, segment_size)
    assert_close(found[0].double(), cells.mean(2), rtol=1e-5, atol=1e-6)
    assert_close(found[1].double(), cells.var(2, correction=0), rtol=1e-5, atol=1e-6)
    assert {t.dtype for t in found} == {wide}
    assert {t.dtype for t in operators.moments(x, segment_size, True)} == {torch.float64}

    y = operators.apply(x, mean, k1, k2)
    assert y.stride() == x.stride()
    assert_close(y.double(), (a * (cells - m) + b).reshape(shape), **tolerance)

    sums = operators.reduce_grad(grad, x, mean)
    assert_close(sums[0].double(), grads.sum(2), rtol=1e-4, atol=1e-4)
    assert_close(sums[1].double(), (grads * (cells - m)).sum(2), rtol=1e-4, atol=1e-4)

    dx = operators.combine_grad(grad, x, mean, k1, k2, k3)
    assert dx.stride() == x.stride()
    assert_close(dx.double(), (a * grads + b * (cells - m) + c).reshape(shape), **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_kernels_tell_the_truth(layout):
    operators = torch.ops.normkit
    x, grad, weight, mean = draw((4, 6, 3, 5), (4, 6, 3, 5), 6, 6)
    x, table = LAYOUTS[layout](x), torch.rand(4, 6, dtype=torch.float64)
    buffers = (torch.zeros(6), torch.ones(6), torch.tensor(0))
    pooled = operators.pooled_forward(x, weight, None, 3, 3, 1e-5, True, *buffers, 0.1)[1]
    positions = operators.positional_forward(x, weight, None, 1e-5)[1]
    for name, arguments in {
        "pooled_forward": (x, weight, None, 3, 3, 1e-5, True, *buffers, 0.1),
        "pooled_backward": (grad, x, pooled, weight, 3, 3, 1e-5, True, False),
        "evaluate_forward": (x, mean, weight.abs(), weight, None, 6, 1e-5),
        "evaluate_backward": (grad, x, mean, weight.abs(), weight, 6, 1e-5, True, True),
        "positional_forward": (x, weight, None, 1e-5),
        "positional_backward": (grad, x, positions, weight, 1e-5, True, True),
        "ended_positional_forward": (x, grad, weight, mean, 1e-5, 3, 0.0),
        "ended_positional_backward": (
            grad,
            x,
            positions,
            grad,
            None,
            weight,
            mean,
            1e-5,
            3,
            0.0,
            True,
            True,
            False,
        ),
        "moments": (x, 5),
        "apply": (x, table, table, table),
        "reduce_grad": (grad, x, table),
        "combine_grad": (grad, x, table, table, table, table),
    }.items():
        torch.library.opcheck(getattr(operators, name).default, arguments)


def tiny_layers(x, weight, bias, mean, var):
    kernels = None if torch.compiler.is_compiling() else cpu.operators  # as select.decide says
    running = calls.Running(mean, var, None, 0.1)
    y, _ = nodes.normalize_pooled(kernels, x, weight, bias, calls.Pooling(6, 0, 1e-5), running)
    y, _ = nodes.normalize_positions(kernels, y, weight, bias, 1e-5)
    statistics = weight.detach(), bias.detach().abs()
    return nodes.normalize_given(kernels, y, statistics, weight, bias, (6, 1e-5))


# torch's tracer instantiates the autograd function itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_without_graph_breaks_gives_the_same():
    def run(function):
        sources = draw((4, 6, 3, 5), 6, 6, seed=1)
        sources = [t.requires_grad_() for t in sources]
        buffers = (torch.zeros(6), torch.ones(6))
        y = function(*sources, *buffers)
        return [y.detach(), *buffers, *torch.autograd.grad(y.square().sum(), sources)]

    compiled = torch.compile(tiny_layers, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled), run(tiny_layers), strict=True):
        assert_close(one, other)


def test_export_keeps_the_operators():
    class Model(torch.nn.Module):
        def forward(self, x, weight, bias, mean, var):
            return tiny_layers(x, weight, bias, mean, var)

    arguments = (*draw((4, 6, 3, 5), 6, 6), torch.zeros(6), torch.ones(6))
    exported = torch.export.export(Model(), arguments)
    assert_close(exported.module()(*arguments), tiny_layers(*arguments))
    assert "normkit.pooled_forward" in exported.graph_module.code


def test_every_instruction_set_gives_the_same(tmp_path):
    script = (
        "import sys, torch; from normkit.kernels import calls, cpu, nodes; cpu.require();"
        "x = torch.randn(3, 20, 5, 7, generator=torch.Generator().manual_seed(0));"
        "out = [cpu.instruction_set().encode()];"
        "call = nodes.normalize_pooled; pooling = calls.Pooling(4, 1, 1e-5);"
        "results = [call(cpu.operators, x.to(d), None, None, pooling)[0].float()"
        " for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)];"
        "torch.save(torch.stack(results), sys.argv[1]); print(cpu.instruction_set())"
    )
    results = {}
    for name in ("default", "avx2", "avx512"):
        path = tmp_path / f"{name}.pt"
        environment = {"NORMKIT_CPU_CAPABILITY": name, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        results[done.stdout.strip()] = torch.load(path)
    wide = results["default"]
    for other in results.values():
        assert_close(other[:2], wide[:2], rtol=1e-5, atol=1e-6)
        assert_close(other[2:], wide[2:], rtol=1e-2, atol=2e-2)


def test_a_missing_library_is_a_plain_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_C.so")
    library.why_not.cache_clear()
    try:
        assert not cpu.available()
        with pytest.raises(
            RuntimeError, match=r"were not built: .* has left no reason; install torch and"
        ):
            cpu.require()
        (tmp_path / "not_built.txt").write_text("the compiler failed:\nc++ -c x.cpp\n")
        library.why_not.cache_clear()
        with pytest.raises(
            RuntimeError, match=r"were not built: the compiler failed: c\+\+ -c x.cpp;"
        ):
            cpu.require()
        (tmp_path / "_C.so").write_bytes(b"no library")
        library.why_not.cache_clear()
        with pytest.raises(RuntimeError, match=r"do not load into torch .*--no-deps --force-reins"):
            cpu.require()
    finally:
        library.why_not.cache_clear()


REASONS = {
    "no-such-compiler": "the compiler no-such-compiler does not start: [Errno 2]",
    "cl.exe": "the kernels are written with vector types that GCC and Clang have and MSVC has not",
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler to leave out")
@pytest.mark.parametrize("compiler", REASONS)
def test_an_install_without_a_compiler_says_so_and_goes_on(tmp_path, compiler):
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
        env={"CXX": compiler, "PATH": ""},
    )
    assert "installed without its CPU kernels" in done.stderr
    assert not list(tmp_path.rglob("_C.so"))
    (reason,) = tmp_path.rglob("not_built.txt")
    assert reason.read_text().startswith(REASONS[compiler])


SLOW = """
import sys, warnings
from pathlib import Path
from normkit.kernels import select
from normkit.kernels.cpu import library
library.LIBRARY = Path(sys.argv[1]) / "_C.so"
library.why_not.cache_clear()
select._WHY_NOT_CPU = library.why_not()
import torch
import normkit as nk
norm, x = nk.BatchNorm(4), torch.randn(2, 4, 3, 3)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    with nk.use_kernels("reference"):
        norm(x)
    nk.explain(norm, x)
    assert not told, told[0]
    for _ in range(3):
        norm(x)
        nk.GroupNorm(4, num_groups=2)(x)
    torch.compile(norm, backend="eager")(x)
messages = [str(each.message) for each in told if "normkit" in str(each.message)]
assert len(messages) == 1, messages
assert told[0].category is UserWarning
print(messages[0])
"""


def test_the_first_slow_call_of_a_process_is_told_with_its_reason_and_the_way_out(tmp_path):
    (tmp_path / "not_built.txt").write_text("no C++ compiler was found when normkit was built\n")
    done = subprocess.run(
        [sys.executable, "-c", SLOW, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "normkit computes on the CPU without its C++ kernels, with the same results and several "
        "times slower: the CPU kernels were not built: no C++ compiler was found when normkit was "
        "built; install torch and a C++ compiler, then run `pip install --no-build-isolation "
        "--no-deps --force-reinstall .` in the folder of normkit's sources\n"
    )


def test_what_an_earlier_build_has_left_is_not_shipped(tmp_path):
    package = tmp_path / "build" / "lib" / "normkit"
    (package / "kernels" / "cpu").mkdir(parents=True)
    (package / "kernels" / "cpu" / "_C.so").write_bytes(b"old")
    (package / "gone.py").touch()
    folders = [f"--build-lib={tmp_path / 'build' / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", *folders],
        cwd=Path(__file__).parents[3],
        check=True,
        capture_output=True,
        env={"CXX": "no-such-compiler", "PATH": ""},
    )
    assert (package / "kernels" / "cpu" / "not_built.txt").exists()
    assert (package / "spec.py").exists()
    assert not (package / "gone.py").exists()
    assert not list(package.rglob("_C.so"))


def test_one_wheel_serves_every_python(tmp_path):
    folders = [f"--build-base={tmp_path / 'build'}", "bdist_wheel", f"--bdist-dir={tmp_path / 'b'}"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", *folders, f"--dist-dir={tmp_path}"],
        cwd=Path(__file__).parents[3],
        check=True,
        capture_output=True,
        env={"CXX": "no-such-compiler", "PATH": ""},  # the tag is the same, and there at once
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
