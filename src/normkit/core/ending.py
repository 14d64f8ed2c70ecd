"""The ending of a norm's call: a residual and an activation, ``y = act(norm(x) + residual)``."""

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
    """What a layer does after it has normalised a map.

    Args:
        activation: The activation, applied last.
        residual: Added before the activation; it has the shape, dtype and device of ``x``. None
            adds nothing.
    """

    activation: Activation
    residual: FeatureMap | None = None


def ended(y: FeatureMap, ending: Ending | None, valid: Valid | None = None) -> FeatureMap:
    """Compute ``act(y + residual)`` by torch's operations; 0 at positions that are not valid."""
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
    """Return a function that computes gradients of ``act(formula(x, *parameters) + residual)``.

    Autograd can differentiate these gradients again. The function takes
    ``(grad, (x, *parameters), kept, wanted)``, where ``kept`` is the map that
    ``ended_nodes.kept_beside`` returned and ``wanted`` says whether the gradients of x, of the
    residual and of each parameter are wanted.
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
        OptionError: If the name is unknown, or the slope is not a number.
    """
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, int | float):
        raise OptionError(
            f"negative_slope={negative_slope!r} was given; it must be a number: the factor "
            f"by which a leaky ReLU multiplies values below 0"
        )
    if name is None:
        return Activation(0)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise OptionError(
            f"activation={name!r} was given; these are known: {', '.join(map(repr, KINDS))}; None "
            f"applies no activation"
        )
    return Activation(int(kind), float(negative_slope) if kind == Kind.LEAKY_RELU else 0.0)


def require_residual(residual: Tensor, x: FeatureMap, name: str) -> None:
    """Refuse a residual that cannot be added to ``x`` element by element.

    Raises:
        InputTypeError: If it is not a tensor, or its dtype is not that of the input.
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
            f"{tuple(x.shape)}; it must have the input's shape, because residuals are not "
            f"broadcast: expand it first (residual.expand_as(x))"
        )
    if residual.dtype != x.dtype:
        raise InputTypeError(
            f"{name} was given a residual of {residual.dtype} for an input of {x.dtype}, both of "
            f"shape {tuple(x.shape)}; both must have one dtype: convert it first, "
            f"residual.to(x.dtype)"
        )
    if residual.device != x.device:
        raise InputError(
            f"{name} was given a residual on {residual.device} and an input on {x.device}, both of "
            f"shape {tuple(x.shape)}; both must be on one device: move it first, "
            f"residual.to(x.device)"
        )


def read_ending(
    x: FeatureMap,
    activation: str | None,
    negative_slope: float,
    residual: FeatureMap | None,
    name: str,
) -> Ending | None:
    """The ending that a function of ``normkit.functional`` was asked for; None without one."""
    found = read_activation(activation, negative_slope)
    if residual is None:
        return Ending(found) if found.kind else None
    require_residual(residual, x, name)
    return Ending(found, residual)
