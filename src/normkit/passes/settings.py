"""How torch is set for the running thread, and where the random generators are."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import nn

from normkit.passes.finish import Step


def settings_now(devices: Iterable[torch.device] = ()) -> list[Step]:
    """Say how to come back to what is set now.

    That is the gradient mode, the function modes, the transforms of ``torch.func``, what
    ``torch.fx`` patches, whether compiled code runs compiled, and the states of torch's, Python's
    and, if it is loaded, NumPy's random generators. Torch's own way out of some of these can be
    interrupted.

    Args:
        devices: Whose generators are meant besides the CPU's.
    """
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    modes = [grad_mode_now(), _function_modes(), _transforms(), _patches()]
    return [*modes, *stance_now(), *_generators(cuda)]


def grad_mode_now() -> Step:
    """Say how gradients come to be computed again, or not, as they are now."""
    enabled = torch.is_grad_enabled()

    def put_back() -> None:
        if torch.is_grad_enabled() != enabled:
            torch._C._set_grad_enabled(enabled)

    return put_back


def _function_modes() -> Step:
    before = torch.overrides._get_current_function_mode_stack()

    def put_back() -> None:
        now = torch.overrides._get_current_function_mode_stack()
        num_same = sum(1 for a, b in zip(now, before, strict=False) if a is b)
        for _ in now[num_same:]:
            torch.overrides._pop_mode()
        for mode in before[num_same:]:
            torch.overrides._push_mode(mode)

    return put_back


def _transforms() -> Step:
    core: Any = torch._C
    functorch = core._functorch
    before = functorch.get_dynamic_layer_stack_depth()

    def put_back() -> None:
        if functorch.get_dynamic_layer_stack_depth() > before:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(before)

    return put_back


def _patches() -> Step:
    """Methods of all modules, which ``torch.fx`` replaces while it traces."""
    fx: Any = sys.modules["torch.fx._symbolic_trace"]
    methods = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}
    patcher, is_tracing = fx.CURRENT_PATCHER, fx._is_fx_tracing_flag

    def put_back() -> None:
        if fx.CURRENT_PATCHER is not patcher:  # its generator may still be suspended, and ends it
            fx.CURRENT_PATCHER.revert_all_patches()
            fx.CURRENT_PATCHER.patches_made.clear()
        fx._is_fx_tracing_flag = is_tracing
        for name, method in methods.items():
            if vars(nn.Module)[name] is not method:
                setattr(nn.Module, name, method)

    return put_back


def stance_now() -> list[Step]:
    """Say how compiled code comes to run again as it does now."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing is compiled, and its import takes seconds
        return []
    stance = dynamo._stance

    def put_back() -> None:
        if dynamo._stance is not stance:
            dynamo._set_stance(stance)

    return [put_back]


def _generators(cuda: Iterable[int]) -> list[Step]:
    numpy: Any = sys.modules.get("numpy")
    found: list[Step] = [
        partial(torch.random.set_rng_state, torch.random.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    if numpy is not None:
        found.append(partial(numpy.random.set_state, numpy.random.get_state()))
    return found + [partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(i), i) for i in cuda]
