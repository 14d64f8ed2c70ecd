"""What every layer shares: parameters, buffers, checkpoints, and the choice of statistics."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.core.check import require_count, require_eps, require_feature_map, require_share
from normkit.core.groups import normalize_batch, normalize_evaluation
from normkit.core.parameters import Parameters, empty_result
from normkit.core.partition import Partition, require_variance
from normkit.core.ranks import (
    HeldGroup,
    ProcessGroup,
    World,
    active_group,
    held_group,
)
from normkit.core.running import RunningStatistics
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap

Device = torch.device | str | None
BUFFERS = ("running_mean", "running_var")


class NormLayer(nn.Module, ABC):
    """Base of every layer: ``weight`` and ``bias``, one value a channel, unless it says otherwise.

    Final classes list their constructor's options; ``extra_repr`` reads them back from the
    attributes of the same name, so that ``repr`` rebuilds the layer.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        affine: bool,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        require_eps(eps)
        self.num_features = require_count("num_features", num_features)
        self.eps = eps
        self.affine = affine
        self._register_parameters(device, dtype)

    def _register_parameters(self, device: Device, dtype: torch.dtype | None) -> None:
        for name in ("weight", "bias"):
            shape = (self._num_affine_values(),)
            values = torch.empty(shape, device=device, dtype=dtype) if self.affine else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))

    def _num_affine_values(self) -> int:
        return self.num_features

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1 and ``bias`` to 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _affine(self) -> Parameters:
        own = self._parameters  # a look-up by attribute costs as much as a tiny map's sums
        if "weight" in own and "bias" in own:
            return Parameters(own["weight"], own["bias"], self.eps)
        return Parameters(self.weight, self.bias, self.eps)  # parametrised: computed anew

    def extra_repr(self) -> str:
        """Arguments of the constructor, so that ``repr`` rebuilds the layer."""
        options = inspect.signature(type(self)).parameters
        hidden = _NOT_SHOWN if getattr(self, "process_group", None) else _NOT_SHOWN_ALONE
        shown = [f"{o}={getattr(self, o)!r}" for o in options if o not in hidden]
        return ", ".join([str(self.num_features), *shown])

    def __repr__(self) -> str:
        """One line that rebuilds the layer, also where it holds others."""
        return f"{type(self).__name__}({self.extra_repr()})"


class TrackingLayer(NormLayer):
    """A layer that may keep running statistics and weigh them against the example's own."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _process_group: HeldGroup | World | None
    _version = 2  # torch's own norms: since 2 there is num_batches_tracked

    def __init__(  # noqa: PLR0913 - the options of torch's norms
        self,
        num_features: int,
        *,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        example_weight: float,
        process_group: ProcessGroup,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, device=device, dtype=dtype)
        if momentum is not None:
            require_share("momentum", momentum)
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.example_weight = example_weight
        self.process_group = process_group
        self._register_statistics(device, dtype)
        self.reset_parameters()

    def _register_statistics(self, device: Device, dtype: torch.dtype | None) -> None:
        wide = table_dtype(dtype or torch.get_default_dtype())
        for name in BUFFERS:
            values = torch.empty(self.running_partition.num_groups, device=device, dtype=wide)
            self.register_buffer(name, values if self.track_running_stats else None)
        count = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", count if self.track_running_stats else None)

    @property
    def running_partition(self) -> Partition:
        """Which elements share one value of the buffers: by default a channel's."""
        return Partition(num_groups=self.num_features)

    @property
    def example_weight(self) -> float:
        """Share of the example's own statistics at evaluation, from 0 to 1."""
        return self._example_weight

    @example_weight.setter
    def example_weight(self, value: float) -> None:
        require_share("example_weight", value)
        self._example_weight = float(value)

    @property
    def process_group(self) -> ProcessGroup:
        """Whose batches count as one in training: a group's, the ``"world"``'s, or None: its own.

        ``"world"`` is everybody once ``torch.distributed`` is initialized, and nobody before.
        """
        held = self._process_group
        return held.group if isinstance(held, HeldGroup) else held

    @process_group.setter
    def process_group(self, value: ProcessGroup) -> None:
        self._process_group = held_group(value)

    def _ranks(self, x: FeatureMap) -> dist.ProcessGroup | None:
        """Processes to talk to in a forward of ``x``, be it that this one has no examples."""
        if self._process_group is None or not self.training:
            return None
        if x.numel() == 0 and x.shape[0]:
            return None  # maps without positions, on every process
        return active_group(self.process_group)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count to 0."""
        running = self._running()
        if running is not None:
            nn.init.zeros_(running.mean)
            nn.init.ones_(running.var)
            nn.init.zeros_(running.num_batches_tracked)

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1, ``bias`` to 0, and the running statistics to 0 and 1."""
        self.reset_running_stats()
        super().reset_parameters()

    def _running(self) -> RunningStatistics | None:
        buffers = self._buffers  # as in _affine
        mean, var = buffers["running_mean"], buffers["running_var"]
        count = buffers["num_batches_tracked"]
        if mean is None or var is None or count is None:
            return None
        return RunningStatistics(
            mean, var, count, self.running_partition, self.momentum, self._example_weight
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast like any module, but never cast running statistics to 16 bits."""
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device)
        return self

    def _default_example_weight(self) -> float:
        return inspect.signature(type(self)).parameters["example_weight"].default

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.example_weight != self._default_example_weight():
            value = torch.tensor(self.example_weight, dtype=torch.float64)
            destination[f"{prefix}example_weight"] = value

    def _load_from_state_dict(  # noqa: PLR0913, PLR0917 - torch's signature
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.example_weight = float(state_dict.pop(f"{prefix}example_weight", self.example_weight))
        if self.track_running_stats:
            _modernize(state_dict, prefix, local_metadata.get("version"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class SegmentLayer(TrackingLayer):
    """A layer whose statistics groups are a partition of the feature map.

    A final class says its ``partition`` and how many values its buffers have; this one chooses the
    statistics: the input's in training, and at evaluation the running ones, the example's own, or
    ``example_weight`` parts of one and the rest of the other.
    """

    @property
    @abstractmethod
    def partition(self) -> Partition:
        """Which elements share statistics in training."""

    def forward(self, x: FeatureMap) -> FeatureMap:
        """Normalise ``(N, C, *S)``; same shape, dtype and memory format."""
        require_feature_map(x, self.num_features, type(self).__name__)
        partition, running = self.partition, self._running()
        parameters, ranks = self._affine(), self._ranks(x)
        alone = partition.examples_per_group == 1 and running is None
        if ranks is not None and not alone:
            return normalize_batch(x, partition, running, parameters, ranks)
        if x.numel() == 0:
            return empty_result(x, *parameters[:2])
        if self.training:
            require_variance(partition, x.shape, type(self).__name__)
        if self.training or running is None:
            return normalize_batch(x, partition, running, parameters)
        return normalize_evaluation(x, partition, running, parameters)


def is_watched(*modules: nn.Module) -> bool:
    """Whether hooks look at what goes in or out of one of these."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


_NOT_SHOWN = ("num_features", "device", "dtype")
_NOT_SHOWN_ALONE = (*_NOT_SHOWN, "process_group")


def _modernize(state_dict: dict[str, Any], prefix: str, version: int | None) -> None:
    """Widen 16-bit statistics, and count batches where an old checkpoint did not."""
    for name in BUFFERS:
        values = state_dict.get(prefix + name)
        if values is not None and values.dtype.itemsize < 4:
            state_dict[prefix + name] = values.float()
    if version is None or version < 2:
        state_dict.setdefault(f"{prefix}num_batches_tracked", torch.tensor(0))
