"""Whole training steps of a network with torch's batch norm and with ours, timed in turns.

On a GPU also with torch's group norm and with ours, and with the memory of each.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from normkit.lab.bench.errors import BenchError
from normkit.lab.bench.peers import peers_of
from normkit.lab.bench.timing import Budget, Call, Times, time_in_turns
from normkit.lab.data import Examples
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import Environment, code_hash, describe_environment
from normkit.lab.frozen import Frozen
from normkit.lab.models import build_model
from normkit.layers.over_example import GroupNorm

MOST_LOSS_DIFFERENCE = 1e-3  # relative, of the first losses: fifty norms in a row add up rounding
MOST_AUTOCAST_DIFFERENCE = 5e-2  # relative; bfloat16 maps have 8 bits of mantissa
BUDGET_S = 20.0
MOST_REPEATS = 200


class Workload(Frozen):
    """A network and its batch; ``autocast`` is to bfloat16, ``channels_last`` a memory format."""

    model: str
    input_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    autocast: bool = False
    channels_last: bool = False


WORKLOADS = (
    Workload(model="torchvision:resnet50", input_shape=(3, 64, 64), num_classes=1000, batch_size=2),
    Workload(model="small-resnet", input_shape=(1, 8, 8), num_classes=10, batch_size=8),
)
CUDA_WORKLOADS = tuple(
    Workload(
        model="torchvision:resnet50",
        input_shape=(3, 224, 224),
        num_classes=1000,
        batch_size=batch_size,
        autocast=True,
        channels_last=True,
    )
    for batch_size in (2, 32, 128)
)


def workloads_for(device: torch.device) -> tuple[Workload, ...]:
    """The networks that are timed on a device."""
    return CUDA_WORKLOADS if device.type == "cuda" else WORKLOADS


class WorkloadTimes(Frozen):
    """Times of a workload's training step; on a GPU also with group norms, and peak memory."""

    workload: Workload
    torch: Times
    ours: Times
    torch_group_norm: Times | None = None
    our_group_norm: Times | None = None
    peak_bytes: dict[str, int] = Field(default={}, description="of the GPU's allocator, by network")

    @property
    def ratio(self) -> float:
        """Time with torch's batch norm divided by the time with ours."""
        return self.torch.median_s / self.ours.median_s


NETWORKS = {"batch": ("torch", "ours"), "group": ("torch_group_norm", "our_group_norm")}
"""Pairs of networks with torch's and with our norm, by the norm's name."""


def pairs_of(result: WorkloadTimes) -> list[tuple[str, Times, Times]]:
    """The norms of a result: name, times with our norm, times with torch's."""
    found = [("batch", result.ours, result.torch)]
    if result.our_group_norm is not None and result.torch_group_norm is not None:
        found.append(("group", result.our_group_norm, result.torch_group_norm))
    return found


class EndToEndRecord(Frozen):
    """The record of training steps of whole networks."""

    results: tuple[WorkloadTimes, ...]
    environment: Environment
    code_hash: str
    load_average: float = Field(description="of the machine, over one minute, at the start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a benchmark runs, and how long at most."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = MOST_REPEATS
    budget_s: float = BUDGET_S


def run_end_to_end(
    setting: Setting,
    workloads: tuple[Workload, ...] | None = None,
    on_workload: Callable[[Workload], object] = lambda workload: None,
) -> EndToEndRecord:
    """Time the training steps of whole networks.

    Args:
        setting: Device, threads, and time limits.
        workloads: The networks; by default those of the device.
        on_workload: Called after each network.

    Raises:
        BenchError: If the losses of the first steps differ.
        SpecError: If there is no such device.
    """
    device, load, results = parse_device(setting.device), os.getloadavg()[0], []
    environment = describe_environment(device, setting.threads)
    with threads_of(setting.threads), seeded(0, device):
        for workload in workloads_for(device) if workloads is None else workloads:
            results.append(_measure(workload, setting, device))
            on_workload(workload)
    return EndToEndRecord(
        results=tuple(results),
        environment=environment,
        code_hash=code_hash("lab/bench/"),
        load_average=load,
    )


def _measure(workload: Workload, setting: Setting, device: torch.device) -> WorkloadTimes:
    started = time.perf_counter()
    batch = _batch(workload, device)
    norms = _NORMS | _GROUP_NORMS if device.type == "cuda" else _NORMS
    steps = {
        name: _stepper(workload, norm, batch, by_torch=name.startswith("torch"))
        for name, norm in norms.items()
    }
    losses = {name: step() for name, step in steps.items()}
    _require_equal_losses(workload, losses)
    rest_s = max(setting.budget_s - (time.perf_counter() - started), 0.0)
    budget = Budget(seconds=rest_s, repeats=setting.repeats)
    times = time_in_turns({k: Call(run=s) for k, s in steps.items()}, budget, device)
    del steps
    return WorkloadTimes(workload=workload, **times, peak_bytes=_peaks(workload, norms, batch))


def _batch(workload: Workload, device: torch.device) -> Examples:
    inputs = torch.randn(workload.batch_size, *workload.input_shape, device=device)
    if workload.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.arange(workload.batch_size, device=device) % workload.num_classes
    return Examples(inputs=inputs, targets=targets)


_NORMS = {"torch": None, "ours": "bn"}
_GROUP_NORMS = {"torch_group_norm": "gn:32", "our_group_norm": "gn:32"}


def _peaks(workload: Workload, norms: dict[str, str | None], batch: Examples) -> dict[str, int]:
    """Peak memory of the second step of each network, with no other in memory; only on a GPU."""
    device, found = batch.inputs.device, {}
    for name in norms if device.type == "cuda" else ():
        step = _stepper(workload, norms[name], batch, by_torch=name.startswith("torch"))
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found[name] = torch.cuda.max_memory_allocated(device)
        del step
    return found


def _stepper(
    workload: Workload, norm: str | None, batch: Examples, by_torch: bool = False
) -> Callable[[], float]:
    model: nn.Module = build_model(
        workload.model,
        num_classes=workload.num_classes,
        input_shape=workload.input_shape,
        norm=norm,
    ).model
    if by_torch:
        _take_torch_group_norms_(model)
    device = batch.inputs.device
    layout = torch.channels_last if workload.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue] - not in its stub
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    if workload.autocast:
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    return lambda: train_step(model, optimizer, batch)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Examples) -> float:
    """Take one training step as users write it by hand; return the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(model(batch.inputs), batch.targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def _take_torch_group_norms_(model: nn.Module) -> None:
    """Replace every group norm of ours by torch's, with the same parameters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupNorm):
            model.set_submodule(name, peers_of(module, "torch", batch_size=1)[0].module)


def _require_equal_losses(workload: Workload, losses: dict[str, float]) -> None:
    most = MOST_AUTOCAST_DIFFERENCE if workload.autocast else MOST_LOSS_DIFFERENCE
    for norm, (theirs, ours) in NETWORKS.items():
        if theirs not in losses:
            continue
        difference = abs(losses[theirs] - losses[ours]) / max(abs(losses[theirs]), 1e-12)
        if not difference <= most:
            raise BenchError(
                f"{workload.model}: the first loss is {losses[theirs]:.6g} with torch's "
                f"{norm} norm and {losses[ours]:.6g} with "
                f"ours; times of different results are not compared"
            )
