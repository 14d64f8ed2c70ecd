"""The model's forward on an example, before a conversion and after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normkit.convert.plan import Plan
from normkit.convert.report import Left, called_as_functions
from normkit.errors import ConversionError, NormError, TraceError
from normkit.passes import call_with, copied, replaced_forward, untouched
from normkit.text import module_name, shortened
from normkit.tracing.by_running import trace_by_running
from normkit.tracing.trace import has_forward, no_forward_advice

REFUSES = "in training it refuses the example input, which the old layer takes: "

Refusals = dict[nn.Module, str]
Calls = Mapping[nn.Module, int]


class Trial:
    """Runs the forward before the change, and again after it: the same calls must be possible.

    What is left then besides norms that are modules is in ``left``.

    It runs in evaluation mode; where the model trains and takes the example in training, there
    too. The model is left as it was.

    Args:
        model: The model before the change.
        planned: What is to become what.
        example_input: A tuple of arguments, a dict of named ones, or the only one.

    Raises:
        TraceError: If the model itself does not take the example.
        ConversionError: If it has lazy layers, which a forward would fill.
    """

    def __init__(self, model: nn.Module, planned: Plan, example_input: Any) -> None:  # noqa: ANN401
        _require_filled(model)
        if not has_forward(model):
            raise TraceError(f"{type(model).__name__} takes no example: {no_forward_advice(model)}")
        self._steps, self._example_input = planned.steps, example_input
        olds = [step.old for step in planned.steps]
        try:
            self._calls = _run(model, olds, example_input, training=False)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} itself does not take the example input: "
                f"{_described(error)}; nothing was changed"
            ) from error
        self._trained = model.training and _succeeds(model, olds, example_input)
        self.left = _functions(model, example_input)

    def check(self, model: nn.Module) -> dict[str, list[str]]:
        """Run the changed model; return by name what the report has to say of its layers.

        Raises:
            ConversionError: If the forward fails, or calls the new layers less or more often.
        """
        news = [step.new for step in self._steps]
        try:
            calls = _run(model, news, self._example_input, training=False)
            refused = self._refusals_in_training(model, news)
        except Exception as error:
            raise ConversionError(
                f"the converted model fails on the example input ({_described(error)}), and the "
                f"original does not; nothing was changed. Its forward uses a norm in another way "
                f"than by calling it, or the new norm refuses its input: leave that one alone "
                f"with where="
            ) from error
        self._require_same_calls(calls)
        found: dict[str, list[str]] = {s.change.name: [] for s in self._steps}
        for step in self._steps:
            if step.new in refused:
                found[step.change.name] += [f"{REFUSES}{refused[step.new]}"]
            if not calls[step.new]:
                found[step.change.name] += ["the forward does not call it on the example input"]
        return found

    def _refusals_in_training(self, model: nn.Module, news: Sequence[nn.Module]) -> Refusals:
        refused: Refusals = {}
        if self._trained:
            _run(model, news, self._example_input, training=True, refused=refused)
        return refused

    def _require_same_calls(self, calls: Calls) -> None:
        for step in self._steps:
            before, after = self._calls[step.old], calls[step.new]
            if before != after:
                raise ConversionError(
                    f"{module_name(step.change.name)} was called {before} times on the example "
                    f"input and is called {after} times after the conversion: the forward goes by "
                    f"the norm's class or fields. Nothing was changed; leave the layer alone with "
                    f"where="
                )


def own_forwards(model: nn.Module, planned: Plan) -> tuple[str, ...]:
    """Classes with a forward of their own that hold a norm which is to be exchanged."""
    olds = {step.old for step in planned.steps}
    holders = (m for m in model.modules() if m not in olds and not olds.isdisjoint(m.modules()))
    own = (m for m in holders if has_forward(m) and type(m).forward is not nn.Sequential.forward)
    return tuple(dict.fromkeys(type(m).__name__ for m in own))


def _functions(model: nn.Module, example_input: Any) -> tuple[Left, ...]:  # noqa: ANN401
    try:
        return tuple(called_as_functions(trace_by_running(model, copied(example_input))))
    except Exception:  # noqa: BLE001 - code that runs, but not while its calls are watched
        return ()


def _require_filled(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConversionError(
                f"{name} does not know its shape yet; send one batch through the model first"
            )


def _succeeds(model: nn.Module, norms: Iterable[nn.Module], example_input: Any) -> bool:  # noqa: ANN401
    try:
        _run(model, norms, example_input, training=True)
    except Exception:  # noqa: BLE001 - such as a batch of one, which training refuses
        return False
    return True


def _run(
    model: nn.Module,
    norms: Iterable[nn.Module],
    example_input: Any,  # noqa: ANN401
    *,
    training: bool,
    refused: Refusals | None = None,
) -> Counter[nn.Module]:
    """Count the calls of norms in one forward, in evaluation mode or in the model's own.

    Args:
        model: Left as it was.
        norms: Whose calls are counted.
        example_input: What is sent through.
        training: Whether the modules keep their modes.
        refused: Takes what norms of ours say when they refuse an input, which is given on then.
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
        def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
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
