"""Arguments that the functions without state share, with their checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict, TypeVar

from torch import Tensor

from normkit.core.check import (
    require_eps,
    require_feature_map,
    require_known,
    require_per_channel,
    require_share,
)
from normkit.core.ending import Ending, read_ending
from normkit.core.parameters import Parameters
from normkit.core.running import RunningStatistics
from normkit.errors import InputError
from normkit.kernels.activations import ActivationName
from normkit.typing import FeatureMap, PerChannel


class Options(TypedDict, total=False):
    """Options of every function, by keyword.

    Args:
        eps: Added to the variances; unit of ``x`` squared. Default 1e-5.
        activation: Activation that is applied last: ``"relu"``, ``"leaky_relu"``, ``"silu"``,
            ``"gelu"`` (by the error function), ``"hardswish"``, ``"sigmoid"``, ``"tanh"`` or
            ``"relu6"``. Default None: no activation.
        negative_slope: Slope of ``"leaky_relu"`` below 0. Default 0.01.
        residual: Added before the activation; it has the shape, dtype and device of ``x``. Default
            None: nothing is added.
    """

    eps: float
    activation: ActivationName | None
    negative_slope: float
    residual: FeatureMap | None


class StatisticsOptions(TypedDict, total=False):
    """Options of every function that takes running statistics, by keyword.

    Args:
        training: Normalise by the input's own statistics and update the running ones. Default
            False: normalise by the running ones.
        momentum: Weight of the new value in the running statistics, from 0 to 1. Default 0.1.
        eps: Added to the variances; unit of ``x`` squared. Default 1e-5.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1, in the
            stages that have running statistics. Default 0.
        activation: Activation that is applied last, as in ``Options``. Default None.
        negative_slope: Slope of ``"leaky_relu"`` below 0. Default 0.01.
        residual: Added before the activation; it has the shape, dtype and device of ``x``. Default
            None: nothing is added.
    """

    training: bool
    momentum: float
    eps: float
    example_weight: float
    activation: ActivationName | None
    negative_slope: float
    residual: FeatureMap | None


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a function: its name, its input, and every option."""

    name: str
    x: FeatureMap
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    example_weight: float = 0.0
    activation: ActivationName | None = None
    negative_slope: float = 0.01
    residual: FeatureMap | None = None

    @classmethod
    def of(cls, name: str, x: FeatureMap, options: Options) -> Self:
        """A call of a function without running statistics.

        Raises:
            ArgumentError: If an option is unknown.
        """
        return cls._read(name, x, options, Options)

    @classmethod
    def with_statistics(cls, name: str, x: FeatureMap, options: StatisticsOptions) -> Self:
        """A call of a function that takes running statistics.

        Raises:
            ArgumentError: If an option is unknown.
        """
        return cls._read(name, x, options, StatisticsOptions)

    @classmethod
    def _read(cls, name: str, x: FeatureMap, options: Mapping[str, Any], kind: type[Any]) -> Self:
        require_known(name, options, kind.__annotations__)
        return cls(name=name, x=x, **options)

    def parameters(self, weight: PerChannel | None, bias: PerChannel | None) -> Parameters:
        """Check the feature map and its parameters, and return the parameters together.

        Raises:
            InputError: If shapes do not match.
            InputTypeError: If the dtype is not supported.
            OptionError: If ``eps`` is negative or not finite.
        """
        require_feature_map(self.x, None, self.name)
        require_eps(self.eps)
        require_per_channel(weight, self.x.shape, "weight", self.name)
        require_per_channel(bias, self.x.shape, "bias", self.name)
        return Parameters(weight, bias, self.eps)

    def statistics(
        self, mean: Tensor | None, var: Tensor | None, num_values: int, *, is_needed: bool
    ) -> RunningStatistics | None:
        """Put running mean and variance together with their options; None if neither was given.

        Args:
            mean: Running mean.
            var: Running variance.
            num_values: Number of values that each must have.
            is_needed: Whether this call needs them.

        Raises:
            InputError: If the shapes do not fit, or statistics are needed and were not given.
            OptionError: If an option does not lie from 0 to 1.
        """
        require_share("momentum", self.momentum)
        require_share("example_weight", self.example_weight)
        if mean is None and var is None:
            if not is_needed:
                return None
            raise InputError(
                f"{self.name} was called with training=False and without running statistics; pass "
                f"running_mean= and running_var=, or training=True to use the input's own"
            )
        expected = (num_values,)
        if mean is None or var is None or mean.shape != expected or var.shape != expected:
            shapes = [None if t is None else tuple(t.shape) for t in (mean, var)]
            raise InputError(
                f"running_mean and running_var were given with shapes {shapes[0]} and {shapes[1]}; "
                f"pass both, of shape {expected}, or neither"
            )
        return RunningStatistics(mean, var, None, self.momentum, self.example_weight)

    def require_values(self, values: Tensor | None, shape: tuple[int, ...], what: str) -> None:
        """Refuse a parameter of another shape.

        Raises:
            InputError: If the shapes differ.
        """
        if values is not None and tuple(values.shape) != shape:
            raise InputError(
                f"{self.name} was given {what} of shape {tuple(values.shape)}; it takes shape "
                f"{shape}"
            )

    def ending(self) -> Ending | None:
        """Residual and activation; None if there is neither.

        Raises:
            OptionError: If the activation is unknown.
            InputError: If the residual has another shape or device.
            InputTypeError: If it has another dtype.
        """
        return read_ending(self.x, self.activation, self.negative_slope, self.residual, self.name)


def with_named_options(function: F) -> F:
    """Give a function a ``__signature__`` in which ``help`` finds its options by name."""
    *own, options = inspect.signature(function).parameters.values()
    kind = Options if str(options.annotation) == "Unpack[Options]" else StatisticsOptions
    defaults = {field.name: field.default for field in fields(Call)}
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name])
        for name in kind.__annotations__
    ]
    function.__signature__ = inspect.Signature([*own, *named])  # pyright: ignore[reportFunctionMemberAccess]
    return function
