"""Where and how the steps of a training compute: Lightning Fabric, or one process by itself."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.errors import SpecError
from normkit.lab.launch import require_processes
from normkit.lab.spec import Protocol


def require_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that a device lacks.

    Raises:
        SpecError: With those that it has.
    """
    if precision == "16-mixed" and device.type == "cpu":
        raise SpecError("precision 16-mixed needs a GPU; on the CPU give bf16-mixed or 32-true")
    if precision == "bf16-mixed" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise SpecError("this GPU does not compute in bfloat16; give 16-mixed or 32-true")


def make_fabric(protocol: Protocol, device: torch.device) -> Any:
    """Where and how a run computes.

    Raises:
        SpecError: If several processes were asked for and were not started, or the device lacks
            the precision.
    """
    require_precision(protocol.precision, device)
    require_processes(protocol.processes, protocol.strategy, device)
    if protocol.processes > 1:
        return _together(protocol, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if protocol.precision == "32-true":
        return Alone(device)
    devices: Any = 1 if device.type == "cpu" else [device.index or 0]
    return _launched(device, devices=devices, precision=protocol.precision)


@dataclass(frozen=True, slots=True)
class Alone:
    """One process in float32, with the methods of Fabric that the loop calls.

    Fabric would change nothing there, and its import takes longer than a short run.
    """

    device: torch.device
    global_rank: ClassVar[int] = 0
    is_global_zero: ClassVar[bool] = True

    def setup(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Give both as they are."""
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        """Add the gradients."""
        loss.backward()

    def no_backward_sync(self, _model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Nothing is synchronized."""
        return nullcontext()

    def clip_gradients(
        self,
        model: nn.Module,
        _optimizer: torch.optim.Optimizer,
        *,
        max_norm: float,
        error_if_nonfinite: bool,
    ) -> None:
        """Scale the gradients to a norm of at most ``max_norm``."""
        nn.utils.clip_grad_norm_(
            model.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite
        )


def _together(protocol: Protocol, device: torch.device) -> Any:
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", protocol.processes))
    strategy: Any = "ddp"
    if protocol.strategy == "fsdp":
        sizes = {"data_parallel_size": protocol.processes, "tensor_parallel_size": 1}
        strategy = _package().strategies.ModelParallelStrategy(_sharded, **sizes)
    return _launched(
        device,
        devices=devices,
        num_nodes=protocol.processes // devices,
        strategy=strategy,
        precision=protocol.precision,
    )


def _launched(device: torch.device, **options: Any) -> Any:
    fabric = _package().Fabric(accelerator=device.type, **options)
    fabric.launch()
    return fabric


@cache
def _package() -> Any:
    import lightning_fabric

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # it greets on every start
    return lightning_fabric


def _sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """Every process keeps a part of each parameter: FSDP2."""
    from torch.distributed.fsdp import fully_shard  # needed by few

    return fully_shard(model, mesh=mesh["data_parallel"])  # type: ignore[return-value]
