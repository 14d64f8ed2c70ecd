"""Comparing the model's forward on an example input before and after a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normkit.convert.plan import ConversionPlan
from normkit.convert.report import Left, called_as_functions
from normkit.errors import ConversionError, NormError, TraceError
from normkit.passes import call_with, copied, replaced_forward, untouched
from normkit.text import module_name, shortened
from normkit.tracing.by_running import trace_by_running
from normkit.tracing.trace import has_forward, no_forward_advice

REFUSES = "in training it refuses the example input, which the old layer accepts: "

Refusals = dict[nn.Module, str]
Calls = Mapping[nn.Module, int]


class ForwardCheck:
    """Runs the forward before and after the conversion, and requires the same calls of norms.

    The forward runs in evaluation mode. If the model is in training mode and accepts the example
    input there, the forward runs in training mode too. The model is not changed. Afterwards
    ``left`` lists the norms that the forward calls as functions.

    Args:
        model: The model before the conversion.
        planned: The planned conversion.
        example_input: A tuple of arguments, a dict of keyword arguments, or a single argument.

    Raises:
        TraceError: If the model does not accept the example input.
        ConversionError: If the model has uninitialised lazy layers, because the forward would
            initialise them.
    """

    def __init__(self, model: nn.Module, planned: ConversionPlan, example_input: Any) -> None:
        _require_filled(model)
        if not has_forward(model):
            raise TraceError(
                f"{type(model).__name__} takes no example input: {no_forward_advice(model)}"
            )
        self._replacements, self._example_input = planned.replacements, example_input
        olds = [replacement.old for replacement in planned.replacements]
        try:
            self._calls = _run(model, olds, example_input, training=False)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} itself does not accept the example input: "
                f"{_described(error)}; nothing was changed"
            ) from error
        self._runs_in_training = model.training and _succeeds(model, olds, example_input)
        self.left = _norm_functions(model, example_input)

    def run(self, model: nn.Module) -> dict[str, list[str]]:
        """Run the converted model; return the warnings for the report, by the norms' names.

        Raises:
            ConversionError: If the forward fails, or calls a new layer less or more often.
        """
        news = [replacement.new for replacement in self._replacements]
        refused: Refusals = {}
        try:
            calls = _run(model, news, self._example_input, training=False)
            if self._runs_in_training:
                _run(model, news, self._example_input, training=True, refused=refused)
        except Exception as error:
            raise ConversionError(
                f"the converted model fails on the example input ({_described(error)}), but the "
                f"original does not; nothing was changed. Either its forward uses a norm in "
                f"another way than by calling it, or the new norm refuses its input: leave that "
                f"norm out with where="
            ) from error
        self._require_same_calls(calls)
        warnings: dict[str, list[str]] = {}
        for replacement in self._replacements:
            said = warnings.setdefault(replacement.change.name, [])
            if replacement.new in refused:
                said.append(f"{REFUSES}{refused[replacement.new]}")
            if not calls[replacement.new]:
                said.append("the forward does not call it on the example input")
        return warnings

    def _require_same_calls(self, calls: Calls) -> None:
        for replacement in self._replacements:
            before, after = self._calls[replacement.old], calls[replacement.new]
            if before != after:
                raise ConversionError(
                    f"{module_name(replacement.change.name)} was called {before} times on the "
                    f"example input, but is called {after} times after the conversion: the forward "
                    f"depends on the norm's class or attributes. Nothing was changed; leave the "
                    f"layer out with where="
                )


def custom_forwards(model: nn.Module, planned: ConversionPlan) -> tuple[str, ...]:
    """Return the classes, except ``Sequential``, whose forward may use a norm to be replaced."""
    olds = {replacement.old for replacement in planned.replacements}
    holders = (m for m in model.modules() if m not in olds and not olds.isdisjoint(m.modules()))
    own = (m for m in holders if has_forward(m) and type(m).forward is not nn.Sequential.forward)
    return tuple(dict.fromkeys(type(m).__name__ for m in own))


def _norm_functions(model: nn.Module, example_input: Any) -> tuple[Left, ...]:
    try:
        return tuple(called_as_functions(trace_by_running(model, copied(example_input))))
    except Exception:  # noqa: BLE001 - some code runs, but fails under a torch function mode
        return ()


def _require_filled(model: nn.Module) -> None:
    """Refuse a model with lazy parameters that have no values yet.

    Raises:
        ConversionError: If there is one; the error names it.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConversionError(
                f"{name} does not know its shape yet; send one batch through the model first"
            )


def _succeeds(model: nn.Module, norms: Iterable[nn.Module], example_input: Any) -> bool:
    try:
        _run(model, norms, example_input, training=True)
    except Exception:  # noqa: BLE001 - for instance, batch norm refuses a batch of one in training
        return False
    return True


def _run(
    model: nn.Module,
    norms: Iterable[nn.Module],
    example_input: Any,
    *,
    training: bool,
    refused: Refusals | None = None,
) -> Counter[nn.Module]:
    """Count the calls of norms in one forward, in evaluation mode or in the model's own mode.

    Args:
        model: The model; it is not changed.
        norms: The norms whose calls are counted.
        example_input: Sent through the model.
        training: Whether the modules keep their modes, rather than being in evaluation mode.
        refused: If given, a norm that refuses its input passes the input on, and its error text is
            stored here.
    """
    calls: Counter[nn.Module] = Counter()
    with ExitStack() as stack:
        stack.enter_context(untouched(model, training=None if training else False))
        stack.enter_context(torch.no_grad())
        for norm in norms:
            stack.enter_context(replaced_forward(norm, _counting(norm, calls, refused)))
        call_with(model, copied(example_input))
    return calls


def _counting(
    norm: nn.Module, calls: Counter[nn.Module], refused: Refusals | None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[norm] += 1
            try:
                return forward(*args, **kwargs)
            except NormError as error:
                if refused is None:
                    raise
                refused[norm] = shortened(error)
                return next(iter((*args, *kwargs.values())))

        return counted

    return make


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {shortened(error)}"
