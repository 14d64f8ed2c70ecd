"""What may follow a norm in the same pass: ``y = act(norm(x) + residual)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from normkit.core.mask import Valid, without_invalid
from normkit.core.normalize import differentiable_gradient
from normkit.errors import InputError, InputTypeError, OptionError
from normkit.kernels.activations import KINDS, Activation, Kind, activate, pass_back
from normkit.typing import FeatureMap


class Ending(NamedTuple):
    """What is done with the normalised map.

    Args:
        activation: Applied last.
        residual: Added before, in the shape, dtype and device of ``x``; None adds nothing.
    """

    activation: Activation
    residual: FeatureMap | None = None


def ended(y: FeatureMap, ending: Ending | None, valid: Valid | None = None) -> FeatureMap:
    """``act(y + residual)`` in torch's operations; 0 where a mask says that nothing is valid."""
    if ending is None:
        return y
    residual = ending.residual
    if residual is not None:
        y = y + (residual if valid is None else without_invalid(residual, valid))
    y = activate(y, ending.activation)
    return y if valid is None else without_invalid(y, valid)


def differentiable_ended(
    formula: Callable[..., Tensor], activation: Activation, has_residual: bool
) -> Callable[..., Any]:
    """Gradients of ``act(formula(x, *parameters) + residual)`` that can be differentiated again.

    Of ``(grad, (x, *parameters), kept, wanted)``, wanted being of x, the residual and parameters.
    """

    # This function must not refer to the residual: autograd would keep the tensor until backward.
    def differentiable(
        grad: Tensor,
        inputs: tuple[Tensor | None, ...],
        kept: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        x, *parameters = inputs
        if has_residual and (activation.is_signed or not activation.kind):
            passed = grad if kept is None else pass_back(grad, kept, activation)
            own = (wanted[0], *wanted[2:])
            dx, *found = differentiable_gradient(formula, (x, *parameters), own, passed)
            return dx, passed if wanted[1] else None, *found

        def whole(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> Tensor:
            return ended(formula(x, *parameters), Ending(activation, residual))

        return tuple(differentiable_gradient(whole, (x, kept, *parameters), wanted, grad))

    return differentiable


def read_activation(name: str | None, negative_slope: float) -> Activation:
    """The activation of this name.

    Raises:
        OptionError: If there is none of this name, or the slope is no number.
    """
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, int | float):
        raise OptionError(
            f"negative_slope={negative_slope!r} was given; it is a number, what a leaky ReLU "
            f"multiplies values below 0 by"
        )
    if name is None:
        return Activation(0)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise OptionError(
            f"activation={name!r} was given; these are known: {', '.join(map(repr, KINDS))}, or "
            f"None for none"
        )
    return Activation(int(kind), float(negative_slope) if kind == Kind.LEAKY_RELU else 0.0)


def require_residual(residual: Tensor, x: FeatureMap, name: str) -> None:
    """Refuse what cannot be added element by element.

    Raises:
        InputTypeError: If it is no tensor, or its dtype is not that of the input.
        InputError: If its shape or its device is not that of the input.
    """
    if not isinstance(residual, Tensor):
        raise InputTypeError(
            f"{name} was given a residual that is a {type(residual).__name__}; it takes a tensor "
            f"of the input's shape {tuple(x.shape)}"
        )
    if residual.shape != x.shape:
        raise InputError(
            f"{name} was given a residual of shape {tuple(residual.shape)} for an input of shape "
            f"{tuple(x.shape)}; both have the same shape: nothing is broadcast, so expand it "
            f"first (residual.expand_as(x))"
        )
    if residual.dtype != x.dtype:
        raise InputTypeError(
            f"{name} was given a residual of {residual.dtype} for an input of {x.dtype}, both of "
            f"shape {tuple(x.shape)}; convert it first: residual.to(x.dtype)"
        )
    if residual.device != x.device:
        raise InputError(
            f"{name} was given a residual on {residual.device} and an input on {x.device}, both of "
            f"shape {tuple(x.shape)}; move it first: residual.to(x.device)"
        )


def read_ending(
    x: FeatureMap,
    activation: str | None,
    negative_slope: float,
    residual: FeatureMap | None,
    name: str,
) -> Ending | None:
    """What the functions without state do at the end; None if nothing."""
    found = read_activation(activation, negative_slope)
    if residual is None:
        return Ending(found) if found.kind else None
    require_residual(residual, x, name)
    return Ending(found, residual)
