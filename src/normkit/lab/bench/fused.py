"""Norm, residual and activation in one pass or separately, timed in turns."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from normkit.fusing import fuse_activations_
from normkit.lab.bench.end_to_end import MOST_LOSS_DIFFERENCE, Setting, Workload, train_step
from normkit.lab.bench.errors import BenchError
from normkit.lab.bench.spec import RESNET50, Shape
from normkit.lab.bench.timing import Budget, Call, Times, time_in_turns
from normkit.lab.data import Examples
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import Environment, code_hash, describe_environment
from normkit.lab.frozen import Frozen
from normkit.lab.measure import peak_step_bytes
from normkit.lab.models import build_model
from normkit.layers.over_batch import BatchNorm

Side = Literal["torch", "separate", "fused"]
SIDES: tuple[Side, ...] = ("torch", "separate", "fused")
"""Torch's batch norm and activation; our norm and torch's activation; our norm with activation."""
BATCH_SIZES = (2, 32)
MOST_DIFFERENCE = 1e-3  # mean absolute difference, divided by the mean absolute value
WORKLOADS = (
    Workload(model="torchvision:resnet50", input_shape=(3, 64, 64), num_classes=1000, batch_size=2),
    Workload(
        model="torchvision:resnet50", input_shape=(3, 224, 224), num_classes=1000, batch_size=8
    ),
    Workload(
        model="torchvision:mobilenet_v2", input_shape=(3, 224, 224), num_classes=1000, batch_size=8
    ),
)


class LayerTimes(Frozen):
    """Forward and backward of one map, by side; ``residual`` is added before the activation."""

    shape: Shape
    batch_size: int
    residual: bool
    times: dict[Side, Times]

    def ratio(self, side: Side) -> float:
        """Time of a side divided by that of the fused one."""
        return self.times[side].median_s / self.times["fused"].median_s


class StepTimes(Frozen):
    """Times and peak memory of a network's training steps, by side."""

    workload: Workload
    times: dict[Side, Times]
    peak_bytes: dict[Side, int] = Field(
        default={}, description="bytes alive at the peak of a step, by side"
    )

    def ratio(self, side: Side) -> float:
        """Time of a side divided by that of the fused one."""
        return self.times[side].median_s / self.times["fused"].median_s


class FusedRecord(Frozen):
    """The record of this benchmark."""

    layers: tuple[LayerTimes, ...]
    networks: tuple[StepTimes, ...]
    environment: Environment
    code_hash: str
    load_average: float = Field(description="of the machine, over one minute, at the start")

    def mean_ratio(self, side: Side, residual: bool) -> float:
        """Geometric mean of the ratios of all maps."""
        found = [math.log(row.ratio(side)) for row in self.layers if row.residual == residual]
        return math.exp(sum(found) / len(found)) if found else math.nan


