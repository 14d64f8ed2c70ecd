"""Changing a model as planned, and reverting the change.

No other module of ``normkit.convert`` changes a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.convert.optimizer import Exchange, OptimizerEdit
from normkit.convert.selection import find_hidden
from normkit.errors import OptionError
from normkit.weights import standardize_weights_
from normkit.weights.cache import WeightCache


class Location(NamedTuple):
    """A place in the model where a layer is replaced: in a module, a list or a dict."""

    parent: nn.Module | list[Any] | dict[Any, Any]
    key: Any
    old: nn.Module
    new: nn.Module

    @property
    def current(self) -> object:
        """The layer that is there now; None if the list or dict has become shorter."""
        container = self._container
        is_list = isinstance(container, list)
        exists = self.key < len(container) if is_list else self.key in container
        return container[self.key] if exists else None

    def put(self, layer: nn.Module) -> None:
        """Put a layer there."""
        self._container[self.key] = layer

    @property
    def _container(self) -> Any:
        return self.parent._modules if isinstance(self.parent, nn.Module) else self.parent


class Placement(NamedTuple):
    """The mode, device and dtype of a layer."""

    training: bool
    device: torch.device | None
    dtype: torch.dtype | None

    def move(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device, and cast it to the dtype if it is a floating-point one."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


class LayerPair(NamedTuple):
    """An old layer, the layer that replaces it, and the new layer's placement at first."""

    old: nn.Module
    new: nn.Module
    placement: Placement

    def move_old(self, model: nn.Module) -> None:
        """Give the old layer the new layer's mode, device and dtype where these have changed."""
        now, shared = _placement(self.new, model), set(self.new.modules())
        for module in self.old.modules():
            if module not in shared and now.training != self.placement.training:
                module.training = now.training
            if module not in shared and now[1:] != self.placement[1:]:
                module._apply(now.move, recurse=False)


class SavedConvolution(NamedTuple):
    """The class and members of a convolution before its weight was standardised."""

    layer: nn.Module
    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    modules: dict[str, nn.Module | None]


