"""Whole training steps: a network with torch's batch norm and with ours, in turns."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn

from normkit.lab.bench.errors import BenchError
from normkit.lab.bench.timing import Budget, Call, Times, time_in_turns
from normkit.lab.data import Examples
from normkit.lab.environment import Environment, code_hash, describe_environment
from normkit.lab.models import build_model
from normkit.lab.spec import Frozen
from normkit.lab.steps import train_step
from normkit.lab.train import parse_device, threads_of

MOST_LOSS_DIFFERENCE = 1e-3  # of the first losses; fifty norms in a row round differently
BUDGET_S = 20.0
MOST_REPEATS = 200


class Workload(Frozen):
    """A network and its batch."""

    model: str
    input_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int


WORKLOADS = (
    Workload(model="torchvision:resnet50", input_shape=(3, 64, 64), num_classes=1000, batch_size=2),
    Workload(model="small-resnet", input_shape=(1, 8, 8), num_classes=10, batch_size=8),
)


class Result(Frozen):
    """Times of a workload's training step."""

    workload: Workload
    torch: Times
    ours: Times

    @property
    def ratio(self) -> float:
        """Time with torch's batch norm in times of the one with ours."""
        return self.torch.median_s / self.ours.median_s


class EndToEndRecord(Frozen):
    """Training steps of whole networks: what was found, where and when."""

    results: tuple[Result, ...]
    environment: Environment
    code_hash: str
    load_average: float = Field(description="of the machine's last minute, when it began")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where to run and for how long."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = MOST_REPEATS
    budget_s: float = BUDGET_S


def run_end_to_end(
    setting: Setting,
    workloads: tuple[Workload, ...] = WORKLOADS,
    on_workload: Callable[[Workload], object] = lambda workload: None,
) -> EndToEndRecord:
    """Time the training steps of whole networks.

    Args:
        setting: Where and for how long.
        workloads: The networks.
        on_workload: Called after each.

    Raises:
        BenchError: If the losses of the first steps differ.
        SpecError: If there is no such device.
    """
    device, load, results = parse_device(setting.device), os.getloadavg()[0], []
    environment = describe_environment(device, setting.threads)
    with threads_of(setting.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for workload in workloads:
            results.append(_measure(workload, setting, device))
            on_workload(workload)
    return EndToEndRecord(
        results=tuple(results),
        environment=environment,
        code_hash=code_hash("lab/bench/"),
        load_average=load,
    )


def _measure(workload: Workload, setting: Setting, device: torch.device) -> Result:
    started = time.perf_counter()
    inputs = torch.randn(workload.batch_size, *workload.input_shape, device=device)
    targets = torch.arange(workload.batch_size, device=device) % workload.num_classes
    batch = Examples(inputs=inputs, targets=targets)
    steps = {name: _stepper(workload, norm, batch) for name, norm in _NORMS.items()}
    losses = {name: step() for name, step in steps.items()}
    _require_equal_losses(workload, losses)
    rest_s = max(setting.budget_s - (time.perf_counter() - started), 0.0)
    budget = Budget(seconds=rest_s, repeats=setting.repeats)
    times = time_in_turns({k: Call(run=s) for k, s in steps.items()}, budget, device)
    return Result(workload=workload, **times)


_NORMS = {"torch": None, "ours": "bn"}


def _stepper(workload: Workload, norm: str | None, batch: Examples) -> Callable[[], float]:
    model: nn.Module = build_model(
        workload.model,
        num_classes=workload.num_classes,
        input_shape=workload.input_shape,
        norm=norm,
    ).model
    model = model.to(batch.inputs.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    return lambda: train_step(model, optimizer, batch)[0]


def _require_equal_losses(workload: Workload, losses: dict[str, float]) -> None:
    difference = abs(losses["torch"] - losses["ours"]) / max(abs(losses["torch"]), 1e-12)
    if not difference <= MOST_LOSS_DIFFERENCE:
        raise BenchError(
            f"{workload.model}: the first loss is {losses['torch']:.6g} with torch's batch norm "
            f"and {losses['ours']:.6g} with ours; times of different results are not compared"
        )
