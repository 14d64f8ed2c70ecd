"""The hooks of one recorded step, and what they observe."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import nn

from normkit.core.running import buffers_are_frozen
from normkit.diagnostics.inactive_channels import LayerActivity, Recorder
from normkit.diagnostics.probe.norms import ObservedNorm, norms_of, parts_of_composites
from normkit.inference.tracked import Where
from normkit.passes import (
    Hooks,
    InertHook,
    call_with_cleanup,
    run_cleanup,
    save_grad_mode,
    save_stance,
    uncompiled,
)
from normkit.passes.cleanup import CleanupStep


class Watch:
    """Observes the training forwards of one step.

    Args:
        model: The model that is trained.
        where: ``where(layer, name)`` chooses the norms.
        compiled: Modules that run compiled; they get no hooks.
        eager: Run everything uncompiled while the watch is open.
    """

    def __init__(
        self, model: nn.Module, where: Where | None, compiled: set[nn.Module], eager: bool
    ) -> None:
        self._model = model
        self._compiled = set() if eager else compiled
        self._eager = eager
        self._recorder = Recorder()
        self._hooks = Hooks()
        self._ends: list[CleanupStep] = []
        self._ends_of_forward: list[CleanupStep] = []
        self._counts = self.is_blind = False
        self.num_forwards = 0
        self.norms = {norm.name: norm for norm in norms_of(model, where)}
        self._by_host: dict[str, list[ObservedNorm]] = defaultdict(list)
        for norm in self.norms.values():
            self._by_host[norm.host_name].append(norm)

    def open(self) -> None:
        """Put hooks into all modules except compiled ones and parts of composites."""
        self._ends = [self._hooks.remove, *save_stance()]
        parts = parts_of_composites(self._model)
        for name, module in self._model.named_modules():
            if module not in self._compiled and module not in parts:
                before, after = _Before(self, name, module), _After(self, name, module)
                self._hooks.before(module, before)
                self._hooks.after(module, after, with_kwargs=True, always_call=True)
        if self._eager:
            uncompiled().__enter__()

    def close(self) -> None:
        """Remove the hooks, also after an interrupted forward."""
        run_cleanup([*self._ends_of_forward, *self._ends])

    @property
    def activities(self) -> list[LayerActivity]:
        """A row for each call of a ReLU whose second axis is a channel axis."""
        recorder = self._recorder
        rows = recorder.activity.items()
        return [activity.row(name) for name, activity in rows if name not in recorder.uneven]

    @property
    def uneven(self) -> list[str]:
        """Names of ReLUs whose second axis changes its size, so that it is no channel axis."""
        return sorted(self._recorder.uneven)

    def enter(self, name: str) -> None:
        """Note that a module begins to run."""
        if not name or not self._recorder.is_inside:
            self._begin()
        self._recorder.enter(name)
        if self._counts:
            for norm in self._by_host[name]:
                norm.keep_running_statistics()

    def leave(
        self, name: str, args: tuple[Any, ...], named: dict[str, Any], *, failed: bool
    ) -> None:
        """Note that a module has returned, or raised; a failed forward is discarded."""
        self._recorder.leave()
        if self._counts and not failed:
            for norm in self._by_host[name]:
                call_with_cleanup(partial(norm.add, args, named), save_grad_mode())
        if not self._recorder.is_inside:
            self._stop_recording_functions()
            if failed and self._counts:
                self._discard_all()

    def _begin(self) -> None:
        """Begin a forward of the model, or of a part of it that is called by itself.

        Evaluation, recomputation by a gradient checkpoint, and ``torch.func`` do not count.
        """
        self._stop_recording_functions()
        self._recorder.begin()
        self._counts = self._model.training and torch.is_grad_enabled() and not buffers_are_frozen()
        if not self._counts:
            return
        self.num_forwards += 1
        self.is_blind |= not self._eager and (bool(self._compiled) or _runs_compiled())
        if not self.is_blind:
            self._ends_of_forward = [partial(_remove_mode, self._recorder), *save_stance()]
            # The recorder changes what a compiled function is guarded on. A function that the
            # forward calls must then run uncompiled, rather than be compiled anew.
            if "torch._dynamo" in sys.modules:
                torch.compiler.set_stance("eager_on_recompile")
            self._recorder.__enter__()

    def _stop_recording_functions(self) -> None:
        run_cleanup(self._ends_of_forward)
        self._ends_of_forward = []

    def _discard_all(self) -> None:
        self._recorder, self.num_forwards = Recorder(), 0
        for norm in self.norms.values():
            norm.reset()


class _Hook:
    """A hook of one module; in a copy of the model it becomes a hook that does nothing."""

    def __init__(self, watch: Watch, name: str, module: nn.Module) -> None:
        self._watch, self._name, self._module = watch, name, module

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class _Before(_Hook):
    """The hook that runs before the module."""

    def __call__(self, module: nn.Module, *_given: Any) -> None:
        if not torch.compiler.is_compiling() and module is self._module:
            self._watch.enter(self._name)


class _After(_Hook):
    """The hook that runs when the module has returned or raised."""

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        if not torch.compiler.is_compiling() and module is self._module:
            failed = output is None and sys.exc_info()[0] is not None
            self._watch.leave(self._name, args, named, failed=failed)


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """Find the modules that ``torch.compile`` runs, including the modules inside them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        inner = module._modules.get("_orig_mod")
        if isinstance(inner, nn.Module):
            found.update(inner.modules())
        if getattr(module, "_compiled_call_impl", None) is not None:
            found.update(module.modules())
    return found


def _runs_compiled() -> bool:
    """Whether ``torch.compile`` runs this forward; hooks of modules inside then do not run."""
    if "torch._dynamo" not in sys.modules:
        return False
    frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    return frames.get_eval_frame_callback() not in (None, False)


def _remove_mode(mode: Recorder) -> None:
    """Remove a mode from torch's stack, also if an interruption left other modes above it."""
    stack = torch.overrides._get_current_function_mode_stack()
    if mode not in stack:
        return
    above = stack[stack.index(mode) + 1 :]
    for _ in range(len(above) + 1):
        torch.overrides._pop_mode()
    for other in above:
        torch.overrides._push_mode(other)
