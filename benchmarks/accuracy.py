"""Accuracy of torch's layers and of ours against a float64 definition, as a Markdown table.

    python benchmarks/accuracy.py > benchmarks/results/accuracy.md

The definition is two-pass and in float64, of the same rounded input. A figure is the largest
difference in parts of the largest value of the definition, the worst over the shapes.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.kernels import cpu
from normkit.lab.bench.markdown import table

SHAPES = ((2, 64, 56, 56), (8, 64, 14, 14), (4, 96, 7, 7), (3, 64, 5, 9))
OFFSETS = (0.0, 1e2, 1e4)
NAMES = ("output", "dx", "dweight")
EPS = 1e-5
SAME = 1.2  # a fifth more or less is a matter of which value happens to round which way

Results = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A norm: torch's layer, ours, and the axes of ``(N, G, C/G, P)`` that share statistics."""

    name: str
    twin: Callable[[int], nn.Module]
    ours: Callable[[int], nn.Module]
    groups: Callable[[int], int]
    axes: tuple[int, ...]


METHODS = (
    Method(name="bn", twin=nn.BatchNorm2d, ours=nk.BatchNorm, groups=lambda c: c, axes=(0, 2, 3)),
    Method(
        name="gn:32",
        twin=lambda c: nn.GroupNorm(32, c),
        ours=lambda c: nk.GroupNorm(c, num_groups=32),
        groups=lambda _: 32,
        axes=(2, 3),
    ),
    Method(
        name="in",
        twin=lambda c: nn.InstanceNorm2d(c, affine=True),
        ours=nk.InstanceNorm,
        groups=lambda c: c,
        axes=(2, 3),
    ),
    Method(
        name="ln",
        twin=lambda c: nn.GroupNorm(1, c),
        ours=nk.LayerNorm,
        groups=lambda _: 1,
        axes=(2, 3),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one input."""

    method: Method
    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor

    def definition(self) -> Results:
        """Output and gradients by the formula in float64, differentiated by autograd."""
        x, weight = (t.double().requires_grad_() for t in (self.x, self.weight))
        num_examples, num_channels = x.shape[:2]
        cells = x.reshape(num_examples, self.method.groups(num_channels), -1, x[0, 0].numel())
        mean = cells.mean(self.method.axes, keepdim=True)
        var = (cells - mean).square().mean(self.method.axes, keepdim=True)
        unit = ((cells - mean) / (var + EPS).sqrt()).reshape(num_examples, num_channels, -1)
        y = (unit * weight[:, None] + self.bias.double()[:, None]).reshape(x.shape)
        y.backward(self.grad.double())
        return _results(y, x, weight)

    def of(self, layer: nn.Module) -> Results:
        """Output and gradients by a layer."""
        with torch.no_grad():
            layer.get_parameter("weight").copy_(self.weight)
            layer.get_parameter("bias").copy_(self.bias)
        x = self.x.clone().requires_grad_()
        y = layer.train()(x)
        y.backward(self.grad)
        return _results(y, x, layer.get_parameter("weight"))


def _results(y: Tensor, x: Tensor, weight: Tensor) -> Results:
    return dict(zip(NAMES, (y.detach(), x.grad, weight.grad), strict=True))  # type: ignore[arg-type]


def _case(method: Method, shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    return Case(
        method=method,
        x=(draw(*shape) + offset).to(dtype),
        grad=draw(*shape).to(dtype),
        weight=(1 + 0.3 * draw(shape[1])).float(),
        bias=(0.3 * draw(shape[1])).float(),
    )


def _error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).abs().max() / right.abs().max())


def errors_of(method: Method, offset: float, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Largest relative errors over the shapes, by who computed and which result."""
    worst: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        case = _case(method, shape, offset, dtype)
        right, num_channels = case.definition(), shape[1]
        found = {"torch": case.of(method.twin(num_channels))}
        for kernels in ("cpu", "reference") if cpu.available() else ("reference",):
            with nk.use_kernels(kernels):
                found[kernels] = case.of(method.ours(num_channels))
        for who, results in found.items():
            errors = worst.setdefault(who, dict.fromkeys(NAMES, 0.0))
            for name in NAMES:
                errors[name] = max(errors[name], _error(results[name], right[name]))
    return worst


def _rows() -> Iterable[tuple[str, ...]]:
    for dtype, offsets in ((torch.float32, OFFSETS), (torch.bfloat16, (0.0, 1e2))):
        for method in METHODS:
            for offset in offsets:
                errors = errors_of(method, offset, dtype)
                for name in NAMES:
                    yield _row(f"{dtype}".removeprefix("torch."), method, offset, name, errors)


def _row(
    dtype: str, method: Method, offset: float, name: str, errors: dict[str, dict[str, float]]
) -> tuple[str, ...]:
    theirs, ours = errors["torch"][name], errors.get("cpu", errors["reference"])[name]
    verdict = "worse" if ours > SAME * theirs else "better" if SAME * ours < theirs else "equal"
    figures = (f"{errors[who][name]:.1e}" for who in ("torch", "cpu", "reference") if who in errors)
    return (dtype, f"`{method.name}`", f"{offset:g}", name, *figures, verdict)


def main() -> None:
    """Print the table."""
    kernels = ("ours, cpu kernels", "ours, reference") if cpu.available() else ("ours, reference",)
    head = ("dtype", "norm", "offset", "result", "torch", *kernels, "ours is")
    rows = list(_rows())
    sys.stdout.write(table(head, rows) + "\n\n")
    counts = {word: sum(row[-1] == word for row in rows) for word in ("better", "equal", "worse")}
    summary = ", ".join(f"{word} in {count}" for word, count in counts.items())
    worse = sum(float(row[-2]) > SAME * float(row[4]) for row in rows)
    sys.stdout.write(
        f"Ours is {summary} of {len(rows)} cases; the reference path, whose statistics are plain "
        f"float32, is worse than torch's layer in {worse} (torch {torch.__version__}).\n"
    )


if __name__ == "__main__":
    main()
