"""Tracing a model by running it on an example input, with hooks and a torch function mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from normkit.passes import call_with, changes_nothing, untouched
from normkit.tracing.graph import Call, Graph
from normkit.tracing.kinds import (
    is_norm,
    is_producer,
    kind_of_module,
    kind_of_operation,
    plain_name,
    value_arguments,
)


@changes_nothing
def trace_by_running(model: nn.Module, example_input: Any) -> Graph:
    """Record the calls of one forward in evaluation mode, without gradients.

    Args:
        model: The model; it is not changed.
        example_input: A tuple of arguments, a dict of keyword arguments, or a single argument.

    Raises:
        Exception: Whatever the model's code raises on this input.
    """
    recorder = _Recorder(tree_leaves(example_input))
    with ExitStack() as stack:
        stack.enter_context(untouched(model, training=False))
        stack.enter_context(torch.no_grad())
        for name, module in model.named_modules():
            if module is not model and _is_leaf(module):
                for handle in recorder.register_hooks(name, module):
                    stack.callback(handle.remove)
        stack.enter_context(recorder)
        output = call_with(model, example_input)
    recorder.record("the output", "output", tree_leaves(output), ())
    return Graph(tuple(recorder.calls), "the example input")


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of the module is recorded as one call, without the calls inside it."""
    torch_layer = type(module).__module__.startswith("torch.nn") and not any(module.children())
    return is_norm(module) or is_producer(module) or torch_layer


class _Recorder(TorchFunctionMode):
    """Records the calls of leaf modules, and of torch functions outside of leaf modules."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._made_by = WeakTensorKeyDictionary()
        self._depth = 0  # number of leaf modules that are being called; inside, nothing is recorded
        self.record("input", "input", (), inputs)

    def record(self, name: str, kind: Any, inputs: Iterable[Any], outputs: Iterable[Any]) -> None:
        """Record a call as the latest one that made or changed the output tensors."""
        sources = [self._made_by.get(t) for t in inputs if isinstance(t, Tensor)]
        known = tuple(dict.fromkeys(index for index in sources if index is not None))
        self.calls.append(Call(name, kind, known))
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                self._made_by[tensor] = len(self.calls) - 1

    def __torch_function__(  # torch calls this instead of each of its functions
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._depth == 0:
            name = plain_name(func)
            inputs = tree_leaves(value_arguments(name, (*args, kwargs or {})))
            made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self.record(name, kind_of_operation(name) if made else "query", inputs, made)
        return output

    def register_hooks(self, name: str, module: nn.Module) -> tuple[RemovableHandle, ...]:
        """Record each call of a leaf module as one call; return the handles of the hooks."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._depth += 1

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._depth -= 1
            if self._depth == 0:
                inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(output)
                self.record(name, kind_of_module(module), inputs, outputs)

        return (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )
