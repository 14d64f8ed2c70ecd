"""What a layer normalises: what reaches torch's function, not what the module is given.

Subclasses may transpose their input, select parts of it or leave some out before they call the
function that normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from normkit.inference.tracked import feature_map
from normkit.layers.base import BUFFERS, NormLayer
from normkit.passes.inputs import See, at_entry

Missed = Callable[[nn.Module], None]
Call = dict[str, Any]
"""Arguments of a function by name."""

UNSEEN = (
    "it normalises without a function of torch that takes its own statistics or weight, so what it "
    "normalises was not seen"
)
"""Why a layer is left out that was missed."""

_AFTER = ("weight", "bias", "eps", "cudnn")
_BATCH = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_OPERATOR = ("weight", "bias", *BUFFERS, "training", "momentum", "eps", "cudnn_enabled")


def _of_examples(names: Sequence[str]) -> tuple[str, ...]:
    return tuple("use_input_stats" if name == "training" else name for name in names)


ARGUMENTS: dict[type, dict[Any, tuple[str, ...]]] = {
    _InstanceNorm: {
        functional.instance_norm: ("input", *_of_examples(_BATCH)),
        torch.instance_norm: ("input", *_of_examples(_OPERATOR)),
    },
    _NormBase: {
        functional.batch_norm: ("input", *_BATCH),
        torch.batch_norm: ("input", *_OPERATOR),
    },
    nn.GroupNorm: {
        functional.group_norm: ("input", "num_groups", *_AFTER),
        torch.group_norm: ("input", "num_groups", *_AFTER),
    },
    nn.LayerNorm: {
        functional.layer_norm: ("input", "normalized_shape", *_AFTER),
        torch.layer_norm: ("input", "normalized_shape", *_AFTER),
    },
}
"""Functions that normalise, with the names of their arguments, by the class that calls them."""


def ignore(_: object) -> None:
    """Look at nothing."""


@contextmanager
def reaching(
    layer: nn.Module, see: See, *, by_batch: bool = False, missed: Missed = ignore
) -> Generator[None]:
    """Show everything that a layer normalises while the block runs, with the channels second.

    Args:
        layer: A norm of torch, a subclass, one of ours whose forward is known, or one that
            ``is_fixed``.
        see: Gets the inputs.
        by_batch: Let a layer of torch with running statistics normalise by these inputs rather
            than by its statistics, which do not move.
        missed: Gets the layer after a call in which it has called no function of torch that
            normalises by its own statistics, or its own weight.
    """
    if not isinstance(layer, tuple(ARGUMENTS)) or isinstance(layer, NormLayer):
        with at_entry(layer, lambda x: see(feature_map(layer, x))):
            yield
        return
    mode, before = _Mode(layer, see, by_batch), vars(layer).get("forward")
    layer.forward = partial(_watched, layer.forward, mode, missed)
    try:
        yield
    finally:
        vars(layer).pop("forward")
        if before is not None:
            layer.forward = before


def _watched(
    forward: Callable[..., Any],
    mode: _Mode,
    missed: Missed,
    *args: Any,  # noqa: ANN401 - whatever the layer takes
    **named: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    seen = mode.num_seen
    with mode:
        output = forward(*args, **named)
    if mode.num_seen == seen and not _is_empty(output):
        missed(mode.layer)
    return output


def _is_empty(output: Any) -> bool:  # noqa: ANN401
    return isinstance(output, Tensor) and output.numel() == 0


class _Mode(TorchFunctionMode):
    """Sees the functions that one layer normalises with."""

    def __init__(self, layer: nn.Module, see: See, by_batch: bool) -> None:
        super().__init__()
        self.layer, self.num_seen = layer, 0
        self._see, self._by_batch = see, by_batch
        self._arguments = next(a for kind, a in ARGUMENTS.items() if isinstance(layer, kind))

    def __torch_function__(  # what torch calls, with whatever a function takes
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        names, named = self._arguments.get(func), kwargs or {}
        call: Call = {} if names is None else dict(zip(names, args, strict=False)) | named
        if not call or not _is_own(self.layer, call):
            return func(*args, **named)
        self.num_seen += 1
        self._see(_channels_second(self.layer, call["input"]))
        if not self._by_batch:
            return func(*args, **named)
        mode = "training" if "training" in (names or ()) else "use_input_stats"
        return func(**call | {"running_mean": None, "running_var": None, mode: True})


def _is_own(layer: nn.Module, call: Call) -> bool:
    """Whether a layer normalises for itself here, rather than for a layer inside of it."""
    if isinstance(layer, _NormBase):
        return call.get("running_mean") is layer.running_mean
    is_own = parametrize.is_parametrized(layer) or call.get("weight") is layer.weight
    if isinstance(layer, nn.GroupNorm):
        return is_own and call["num_groups"] == layer.num_groups
    return is_own and len(call["normalized_shape"]) == 1


def _channels_second(layer: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.LayerNorm) else x
