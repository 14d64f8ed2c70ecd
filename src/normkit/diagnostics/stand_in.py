"""Gradients with respect to tensors that weight standardization computes from the raw weight."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import Tensor, nn

from normkit.errors import DataError, OptionError
from normkit.inference.tracked import Where, and_reasons, select_layers
from normkit.weights.attach import rules_of
from normkit.weights.parametrizations import WeightStandardization

T = TypeVar("T")
Rules = Mapping[str, WeightStandardization]
Filters = Tensor
"""Weights of a layer as ``(1, filters, fan-in)``."""


def standardised(model: nn.Module) -> dict[str, WeightStandardization]:
    """Find the layers with standardised weights, each with its parametrization.

    Raises:
        OptionError: If there is none.
    """
    found = {
        name: rule
        for name, module in model.named_modules()
        for rule in rules_of(module)
        if isinstance(rule, WeightStandardization)
    }
    if not found:
        raise OptionError(
            f"{type(model).__name__} has no standardised weight; nk.standardize_weights_(model) "
            f"standardises them"
        )
    return found


def measurable(
    model: nn.Module, where: Where | None, why_not: Callable[[WeightStandardization], str]
) -> tuple[dict[str, WeightStandardization], dict[str, str]]:
    """Choose the standardised layers to measure, and say why others cannot be measured.

    Args:
        model: The model.
        where: ``where(layer, name)``; None takes all.
        why_not: ``why_not(rule)`` says why a layer cannot be measured; empty if it can.

    Raises:
        OptionError: If none is left.
    """
    rules = standardised(model)
    layers = select_layers({name: model.get_submodule(name) for name in rules}, where)
    left = {name: why for name in layers if (why := why_not(rules[name]))}
    taken = {name: rules[name] for name in layers if name not in left}
    if not taken:
        raise OptionError(f"no standardised weight can be measured{and_reasons(left)}")
    return taken, left


def not_reached(names: Iterable[str]) -> dict[str, str]:
    """Give layers the reason that no batch has reached them."""
    return dict.fromkeys(names, "no batch has reached it")


def require_any(reached: dict[str, T]) -> dict[str, T]:
    """Refuse a measurement in which no batch has reached any layer.

    Raises:
        DataError: If there is none.
    """
    if not reached:
        raise DataError(
            "no batch has reached a layer with a standardised weight: forward= goes past them"
        )
    return reached


@contextmanager
def stand_ins(
    rules: Rules,
    start: Callable[[WeightStandardization, Tensor], Filters],
    follow: Callable[[WeightStandardization, Filters], Filters],
) -> Generator[dict[str, Filters]]:
    """Let each layer compute its weight from a new leaf tensor, which then gets a gradient.

    Args:
        rules: The layers' parametrizations, by name.
        start: ``start(rule, raw)`` computes that tensor from the raw weight.
        follow: ``follow(rule, tensor)`` computes the standardised filters from it, before gain and
            offset.

    Yields:
        The tensors by name; a layer's tensor is added when the layer is first called.
    """
    leaves: dict[str, Filters] = {}

    def standing_in(name: str) -> Callable[..., Tensor]:
        def replace(rule: WeightStandardization, args: tuple[Tensor], _weight: Tensor) -> Tensor:
            raw = args[0].detach()
            if name not in leaves:
                leaves[name] = start(rule, raw).detach().requires_grad_()
            made = follow(rule, leaves[name])
            gain, offset = rule.gain_and_offset()
            if gain is not None:
                made = made * gain.detach()[:, None]
            if offset is not None:
                made = made + offset.detach()[:, None]
            return rule.filters.weight(made.to(raw.dtype), raw)

        return replace

    with ExitStack() as hooks:
        for name, rule in rules.items():
            hooks.callback(rule.register_forward_hook(standing_in(name)).remove)
        yield leaves
