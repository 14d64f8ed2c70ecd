"""The four primitives of the Triton kernels against their formulas in float64."""

import os

import pytest
import torch
from torch.testing import assert_close

from normkit.kernels.triton import geometry, plan, primitives

THOROUGH = os.environ.get("TRITON_INTERPRET") != "1" and "NORMKIT_CONTRACT" not in os.environ
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other example": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other position": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:1].expand(x.shape),
}
EVERY = [
    (dtype, layout, path)
    for dtype in TOLERANCE
    for layout in LAYOUTS
    for path in ("tile", "stream")
]
PICKED = [
    (torch.float64, "transposed", "stream"),
    (torch.float32, "every other position", "stream"),
    (torch.float32, "channels_last", "tile"),
    (torch.float16, "every other example", "tile"),
    (torch.bfloat16, "expanded", "tile"),
]  # "tile" only in so far as blocks are large: primitives always stream


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


@pytest.mark.parametrize(
    ("dtype", "layout", "path"), EVERY if THOROUGH else PICKED, indirect=["path"]
)
@pytest.mark.parametrize("rows", ["one for each example", "one for all"])
def test_primitives_are_their_formulas(dtype, layout, path, rows, device):
    shape, size = (2, 3, 4, 6), 8
    num_rows, num_segments = (1 if rows == "one for all" else 2), 9
    x, grad, *tables = draw(shape, shape, *[(num_rows, num_segments)] * 4)
    x, grad = (LAYOUTS[layout]((t + 10).to(dtype).to(device)) for t in (x, grad))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, *factors = (t.to(wide).to(device) for t in tables)
    cells, grads = (t.double().reshape(2, num_segments, size) for t in (x, grad))
    m, k1, k2, k3 = (t.double()[..., None] for t in (mean, *factors))

    def near(found, expected):
        scale = expected.abs().max().clamp(min=1)
        assert_close(found.double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0)

    found = primitives.moments(x, size)
    near(found[0], cells.mean(2))
    near(found[1], cells.var(2, correction=0))
    assert found[0].shape == (2, num_segments)
    y = primitives.apply(x, mean, *factors[:2], size)
    near(y, (k1 * (cells - m) + k2).reshape(shape))
    assert y.dtype == dtype
    assert y.stride() == geometry.result_like(x).stride()
    sums = primitives.reduce_grad(grad, x, mean, size)
    near(sums[0], grads.sum(2))
    near(sums[1], (grads * (cells - m)).sum(2))
    dx = primitives.combine_grad(grad, x, mean, tuple(factors), size)
    near(dx, (k1 * grads + k2 * (cells - m) + k3).reshape(shape))


LONG = (2, 3, 21, 9)  # segments of several blocks, the last not whole


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("offset", "first"), [(1e6, 0.0), (0.0, 1e6), (1e4, -1e6), (1e4, 0.0)], ids=str
)
def test_moments_keep_their_digits_whatever_comes_first(offset, first, layout, path, device):
    (x,) = draw(LONG)
    x += offset
    x[:, :, 0, 0] += first
    x = LAYOUTS[layout](x.float().to(device))
    mean, var = primitives.moments(x, x[0, 0].numel())
    exact = x.double().flatten(2)
    spread = exact.var(2, correction=0)
    digits = 5e-5 if path == "stream" and first else 1e-5  # blocks of one value: the first is all
    assert_close(var.double() / spread, torch.ones_like(spread), rtol=0, atol=digits)
    away = (mean.double() - exact.mean(2)) / spread.sqrt()
    assert_close(away, torch.zeros_like(away), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_moments_of_what_is_not_finite_are_as_torch_has_them(layout, path, device):
    nan, inf = float("nan"), float("inf")
    spoiled = {  # segment: a value, as the first or after others; two segments stay as they are
        (0, 0): (nan, 0), (0, 1): (inf, 100), (1, 0): (-inf, 0), (1, 2): (nan, 100),
    }  # fmt: skip
    (clean,) = draw(LONG)
    values = clean.clone()
    for segment, (value, where) in spoiled.items():
        values[segment].view(-1)[where] = value
    found = []
    for given in (clean, values):
        x = LAYOUTS[layout](given.float().to(device))
        found.append(torch.stack(primitives.moments(x, x[0, 0].numel())))
    wanted = found[0].clone()
    for segment, (value, _) in spoiled.items():
        wanted[(0, *segment)], wanted[(1, *segment)] = value, nan
    assert_close(found[1], wanted, rtol=0, atol=0, equal_nan=True)


def test_only_maps_without_one_axis_of_positions_are_copied():
    x = torch.empty(3, 4, 5, 6)
    for name, arrange in LAYOUTS.items():
        made = plan.Plan(primitives._moments, (arrange(x),), (30,))
        assert made._copies == ([0] if name == "transposed" else [])


def test_runs_of_examples_are_read_as_positions_where_memory_has_it_so():
    x = torch.empty(6, 4, 5, 7)
    grouping = geometry.Grouping.of(x, 4, 3)
    for arrange, folds in ((LAYOUTS["channels_last"], True), (LAYOUTS["contiguous"], False)):
        found = geometry.Layout.of(grouping, geometry.Map.of(arrange(x))).grouping
        expected = (2, 105, 1) if folds else (6, 35, 3)
        sizes = found.N, found.L, found.E
        assert sizes == expected
