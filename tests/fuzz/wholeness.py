"""Everything of a model, an optimizer and torch that a tool must leave as it was."""

from __future__ import annotations

import random
import sys

import numpy as np
import torch

from normkit.kernels import select

HOOKS = [name for name, value in vars(torch.nn.Module()).items() if isinstance(value, dict | set)]


def state_of(model, optimizer):
    """Everything by name; objects stand for themselves, values are copies.

    Args:
        model: Whose modules, parameters, buffers, hooks and attributes are read.
        optimizer: Whose groups and state are read.
    """
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found |= {(name, *key): value for key, value in _of_module(module)}
    found |= {
        ("state dict", "values", key): value.clone() for key, value in model.state_dict().items()
    }
    found["state dict", "keys"] = tuple(model.state_dict())
    found["parameters",] = tuple(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        found |= {(name, *key): value for key, value in _of_parameter(parameter)}
    found |= dict(_of_optimizer(optimizer))
    return found | dict(_of_torch())


def _of_module(module):
    yield ("class",), Same(type(module))
    yield ("mode",), vars(module).get("training")
    yield ("attributes",), tuple(vars(module))
    for key, value in vars(module).items():
        yield ("attribute", key), Same(value)
    for key in HOOKS:
        held = vars(module)[key]
        items = held.items() if isinstance(held, dict) else [(each, each) for each in sorted(held)]
        yield ("inside", key), tuple((each, Same(value)) for each, value in items)
    if "Parametrized" in type(module).__name__:  # torch makes such a class for one module
        yield ("class", "attributes"), tuple(vars(type(module)))


def _of_parameter(parameter):
    yield ("parameter",), Same(parameter)
    yield ("values",), parameter.detach().clone()
    yield ("memory",), parameter.data_ptr()
    yield ("requires_grad",), parameter.requires_grad
    yield ("grad",), Same(parameter.grad)
    if parameter.grad is not None:
        yield ("grad", "values"), parameter.grad.clone()


def _of_optimizer(optimizer):
    yield ("optimizer", "attributes"), tuple((k, Same(v)) for k, v in vars(optimizer).items())
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            held = tuple(map(Same, value)) if isinstance(value, list) else value
            yield ("optimizer", "group", index, key), held
    yield ("optimizer", "order"), tuple(map(Same, optimizer.state))
    for index, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            copied = value.clone() if isinstance(value, torch.Tensor) else value
            yield ("optimizer", "state", index, key), copied


def _of_torch():
    yield ("random", "torch"), torch.get_rng_state()
    yield ("random", "Python"), random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - what old loaders draw from
    yield ("random", "NumPy"), (name, tuple(keys.tolist()), *rest)
    yield ("torch", "gradients are on"), torch.is_grad_enabled()
    yield ("torch", "inference mode"), torch.is_inference_mode_enabled()
    yield ("torch", "autocast"), torch.is_autocast_enabled("cpu")
    yield (
        ("torch", "function modes"),
        tuple(map(Same, torch.overrides._get_current_function_mode_stack())),
    )
    yield (
        ("torch", "kernels"),
        (select._request.kernels, len(select._request.blocks), len(select._request.own())),
    )
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    yield ("torch", "stance"), None if dynamo is None else str(dynamo._stance)


class Same:
    """Compares by identity of objects, or by equality of numbers and strings."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        if self.value is other.value:
            return True
        plain = (int, float, str, bool, type(None))
        return isinstance(self.value, plain) and self.value == other.value

    def __hash__(self):
        return id(self.value)

    def __repr__(self):
        return f"{type(self.value).__name__} {repr(self.value)[:60]!r}"


def differences(before, now):
    """What has changed, in words."""
    gone = [f"{key} is gone" for key in before if key not in now]
    new = [f"{key} is new: {now[key]!r:.120}" for key in now if key not in before]
    other = [
        f"{key} was {before[key]!r:.120} and is {now[key]!r:.120}"
        for key in before
        if key in now and not _equal(before[key], now[key])
    ]
    return gone + new + other


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        return alike and a.numpy().tobytes() == b.numpy().tobytes()
    return a == b