class Swap:
    """Replaces layers, standardises weights and edits the optimizer; ``revert`` undoes all of it.

    ``revert`` restores saved state instead of reversing single changes, so it may run repeatedly.

    Args:
        model: The model, which ``apply`` changes.
        replacements: For each old module, the new one.
        standardize: Names of the convolutions whose weights to standardise.
        example_input: Used to trace the model if ``torch.fx`` cannot.
        edit: The changes to the optimizer.
        preserved: Those of these convolutions whose filters keep their gains and offsets, as
            learned parameters.
        keeps_values: Whether ``revert`` also restores the values of parameters that old and new
            layers share, because calibration changes them.
    """

    def __init__(  # noqa: PLR0913 - each a different part of the change
        self,
        model: nn.Module,
        replacements: Mapping[nn.Module, nn.Module],
        standardize: Sequence[str],
        example_input: Any,
        edit: OptimizerEdit | None,
        preserved: Collection[str] = (),
        keeps_values: bool = False,
    ) -> None:
        self.old, self.new = model, replacements.get(model, model)
        self._locations = list(_locations(model, replacements))
        self._pairs = [LayerPair(o, n, _placement(n, model)) for o, n in replacements.items()]
        preserved = frozenset(preserved).intersection(standardize)
        self._standardize = {False: frozenset(standardize) - preserved, True: preserved}
        self._convolutions = [
            SavedConvolution(layer, type(layer), dict(layer._parameters), dict(layer._modules))
            for layer in map(model.get_submodule, standardize)
        ]
        self._hooks = frozenset((*model._forward_hooks, *model._forward_pre_hooks))
        self._example_input = example_input
        self._edit, self._weights_edit = edit, None
        kept = [p for old in replacements for p in old.parameters()] if keeps_values else []
        self._values = [(parameter, parameter.detach().clone()) for parameter in kept]

    def apply(self) -> nn.Module:
        """Make all changes; return the model, or the new norm if the model is itself a norm."""
        for preserve, chosen in self._standardize.items():
            if chosen:
                self._standardize_weights(chosen, preserve)
        for location in self._locations:
            location.put(location.new)
        if self._edit is not None:
            self._edit.apply()
            self._weights_edit = self._edit_of_weights(self._edit.optimizer)
            self._weights_edit.apply()
        self._example_input = None
        return self.new

    def _standardize_weights(self, chosen: Collection[str], preserve: bool) -> None:
        standardize_weights_(
            self.old,
            lambda _, name: name in chosen,
            preserve=preserve,
            example_input=self._example_input,
        )

    @property
    def changed(self) -> list[nn.Module | Optimizer]:
        """Everything that ``apply`` and ``revert`` change: model, old layers and optimizer."""
        optimizers = [] if self._edit is None else [self._edit.optimizer]
        return [self.old, self.new, *(pair.old for pair in self._pairs), *optimizers]

    @property
    def olds(self) -> dict[nn.Module, nn.Module]:
        """For each new layer, the old one."""
        return {pair.new: pair.old for pair in self._pairs}

    def revert(self) -> nn.Module:
        """Restore everything that ``apply`` has changed, unless it is restored already.

        Raises:
            OptionError: If other code has replaced one of the layers since.
        """
        if self._is_reverted():
            return self.old
        for edit in (self._weights_edit, self._edit):
            if edit is not None:
                edit.undo()
        for location in self._locations:
            location.put(location.old)
        for saved in self._convolutions:
            _restore(saved)
        with torch.no_grad():
            for parameter, values in self._values:
                parameter.copy_(values)
        self._remove_hooks()
        # Replaced blocks contain replaced layers, which come first in the list. In reverse order
        # the inner layers are moved last, so their own mode, device and dtype count.
        for pair in reversed(self._pairs):
            pair.move_old(self.old)
        return self.old

    def _is_reverted(self) -> bool:
        """Whether the old layers are in their places.

        Raises:
            OptionError: If a place has neither the old layer nor the new one.
        """
        current = [(location, location.current) for location in self._locations]
        unknown = [at.key for at, layer in current if layer not in (at.old, at.new)]
        if unknown:
            raise OptionError(
                f"layers {', '.join(map(repr, unknown))} were replaced since this conversion; "
                f"revert the later conversion first"
            )
        return bool(current) and all(layer is at.old for at, layer in current)

    def _edit_of_weights(self, optimizer: Optimizer) -> OptimizerEdit:
        """Add the gains and offsets of standardised weights to the weights' optimizer groups."""
        exchanges = [
            Exchange(
                [(name, p) for name, p in saved.parameters.items() if p is not None],
                list(saved.layer.named_parameters()),
            )
            for saved in self._convolutions
        ]
        return OptimizerEdit(optimizer, exchanges, self.new.parameters())

    def _remove_hooks(self) -> None:
        """Remove the hooks that a weight cache has registered on the model since."""
        hooks = {**self.old._forward_hooks, **self.old._forward_pre_hooks}
        for key, hook in hooks.items():
            owner = getattr(hook, "__self__", None)
            if key not in self._hooks and isinstance(owner, WeightCache):
                owner.remove()


def _locations(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterable[Location]:
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                yield Location(parent, key, child, replacements[child])
    for hidden in find_hidden(model):
        if hidden.norm in replacements and hidden.holder is not None:
            yield Location(hidden.holder, hidden.key, hidden.norm, replacements[hidden.norm])


def _placement(layer: nn.Module, model: nn.Module) -> Placement:
    """Read device and dtype from a parameter of the layer or, if it has none, of the model."""
    found = next(chain(layer.parameters(), model.parameters()), None)
    device, dtype = (None, None) if found is None else (found.device, found.dtype)
    return Placement(layer.training, device, dtype)


def _restore(saved: SavedConvolution) -> None:
    layer, kind, parameters, modules = saved
    layer.__class__ = kind  # type: ignore[assignment]
    for held, values in ((layer._parameters, parameters), (layer._modules, modules)):
        held.clear()
        held.update(values)  # type: ignore[arg-type]
