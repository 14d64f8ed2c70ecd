"""What a layer normalises: what reaches the function that does it, not what the module is given.

Subclasses may transpose their input, select parts of it or leave some out before they call the
function that normalises: torch's, or that of our layers, which gets what a mask leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from normkit.inference.tracked import CUT, cuts_positions, statistics_of
from normkit.layers.base import BUFFERS, NormLayer
from normkit.passes import forward_of
from normkit.passes.inputs import See, at_entry

Missed = dict[nn.Module, str]
"""Layers of which something was not seen, with the reason."""
Call = dict[str, Any]
"""Arguments of a function by name."""

UNSEEN = (
    "it normalises without a function of torch that takes its own statistics or weight, so what it "
    "normalises was not seen"
)

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


def ignore(*_: object) -> None:
    """Look at nothing."""


@contextmanager
def reaching(
    layer: nn.Module, see: See, *, by_batch: bool = False, missed: Missed | None = None
) -> Generator[None]:
    """Show everything that a layer normalises while the block runs, with the channels second.

    Args:
        layer: A norm of torch, a subclass, one of ours, or one that ``is_fixed``.
        see: Gets the inputs, and for each which of its positions are valid: ``(N, 1, *S)``, or
            nothing.
        by_batch: Let a layer with running statistics normalise by these inputs as in training,
            though it is in evaluation mode: its statistics do not move, and ranks do not wait for
            each other. Estimates of micro batches stay: they normalise in training too.
        missed: Gets the layer if a call of it has shown nothing.
    """
    if isinstance(layer, NormLayer):
        watch: _Function | _Method = _Method(layer, see, by_batch)
    elif isinstance(layer, tuple(ARGUMENTS)):
        watch = _Function(layer, see, by_batch)
    else:
        with at_entry(layer, see):
            yield
        return
    missed = {} if missed is None else missed

    def called(forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_watched, forward, watch, missed)

    with watch.put_in(), forward_of(layer, called):
        yield


def _watched(
    forward: Callable[..., Any],
    watch: _Function | _Method,
    missed: Missed,
    *args: Any,  # noqa: ANN401 - whatever the layer takes
    **named: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    seen = watch.num_seen
    with watch.during():
        output = forward(*args, **named)
    is_empty = isinstance(output, Tensor) and output.numel() == 0
    if watch.why_not or (watch.num_seen == seen and not is_empty):
        missed[watch.layer] = watch.why_not or UNSEEN
    return output


class _Method:
    """Sees what reaches the method by which a layer of ours normalises."""

    def __init__(self, layer: NormLayer, see: See, by_batch: bool) -> None:
        self.layer, self.num_seen, self.why_not = layer, 0, ""
        self._see, self._normalize = see, layer._normalize
        self._by_batch = by_batch and not layer.is_estimated

    @contextmanager
    def put_in(self) -> Generator[None]:
        """Take the method's place; with a hook, a composite calls the layers inside of it."""
        handle = self.layer.register_forward_pre_hook(ignore)
        vars(self.layer)["_normalize"] = self._shown
        try:
            yield
        finally:
            del vars(self.layer)["_normalize"]
            handle.remove()

    def during(self) -> AbstractContextManager[None]:
        """Nothing has to be done in a call."""
        return nullcontext()

    def _shown(self, x: Tensor, valid: Tensor | None, *ending: Any) -> Tensor:  # noqa: ANN401
        self.num_seen += 1
        if valid is None:
            self._see(x)
        elif cuts_positions(self.layer, x.shape[1]):
            self.why_not = CUT
        else:
            self._see(x, valid)
        with _hidden(self.layer) if self._by_batch else nullcontext():
            return self._normalize(x, valid, *ending)


@contextmanager
def _hidden(layer: nn.Module) -> Generator[None]:
    """Hide a layer's running statistics: without them it normalises by its input in any mode."""
    kept = statistics_of(layer)
    layer._buffers.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        layer._buffers.update(kept)


class _Function(TorchFunctionMode):
    """Sees what reaches the functions by which one layer of torch normalises."""

    def __init__(self, layer: nn.Module, see: See, by_batch: bool) -> None:
        super().__init__()
        self.layer, self.num_seen, self.why_not = layer, 0, ""
        self._see, self._by_batch = see, by_batch
        self._arguments = next(a for kind, a in ARGUMENTS.items() if isinstance(layer, kind))

    def put_in(self) -> AbstractContextManager[None]:
        """Nothing has to be done outside of a call."""
        return nullcontext()

    def during(self) -> TorchFunctionMode:
        """Look at torch's functions."""
        return self

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