def run_fused(
    setting: Setting,
    *,
    shapes: Iterable[Shape] = RESNET50,
    batch_sizes: Iterable[int] = BATCH_SIZES,
    workloads: Iterable[Workload] | None = None,
    on_row: Callable[[str], object] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> FusedRecord:
    """Time batch norm and ReLU, alone and after a sum, and training steps of networks.

    Args:
        setting: Device, threads, and the most seconds per network; a map gets a twentieth of that.
        shapes: Shapes of the maps.
        batch_sizes: Batch sizes of the maps.
        workloads: The networks; by default those of ``WORKLOADS``.
        on_row: Called with the name of each row before it is measured.
        clock: See ``Budget``.

    Raises:
        BenchError: If the sides compute different results.
    """
    device, load = parse_device(setting.device), os.getloadavg()[0]
    layers, networks = [], []
    with threads_of(setting.threads), seeded(0, device):
        for batch_size in batch_sizes:
            for shape in shapes:
                on_row(f"{batch_size}x{'x'.join(map(str, shape))}")
                layers += [
                    _layer(shape, batch_size, r, setting, device, clock) for r in (False, True)
                ]
        for workload in WORKLOADS if workloads is None else workloads:
            on_row(workload.model)
            networks.append(_network(workload, setting, device, clock))
    return FusedRecord(
        layers=tuple(layers),
        networks=tuple(networks),
        environment=describe_environment(device, setting.threads),
        code_hash=code_hash("lab/bench/"),
        load_average=load,
    )


def _layer(
    shape: Shape,
    batch_size: int,
    residual: bool,
    setting: Setting,
    device: torch.device,
    clock: Callable[[], float],
) -> LayerTimes:
    x, added, grad = (torch.randn(batch_size, *shape, device=device) for _ in range(3))
    norms = {
        "torch": nn.BatchNorm2d(shape[0], device=device),
        "separate": BatchNorm(shape[0], device=device),
        "fused": BatchNorm(shape[0], activation="relu", device=device),
    }
    inputs = [t.requires_grad_() for t in ((x, added) if residual else (x,))]
    steps = {side: _both_ways(side, norm, inputs, grad) for side, norm in norms.items()}
    values = {side: step() for side, step in steps.items()}
    for side in ("torch", "separate"):
        for theirs, ours in zip(values[side], values["fused"], strict=True):
            # Compare means: where a value is near 0, rounding decides whether a gradient passes
            # through the ReLU, so single gradients may differ.
            far = (theirs - ours).abs().mean() / theirs.abs().mean()
            if not far <= MOST_DIFFERENCE:
                raise BenchError(f"{side} and fused layers give other values on {shape}")
    budget = Budget(seconds=setting.budget_s / 20, repeats=setting.repeats, clock=clock)
    times = time_in_turns({side: Call(run=step) for side, step in steps.items()}, budget, device)
    return LayerTimes(shape=shape, batch_size=batch_size, residual=residual, times=times)  # type: ignore[arg-type]


def _both_ways(
    side: str, norm: nn.Module, inputs: list[Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> Tensor:
        if side == "fused":
            return norm(inputs[0], residual=inputs[1] if len(inputs) > 1 else None)
        y = norm(inputs[0])
        y = y.add_(inputs[1]) if len(inputs) > 1 else y
        return functional.relu(y, inplace=True)

    parameters = [*norm.parameters()]
    return lambda: torch.autograd.grad(forward(), [*inputs, *parameters], grad)


def _network(
    workload: Workload, setting: Setting, device: torch.device, clock: Callable[[], float]
) -> StepTimes:
    inputs = torch.randn(workload.batch_size, *workload.input_shape, device=device)
    targets = torch.arange(workload.batch_size, device=device) % workload.num_classes
    batch = Examples(inputs=inputs, targets=targets)
    torchs = _model(workload, None).to(device)
    models = {side: _side_of(side, copy.deepcopy(torchs)) for side in SIDES}
    steps = {side: stepper(model, batch) for side, model in models.items()}
    losses = {side: _first_loss(step) for side, step in steps.items()}
    for side in ("separate", "fused"):
        far = abs(losses[side] - losses["torch"]) / max(abs(losses["torch"]), 1e-12)
        if not far <= MOST_LOSS_DIFFERENCE:
            raise BenchError(f"{workload.model}: the first losses differ: {losses}")
    budget = Budget(seconds=setting.budget_s, repeats=setting.repeats, clock=clock)
    times = time_in_turns({side: Call(run=step) for side, step in steps.items()}, budget, device)
    return StepTimes(workload=workload, times=times)  # type: ignore[arg-type]


def _first_loss(step: Callable[[], float]) -> float:
    torch.manual_seed(0)  # so that dropout is the same on all sides
    return step()


def _model(workload: Workload, norm: str | None) -> nn.Module:
    options = {"num_classes": workload.num_classes, "input_shape": workload.input_shape}
    return build_model(workload.model, **options, norm=norm).model.train()


def _side_of(side: Side, model: nn.Module) -> nn.Module:
    """A network of torch's batch norms as a side has it."""
    from normkit.convert import convert_norm_  # slow

    if side != "torch":
        model = convert_norm_(model, "bn").model
    if side == "fused":
        fuse_activations_(model)
    return model


def stepper(model: nn.Module, batch: Examples) -> Callable[[], float]:
    """Make a training step that returns its loss."""
    return partial(train_step, model, _optimizer(model), batch)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


def measure_peaks(workload: Workload, threads: int) -> dict[Side, int]:
    """Bytes alive at the peak of a step of each network, parameters included.

    Counted from torch's own allocations: the memory of a process also depends on how the heap is
    fragmented.
    """
    found: dict[Side, int] = {}
    shape = workload.batch_size, *workload.input_shape
    with threads_of(threads), seeded(0, torch.device("cpu")):
        batch = Examples(inputs=torch.randn(shape), targets=torch.zeros(shape[0], dtype=torch.long))
        for side in SIDES:
            model = _side_of(side, _model(workload, None))
            optimizer = _optimizer(model)
            step = partial(train_step, model, optimizer, batch)
            found[side] = peak_step_bytes(step, model, optimizer)
    return found
