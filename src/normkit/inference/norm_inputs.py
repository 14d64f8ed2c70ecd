"""Watch the tensors that a layer normalises, which need not be the module's inputs.

A subclass may transpose its input, or select a part of it, before it calls the function that
normalises. So this module watches the calls of that function: torch's, or normkit's method
``_normalize``, which also gets the mask of valid positions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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
from normkit.passes import Data, replaced_forward, require_batches, untouched
from normkit.passes.inputs import OnInput, watch_entry

Missed = dict[nn.Module, str]
"""Layers with an input that was not seen, with the reason."""
Call = dict[str, Any]
"""Arguments of a function by name."""

UNSEEN = (
    "it normalises without a function of torch that gets its own statistics or weight, so its "
    "input was not seen"
)

_AFTER = ("weight", "bias", "eps", "cudnn")
_BATCH = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_OPERATOR = ("weight", "bias", *BUFFERS, "training", "momentum", "eps", "cudnn_enabled")


def _of_instance_norm(names: Sequence[str]) -> tuple[str, ...]:
    """The arguments of the instance norm that corresponds to a batch norm."""
    return tuple("use_input_stats" if name == "training" else name for name in names)


ARGUMENTS: dict[type, dict[Any, tuple[str, ...]]] = {
    _InstanceNorm: {
        functional.instance_norm: ("input", *_of_instance_norm(_BATCH)),
        torch.instance_norm: ("input", *_of_instance_norm(_OPERATOR)),
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
"""Functions that normalise, with the names of their arguments, for each class that calls them."""


def ignore(*_: object) -> None:
    """Do nothing with an input."""


@contextmanager
def watch_inputs(
    layer: nn.Module, see: OnInput, *, by_batch: bool = False, missed: Missed | None = None
) -> Generator[None]:
    """Pass every tensor that a layer normalises to ``see`` while the block runs.

    Args:
        layer: A norm of torch, a subclass of one, a norm of normkit, or one that ``is_fixed``.
        see: ``see(x, valid)`` or ``see(x)`` gets each input ``(N, C, *S)`` and, with a mask, its
            valid positions ``(N, 1, *S)``.
        by_batch: A layer with running statistics normalises by these inputs, as in training,
            although it is in evaluation mode. Its statistics are not updated, and ranks do not
            exchange theirs. Micro-batch norms still use their estimates, as they do in training.
        missed: Gets the layer, and the reason, if a call of it passed nothing to ``see``.
    """
    if isinstance(layer, NormLayer):
        watch: _Function | _Method = _Method(layer, see, by_batch)
    elif isinstance(layer, tuple(ARGUMENTS)):
        watch = _Function(layer, see, by_batch)
    else:
        with watch_entry(layer, see):
            yield
        return
    missed = {} if missed is None else missed

    def called(forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_watched, forward, watch, missed)

    with watch.put_in(), replaced_forward(layer, called):
        yield


def observe_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], see: OnInput, data: Data, what: str
) -> tuple[Missed, int]:
    """Send data through a model in evaluation mode, and pass the inputs of some layers to ``see``.

    Args:
        model: The model; it is left as it was.
        layers: The layers by name.
        see: ``see(name, x, valid)`` or ``see(name, x)`` gets each input of each layer.
        data: The data.
        what: Text of the progress line.

    Returns:
        The layers with an input that was not seen, and the number of batches.

    Raises:
        DataError: If there is no batch.
    """
    missed = Missed()
    with untouched(model, training=False), ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(watch_inputs(layer, partial(see, name), missed=missed))
        num_batches = data.send(model, what)
    require_batches(num_batches, data.name)
    return missed, num_batches


def _watched(
    forward: Callable[..., Any],
    watch: _Function | _Method,
    missed: Missed,
    *args: Any,
    **named: Any,
) -> Any:
    seen = watch.num_seen
    with watch.during():
        output = forward(*args, **named)
    is_empty = isinstance(output, Tensor) and output.numel() == 0
    if watch.why_not or (watch.num_seen == seen and not is_empty):
        missed[watch.layer] = watch.why_not or UNSEEN
    return output


class _Method:
    """Watches the method ``_normalize`` of one layer of normkit."""

    during = staticmethod(nullcontext)  # nothing has to be done around a single call

    def __init__(self, layer: NormLayer, see: OnInput, by_batch: bool) -> None:
        self.layer, self.num_seen, self.why_not = layer, 0, ""
        self._see, self._normalize = see, layer._normalize
        self._by_batch = by_batch and not layer.is_estimated

    @contextmanager
    def put_in(self) -> Generator[None]:
        """Replace the method while the block runs."""
        # A composite computes its parts together; a hook makes it call them one by one.
        handle = self.layer.register_forward_pre_hook(ignore)
        vars(self.layer)["_normalize"] = self._shown
        try:
            yield
        finally:
            del vars(self.layer)["_normalize"]
            handle.remove()

    def _shown(self, x: Tensor, valid: Tensor | None, *ending: Any) -> Tensor:
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
    """Hide a layer's running statistics, so that it normalises by its input in any mode."""
    kept = statistics_of(layer)
    layer._buffers.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        layer._buffers.update(kept)


class _Function(TorchFunctionMode):
    """Watches the functions of torch by which one of torch's norms normalises."""

    put_in = staticmethod(nullcontext)  # nothing has to be done around the block

    def __init__(self, layer: nn.Module, see: OnInput, by_batch: bool) -> None:
        super().__init__()
        self.layer, self.num_seen, self.why_not = layer, 0, ""
        self._see, self._by_batch = see, by_batch
        self._arguments = next(a for kind, a in ARGUMENTS.items() if isinstance(layer, kind))

    def during(self) -> TorchFunctionMode:
        """Intercept torch's functions during a call of the layer."""
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names, named = self._arguments.get(func), kwargs or {}
        call: Call = {} if names is None else dict(zip(names, args, strict=False)) | named
        if not call or not _is_own(self.layer, call):
            return func(*args, **named)
        self.num_seen += 1
        self._see(_channels_second(self.layer, call["input"]))
        if not self._by_batch:
            return func(*args, **named)
        # Without running statistics torch normalises by the input, and has none to update.
        mode = "training" if "training" in (names or ()) else "use_input_stats"
        return func(**call | {"running_mean": None, "running_var": None, mode: True})


def _is_own(layer: nn.Module, call: Call) -> bool:
    """Whether this call normalises for the layer itself, not for a layer inside it."""
    if isinstance(layer, _NormBase):
        return call.get("running_mean") is layer.running_mean
    # A parametrized weight is computed at every access, so its identity proves nothing.
    is_own = parametrize.is_parametrized(layer) or call.get("weight") is layer.weight
    if isinstance(layer, nn.GroupNorm):
        return is_own and call["num_groups"] == layer.num_groups
    return is_own and len(call["normalized_shape"]) == 1


def _channels_second(layer: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.LayerNorm) else x
