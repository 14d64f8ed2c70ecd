"""Where and how the steps of a training compute: devices, precision and strategy, by Fabric."""

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import nn

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
    devices: Any = 1 if device.type == "cpu" else [device.index or 0]
    return _launched(device, devices=devices, precision=protocol.precision)


def _together(protocol: Protocol, device: torch.device) -> Any:
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", protocol.processes))
    strategy: Any = "ddp"
    if protocol.strategy == "fsdp":
        sizes = {"data_parallel_size": protocol.processes, "tensor_parallel_size": 1}
        strategy = fabric_library().strategies.ModelParallelStrategy(_sharded, **sizes)
    return _launched(
        device,
        devices=devices,
        num_nodes=protocol.processes // devices,
        strategy=strategy,
        precision=protocol.precision,
    )


def _launched(device: torch.device, **options: Any) -> Any:
    fabric = fabric_library().Fabric(accelerator=device.type, **options)
    fabric.launch()
    return fabric


@cache
def fabric_library() -> Any:
    """Lightning Fabric, imported when something is first trained: that takes most of a second."""
    import lightning_fabric

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # it greets on every start
    return lightning_fabric


def _sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """Every process keeps a part of each parameter: FSDP2."""
    from torch.distributed.fsdp import fully_shard  # needed by few

    return fully_shard(model, mesh=mesh["data_parallel"])  # type: ignore[return-value]
