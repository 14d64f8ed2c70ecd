"""What every layer shares: parameters, buffers, checkpoints, and the choice of statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.core.check import require_count, require_eps, require_feature_map, require_share
from normkit.core.ending import Ending, ended, read_activation, require_residual
from normkit.core.mask import Mask, Valid, read_mask, require_valid_values
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.ranks import (
    HeldGroup,
    ProcessGroup,
    World,
    active_group,
    held_group,
)
from normkit.core.routes import batch_route, evaluation_route
from normkit.core.running import RunningStatistics
from normkit.errors import OptionError
from normkit.functional.checked import normalize_single
from normkit.kernels.activations import NO_ACTIVATION, ActivationName
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import Call
from normkit.layers.leaf import record_call
from normkit.layers.options import (
    ConstructorSignature,
    Device,
    default_of,
    require_arguments,
    signature_of,
)
from normkit.layers.parts import Part, Slot, tracked_parts
from normkit.typing import FeatureMap

BUFFERS = ("running_mean", "running_var")


class NormLayer(nn.Module, ABC):
    """Base of every layer; ``weight`` and ``bias`` have one value per channel by default.

    Final classes list their constructor's options. ``extra_repr`` reads each option back from the
    attribute of the same name, so ``repr`` prints a call that rebuilds the layer.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    __signature__ = ConstructorSignature()
    takes_ending: ClassVar[bool] = False
    """Whether ``_normalize`` also adds the residual and activates, in the norm's own passes."""
    # A layer that was pickled by a version without activations has no such attributes.
    _activation = NO_ACTIVATION
    _activation_name: ActivationName | None = None
    _negative_slope = 0.01

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments first, because our error says what to write and Python's does not."""
        if len(args) > 1 or kwargs:
            require_arguments(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(  # noqa: PLR0913 - SharedOptions, with their defaults
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not super(): BatchNorm also inherits torch's _BatchNorm, whose constructor would register
        # the same parameters and buffers.
        nn.Module.__init__(self)
        require_eps(eps)
        self.num_features = require_count("num_features", num_features)
        self.eps = eps
        self.affine = affine
        self._register_parameters(bias, device, dtype)
        self._set_activation(activation, negative_slope)

    def _set_activation(self, name: ActivationName | None, negative_slope: float) -> None:
        found = read_activation(name, negative_slope)
        self._activation, self._activation_name, self._negative_slope = found, name, negative_slope

    @property
    def activation(self) -> ActivationName | None:
        """Name of the activation that the layer applies last, or None."""
        return self._activation_name

    @activation.setter
    def activation(self, name: ActivationName | None) -> None:
        self._set_activation(name, self._negative_slope)

    @property
    def negative_slope(self) -> float:
        """Factor that a leaky ReLU applies to values below 0."""
        return self._negative_slope

    @negative_slope.setter
    def negative_slope(self, value: float) -> None:
        self._set_activation(self._activation_name, value)

    def _register_parameters(self, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        for name, wanted in (("weight", self.affine), ("bias", self.affine and bias)):
            shape = (self._num_affine_values(),)
            values = torch.empty(shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))

    def _num_affine_values(self) -> int:
        return self.num_features

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1 and ``bias`` to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def has_shift(self) -> bool:
        """Whether the layer adds a ``bias`` to each channel."""
        return self.bias is not None

    def _affine(self) -> Parameters:
        # nn.Module.__getattr__ takes as long as the sums over a tiny map, so the dictionaries are
        # read directly. A parametrized weight or bias is not in them, and is computed on access.
        own, eps = self._parameters, self.__dict__["eps"]
        if "weight" in own and "bias" in own:
            return Parameters(own["weight"], own["bias"], eps)
        return Parameters(self.weight, self.bias, eps)

    def forward(
        self, x: FeatureMap, mask: Mask | None = None, residual: FeatureMap | None = None
    ) -> FeatureMap:
        """Normalise ``(N, C, *S)``; same shape, dtype and memory format.

        With ``residual`` and ``activation`` it is ``act(norm(x) + residual)``.

        Args:
            x: Feature map.
            mask: For padded inputs: booleans ``(N, *S)``, True where a position is valid, or
                integers ``(N,)``, the number of valid positions along the last axis. Statistics
                are taken over valid positions only; the output is 0 at all others.
            residual: Added to the normalised map before the activation; it has the shape, dtype
                and device of ``x``.

        Raises:
            PartitionError: In training, if a statistics group has a single (valid) value.
            InputError: If the input, the mask or the residual has a wrong shape.
            InputTypeError: If one of them has a wrong dtype.
        """
        if not isinstance(x, Tensor):
            is_overridden = type(self).forward is not NormLayer.forward
            return record_call(
                self, (x, mask, residual), forward_of_base if is_overridden else None
            )
        require_feature_map(x, self.num_features, type(self).__name__)
        valid = None if mask is None else self._read_mask(mask, x)
        if residual is None and not self._activation.kind:
            return self._normalize(x, valid)
        if residual is not None:
            require_residual(residual, x, type(self).__name__)
        return self._normalize_to_end(x, valid, Ending(self._activation, residual))

    def _normalize_to_end(self, x: FeatureMap, valid: Valid | None, ending: Ending) -> FeatureMap:
        """Normalise, add the residual and activate; most layers do it at once."""
        if self.takes_ending:
            return self._normalize(x, valid, ending)  # pyright: ignore[reportCallIssue]
        return ended(self._normalize(x, valid), ending, valid)

    @abstractmethod
    def _normalize(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        """Normalise an input that has been checked, by the statistics of its valid positions.

        A layer that ``takes_ending`` also takes an ``Ending``.
        """

    def _read_mask(self, mask: Mask, x: FeatureMap) -> Valid:
        name = type(self).__name__
        valid = read_mask(mask, x, name)
        if self.training and x.numel():
            require_valid_values(self._groups_to_check(), valid, x.shape, name)
        return valid

    def _groups_to_check(self) -> Iterable[Partition]:
        """Statistics groups in which a mask must leave several values in training."""
        return ()

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this method before it compiles a module."""
        raise OptionError(
            f"{type(self).__name__} was given to torch.jit.script, which compiles a subset of "
            f"Python that no layer of normkit keeps to; use torch.export, or torch.jit.trace in "
            f"evaluation mode"
        )

    @abstractmethod
    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""

    def why_separate(self) -> str | None:
        """Why the next call computes the norms of a composite one after another, or None."""
        return None

    is_estimated = False
    """Whether training updates running estimates with the batch, then normalises by them."""

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics in training, for each norm that the layer consists of."""
        return {}

    def parts(self) -> tuple[Part, ...]:
        """The statistics that the layer normalises by in its present mode."""
        return tuple(Part(name=name, partition=p) for name, p in self.partitions.items())

    @property
    def needs_positions(self) -> bool:
        """Whether training refuses an input ``(N, C)``, because a group would have one value."""
        return False

    def affine_slots(self) -> tuple[Slot, ...]:
        """Layers that hold one scale and one shift per channel."""
        return (Slot(self, 0, self.num_features),)

    def last_affine_slots(self) -> tuple[Slot, ...]:
        """Layers that hold the scale and shift that are applied last."""
        return self.affine_slots()

    def statistics_slots(self) -> tuple[Slot, ...]:
        """Layers that hold running statistics of the layer's input, one value per channel."""
        return ()

    def evaluated_stage(self) -> tuple[TrackingLayer, dict[str, nn.Module]] | None:
        """The stage that evaluates by running statistics, and the named stages after it.

        None if part of the layer evaluates by each example's own statistics.
        """
        return None

    def input_of(self, part: nn.Module, x: FeatureMap, valid: Valid | None) -> FeatureMap | None:
        """The input of a norm inside the layer, for the layer's input ``x``; None if unknown."""
        return x

    def extra_repr(self) -> str:
        """Arguments of the constructor call that rebuilds the layer."""
        options = signature_of(type(self)).parameters
        shown = [f"{o}={self.option(o)!r}" for o in options if self._is_shown(o)]
        return ", ".join([str(self.num_features), *shown])

    def _is_shown(self, option: str) -> bool:
        if option in _SHOWN_IF_SET:
            return self.option(option) != _SHOWN_IF_SET[option]
        return option not in _NOT_SHOWN and hasattr(self, option)

    def option(self, name: str) -> Any:
        """Value of a constructor option that builds the layer as it is now."""
        if name == "bias":  # the attribute of that name is the parameter
            return self.has_shift or not self.affine
        return getattr(self, name)

    def __repr__(self) -> str:
        """One line that rebuilds the layer, even if it holds other layers."""
        return f"{type(self).__name__}({self.extra_repr()})"


class TrackingLayer(NormLayer):
    """A layer that may keep running statistics and mix them with the example's own."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _process_group: HeldGroup | World | None
    _example_weight: float | Tensor  # a tensor with one weight per example while tune/ searches
    _version = 2  # as in torch, whose checkpoints have num_batches_tracked since version 2

    def __init__(  # noqa: PLR0913 - TrackingOptions, with their defaults
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        example_weight: float = 0.0,
        process_group: ProcessGroup = None,
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            bias=bias,
            activation=activation,
            negative_slope=negative_slope,
            device=device,
            dtype=dtype,
        )
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
        """Which elements share one value of the buffers: by default those of a channel."""
        return Partition(num_groups=self.num_features)

    def tracked_input(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        """The map whose statistics the buffers track: the input, unless a norm comes first."""
        return x

    @property
    def tracks_its_input(self) -> bool:
        """Whether the buffers track the statistics of the layer's input."""
        return True

    def statistics_slots(self) -> tuple[Slot, ...]:
        """Layers that hold running statistics of the layer's input, one value per channel."""
        by_channel = self.running_partition.num_groups == self.num_features
        if self.running_mean is None or not self.tracks_its_input or not by_channel:
            return ()
        return (Slot(self, 0, self.num_features),)

    @property
    def example_weight(self) -> float:
        """Share of the example's own statistics at evaluation, from 0 to 1."""
        return self._example_weight  # type: ignore[return-value]

    @example_weight.setter
    def example_weight(self, value: float) -> None:
        require_share("example_weight", value)
        self._example_weight = float(value)

    @property
    def process_group(self) -> ProcessGroup:
        """The processes whose batches count as one batch in training.

        A ``torch.distributed`` group; ``"world"`` for all processes, or this one alone while
        ``torch.distributed`` is not initialized; None for this process alone.
        """
        held = self._process_group
        return held.group if isinstance(held, HeldGroup) else held

    @process_group.setter
    def process_group(self, value: ProcessGroup) -> None:
        self._process_group = held_group(value)

    def _ranks(self, x: FeatureMap) -> dist.ProcessGroup | None:
        """Group to exchange statistics with in a forward of ``x``, or None.

        A process whose batch is empty takes part too, because the others wait for it.
        """
        if self._process_group is None or not self.training:
            return None
        if x.numel() == 0 and x.shape[0]:
            return None  # the maps have no positions, on any process
        return active_group(self.process_group)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count to 0.

        As in torch, nothing happens if ``track_running_stats`` is off.
        """
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        if self.num_batches_tracked is not None:
            nn.init.zeros_(self.num_batches_tracked)

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1, ``bias`` to 0, and the running statistics to 0 and 1."""
        self.reset_running_stats()
        super().reset_parameters()

    def _running(self) -> RunningStatistics | None:
        """Buffers that training updates and evaluation normalises by; None if there are none.

        As in torch the buffers decide, not the options that the layer was built with. If
        ``track_running_stats`` is switched off later, training no longer updates them.
        """
        buffers = self._buffers  # read directly, for the reason given in _affine
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean is None or var is None:
            return None if mean is var else self._refuse_one_buffer()
        if self.training and not self.track_running_stats:
            return None
        count = buffers["num_batches_tracked"]
        return RunningStatistics(mean, var, count, self.momentum, self._example_weight)

    def _refuse_one_buffer(self) -> NoReturn:
        raise OptionError(
            f"{type(self).__name__} has one of running_mean and running_var, and the other is "
            f"None; set both, or neither to normalise by the input's own statistics"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module does, but keep running statistics out of 16-bit dtypes."""
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device)
        return self

    def _default_example_weight(self) -> float:
        return default_of(type(self), "example_weight")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.example_weight != self._default_example_weight():
            value = torch.tensor(self.example_weight, dtype=torch.float64)
            destination[f"{prefix}example_weight"] = value

    def _load_from_state_dict(  # noqa: PLR0913 - torch's signature
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
            _update_old_checkpoint(
                state_dict, prefix, local_metadata.get("version"), self.num_batches_tracked
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class SegmentLayer(TrackingLayer):
    """A layer whose statistics groups are a partition of the feature map.

    A final class gives its ``partition`` and the number of values in its buffers. This class
    chooses the statistics: those of the input in training; at evaluation the running ones, mixed
    with a share of ``example_weight`` of the example's own.
    """

    takes_ending = True

    @property
    @abstractmethod
    def partition(self) -> Partition:
        """Which elements share statistics in training."""

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics in training."""
        return {"statistics": self.partition}

    @property
    def needs_positions(self) -> bool:
        """Whether a group is one channel of one example."""
        groups = self.partition
        return groups.examples_per_group == 1 and groups.num_groups == self.num_features

    def parts(self) -> tuple[Part, ...]:
        """The statistics that the layer normalises by in its present mode."""
        return tracked_parts("statistics", self.partition, self)

    def evaluated_stage(self) -> tuple[TrackingLayer, dict[str, nn.Module]] | None:
        """The layer itself, and nothing after it."""
        return self, {}

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        ranks = None if self._process_group is None else self._ranks(x)
        training, name = self.training, type(self).__name__
        running, parameters = self._running(), self._affine()
        return normalize_single(
            x, self.partition, running, parameters, training, name, ranks, valid, ending
        )

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        running, ranks = self._running(), self._ranks(x)
        alone = self.partition.examples_per_group == 1 and running is None
        if self.training or running is None:
            return (batch_route(running, ranks is not None and not alone, is_masked),)
        return (evaluation_route(running, is_masked),)

    def _groups_to_check(self) -> Iterable[Partition]:
        # Groups that span processes are checked after their statistics were exchanged.
        return () if self._process_group is not None else (self.partition,)


class StageOption:
    """An option that a composite's stages hold: read from the first stage, set on all of them."""

    def __init__(self, *stages: str) -> None:
        self.stages = stages

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        if layer is None:
            return self
        return getattr(getattr(layer, self.stages[0]), self.name)

    def __set__(self, layer: nn.Module, value: Any) -> None:
        for stage in self.stages:
            if stage in layer._modules:  # the base constructor sets options before stages exist
                setattr(layer._modules[stage], self.name, value)


def is_estimated(module: object) -> bool:
    """Whether a module updates running estimates in training, then normalises by them."""
    return isinstance(module, NormLayer) and module.is_estimated


def forward_of_base(
    layer: NormLayer,
    x: FeatureMap,
    mask: Mask | None = None,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    """Call ``NormLayer.forward`` of a layer whose class overrides it, from a ``torch.fx`` graph."""
    return NormLayer.forward(layer, x, mask, residual)


def is_watched(*modules: nn.Module) -> bool:
    """Whether one of the modules has a forward or backward hook."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
    return False


_NOT_SHOWN = ("num_features", "device", "dtype")
_SHOWN_IF_SET = {"bias": True, "process_group": None, "activation": None, "negative_slope": 0.01}


def _update_old_checkpoint(
    state_dict: dict[str, Any], prefix: str, version: int | None, count: Tensor | None
) -> None:
    """Widen 16-bit statistics; where an old checkpoint has no batch count, keep the layer's own."""
    for name in BUFFERS:
        values = state_dict.get(prefix + name)
        if values is not None and values.dtype.itemsize < 4:
            state_dict[prefix + name] = values.float()
    if version is None or version < 2:
        known = count is not None and count.device.type != "meta"
        state_dict.setdefault(f"{prefix}num_batches_tracked", count if known else torch.tensor(0))
