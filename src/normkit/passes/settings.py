"""Saving and restoring torch's global settings and the states of the random generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import nn

from normkit.passes.cleanup import CleanupStep


def save_settings(devices: Iterable[torch.device] = ()) -> list[CleanupStep]:
    """Save the current settings; return the steps that restore them.

    Saved are the gradient mode, the stack of function modes, the stack of ``torch.func``
    transforms, the methods that ``torch.fx`` patches while it traces, the stance of
    ``torch.compile``, and the states of the random generators of torch, Python and, if it is
    loaded, NumPy. torch's own context managers for some of these can be interrupted while they
    restore the setting.

    Args:
        devices: CUDA devices whose random generators are saved too.
    """
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    modes = [save_grad_mode(), _save_function_modes(), _save_transforms(), _save_fx_patches()]
    return [*modes, *save_stance(), *_save_generators(cuda)]


def save_grad_mode() -> CleanupStep:
    """Save whether gradients are enabled; return the step that restores it."""
    enabled = torch.is_grad_enabled()

    def put_back() -> None:
        if torch.is_grad_enabled() != enabled:
            torch._C._set_grad_enabled(enabled)

    return put_back


def _save_function_modes() -> CleanupStep:
    before = torch.overrides._get_current_function_mode_stack()

    def put_back() -> None:
        now = torch.overrides._get_current_function_mode_stack()
        num_same = sum(1 for a, b in zip(now, before, strict=False) if a is b)
        for _ in now[num_same:]:
            torch.overrides._pop_mode()
        for mode in before[num_same:]:
            torch.overrides._push_mode(mode)

    return put_back


def _save_transforms() -> CleanupStep:
    core: Any = torch._C
    functorch = core._functorch
    before = functorch.get_dynamic_layer_stack_depth()

    def put_back() -> None:
        if functorch.get_dynamic_layer_stack_depth() > before:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(before)

    return put_back


def _save_fx_patches() -> CleanupStep:
    """Save the methods of ``nn.Module`` that ``torch.fx`` replaces while it traces."""
    fx: Any = sys.modules["torch.fx._symbolic_trace"]
    methods = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}
    patcher = fx.CURRENT_PATCHER
    thread = getattr(fx, "_is_fx_tracing_tls", None)  # since torch 2.14 each thread has its flag
    flag = (fx, "_is_fx_tracing_flag") if thread is None else (thread, "flag")
    is_tracing = getattr(*flag, False)

    def put_back() -> None:
        # Forget the reverted patches: torch's suspended generator may revert them once more later.
        if fx.CURRENT_PATCHER is not patcher:
            fx.CURRENT_PATCHER.revert_all_patches()
            fx.CURRENT_PATCHER.patches_made.clear()
        setattr(*flag, is_tracing)
        for name, method in methods.items():
            if vars(nn.Module)[name] is not method:
                setattr(nn.Module, name, method)

    return put_back


def save_stance() -> list[CleanupStep]:
    """Save the stance of ``torch.compile``, as eager or default; return what restores it."""
    # Without this module nothing can have been compiled, and importing it takes seconds.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return []
    stance = dynamo._stance

    def put_back() -> None:
        if dynamo._stance is not stance:
            dynamo._set_stance(stance)

    return [put_back]


def _save_generators(cuda: Iterable[int]) -> list[CleanupStep]:
    numpy: Any = sys.modules.get("numpy")
    found: list[CleanupStep] = [
        partial(torch.random.set_rng_state, torch.random.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    if numpy is not None:
        found.append(partial(numpy.random.set_state, numpy.random.get_state()))
    return found + [partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(i), i) for i in cuda]
