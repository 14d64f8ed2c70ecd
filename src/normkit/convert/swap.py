"""The one place that changes a model: everything is known before, and can be put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


class Slot(NamedTuple):
    """A place in the model where a layer is exchanged: in a module, or in a list or dict of it."""

    parent: nn.Module | list[Any] | dict[Any, Any]
    key: Any
    old: nn.Module
    new: nn.Module

    @property
    def now(self) -> object:
        """What is there."""
        held = self._held
        there = self.key < len(held) if isinstance(held, list) else self.key in held
        return held[self.key] if there else None

    def put(self, layer: nn.Module) -> None:
        """Exchange what is there."""
        self._held[self.key] = layer

    @property
    def _held(self) -> Any:  # noqa: ANN401 - a list or a dict
        return self.parent._modules if isinstance(self.parent, nn.Module) else self.parent


class Place(NamedTuple):
    """In which mode, where and in which precision a layer computes."""

    training: bool
    device: torch.device | None
    dtype: torch.dtype | None

    def take(self, tensor: Tensor) -> Tensor:
        """Bring a tensor here."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


class Pair(NamedTuple):
    """A layer and its successor, which was in this place at first."""

    old: nn.Module
    new: nn.Module
    place: Place

    def follow(self, model: nn.Module) -> None:
        """Bring the old layer to the mode and the place that the new one was put in since."""
        place, kept = _place(self.new, model), set(self.new.modules())
        for module in self.old.modules():
            if module not in kept and place.training != self.place.training:
                module.training = place.training
            if module not in kept and place[1:] != self.place[1:]:
                module._apply(place.take, recurse=False)


class Before(NamedTuple):
    """A convolution as it was."""

    layer: nn.Module
    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    modules: dict[str, nn.Module | None]


class Swap:
    """Layers to exchange, weights to standardise, an optimizer to follow.

    What ``revert`` puts back is absolute, not the reverse of what was done.

    Args:
        model: The model, changed by ``apply``.
        replacements: New layers for old ones.
        standardize: Names of convolutions whose weights to standardise.
        example_input: For following the model.
        edit: What changes in the optimizer.
        keep_function: Whether the new layers are calibrated next: standardised weights then start
            with the old gain and offset of each filter, and what the old layers share with the
            new ones gets its values back too.
    """

    def __init__(
        self,
        model: nn.Module,
        replacements: Mapping[nn.Module, nn.Module],
        standardize: Sequence[str],
        example_input: Any,  # noqa: ANN401
        edit: OptimizerEdit | None,
        keep_function: bool = False,
    ) -> None:
        self.old, self.new = model, replacements.get(model, model)
        self._slots = list(_slots(model, replacements))
        self._pairs = [Pair(o, n, _place(n, model)) for o, n in replacements.items()]
        self._standardize = frozenset(standardize)
        self._weights = [_before(model.get_submodule(name)) for name in standardize]
        self._hooks = frozenset((*model._forward_hooks, *model._forward_pre_hooks))
        self._example_input = example_input
        self._edit, self._weights_edit = edit, None
        self._keep_function = keep_function
        kept = [p for old in replacements for p in old.parameters()] if keep_function else []
        self._values = [(parameter, parameter.detach().clone()) for parameter in kept]

    def apply(self) -> nn.Module:
        """Change everything; return the model, which is another one if it is itself a norm."""
        if self._standardize:
            chosen = self._standardize
            standardize_weights_(
                self.old,
                lambda _, name: name in chosen,
                preserve=self._keep_function,
                example_input=self._example_input,
            )
        for slot in self._slots:
            slot.put(slot.new)
        if self._edit is not None:
            self._edit.apply()
            self._weights_edit = self._edit_of_weights(self._edit.optimizer)
            self._weights_edit.apply()
        self._example_input = None
        return self.new

    @property
    def changed(self) -> list[nn.Module | Optimizer]:
        """What ``apply`` and ``revert`` change: the model, old layers, the optimizer."""
        optimizers = [] if self._edit is None else [self._edit.optimizer]
        return [self.old, self.new, *(pair.old for pair in self._pairs), *optimizers]

    def revert(self) -> nn.Module:
        """Put everything back that ``apply`` has changed; once it is back, nothing happens.

        Raises:
            OptionError: If somebody else has replaced one of the layers since.
        """
        if self._is_back():
            return self.old
        for edit in (self._weights_edit, self._edit):
            if edit is not None:
                edit.undo()
        for slot in self._slots:
            slot.put(slot.old)
        for before in self._weights:
            _put_back(before)
        with torch.no_grad():
            for parameter, values in self._values:
                parameter.copy_(values)
        self._remove_hooks()
        for pair in reversed(self._pairs):  # layers inside of a block come before it, and decide
            pair.follow(self.old)
        return self.old

    def _is_back(self) -> bool:
        """Whether the old layers are in their places.

        Raises:
            OptionError: If others are that nobody knows here.
        """
        now = [slot.now for slot in self._slots]
        lost = [s.key for s, m in zip(self._slots, now, strict=True) if m not in (s.old, s.new)]
        if lost:
            raise OptionError(
                f"layers {', '.join(map(repr, lost))} were replaced since this conversion; revert "
                f"the later one first"
            )
        return bool(self._slots) and all(s.old is m for s, m in zip(self._slots, now, strict=True))

    def _edit_of_weights(self, optimizer: Optimizer) -> OptimizerEdit:
        """Let gains and offsets that standardised weights have gained join the weights' groups."""
        exchanges = [
            Exchange(
                [(name, p) for name, p in before.parameters.items() if p is not None],
                list(before.layer.named_parameters()),
            )
            for before in self._weights
        ]
        return OptimizerEdit(optimizer, exchanges, self.new.parameters())

    def _remove_hooks(self) -> None:
        """Take away what standardising shared convolutions has hung on the model."""
        hooks = {**self.old._forward_hooks, **self.old._forward_pre_hooks}
        for key, hook in hooks.items():
            owner = getattr(hook, "__self__", None)
            if key not in self._hooks and isinstance(owner, WeightCache):
                owner.remove()


def _slots(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterable[Slot]:
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                yield Slot(parent, key, child, replacements[child])
    for hidden in find_hidden(model):
        if hidden.norm in replacements and hidden.holder is not None:
            yield Slot(hidden.holder, hidden.key, hidden.norm, replacements[hidden.norm])


def _place(layer: nn.Module, model: nn.Module) -> Place:
    """Find where a layer is, by a parameter of its own or, if it has none, of its model."""
    found = next(chain(layer.parameters(), model.parameters()), None)
    device, dtype = (None, None) if found is None else (found.device, found.dtype)
    return Place(layer.training, device, dtype)


def _before(layer: nn.Module) -> Before:
    return Before(layer, type(layer), dict(layer._parameters), dict(layer._modules))


def _put_back(before: Before) -> None:
    layer, kind, parameters, modules = before
    layer.__class__ = kind  # type: ignore[assignment]
    for held, values in ((layer._parameters, parameters), (layer._modules, modules)):
        held.clear()
        held.update(values)  # type: ignore[arg-type]
