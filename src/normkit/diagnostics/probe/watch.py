"""The hooks of one recorded step, and what they see; outside of it there are none."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import nn

from normkit.core.running import are_still
from normkit.diagnostics.inactive_channels import LayerActivity, Recorder
from normkit.diagnostics.probe.norms import Norm, norms_of, parts_of_composites
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
    """Sees the training forwards of one step.

    Args:
        model: What is trained.
        where: Which norms are meant.
        compiled: Modules that run compiled: no hook is put into them.
        eager: Run everything uncompiled while this is open.
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
        self._at: dict[str, list[Norm]] = defaultdict(list)
        for norm in self.norms.values():
            self._at[norm.host_name].append(norm)

    def open(self) -> None:
        """Put the hooks in."""
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
        """Take the hooks out, also after a forward that was interrupted."""
        run_cleanup([*self._ends_of_forward, *self._ends])

    @property
    def activities(self) -> list[LayerActivity]:
        """A row for each call of a ReLU whose second axis counts channels."""
        recorder = self._recorder
        rows = recorder.seen.items()
        return [seen.row(name) for name, seen in rows if name not in recorder.uneven]

    @property
    def uneven(self) -> list[str]:
        """Activations whose second axis does not count channels."""
        return sorted(self._recorder.uneven)

    def enter(self, name: str) -> None:
        """A module begins to run."""
        if not name or not self._recorder.is_inside:
            self._begin()
        self._recorder.enter(name)
        if self._counts:
            for norm in self._at[name]:
                norm.before()

    def leave(
        self, name: str, args: tuple[Any, ...], named: dict[str, Any], *, failed: bool
    ) -> None:
        """A module is done, or has raised: of such a forward nothing is kept."""
        self._recorder.leave()
        if self._counts and not failed:
            for norm in self._at[name]:
                call_with_cleanup(partial(norm.see, args, named), save_grad_mode())
        if not self._recorder.is_inside:
            self._leave_functions()
            if failed and self._counts:
                self._forget()

    def _begin(self) -> None:
        """A forward begins: of the model, or of a part of it that is called by itself.

        Evaluation in between, a checkpoint's second look and ``torch.func`` do not count.
        """
        self._leave_functions()
        self._recorder.begin()
        self._counts = self._model.training and torch.is_grad_enabled() and not are_still()
        if not self._counts:
            return
        self.num_forwards += 1
        self.is_blind |= not self._eager and (bool(self._compiled) or _runs_compiled())
        if not self.is_blind:
            self._ends_of_forward = [partial(_remove_mode, self._recorder), *save_stance()]
            _leave_compiled_functions_as_they_are()
            self._recorder.__enter__()

    def _leave_functions(self) -> None:
        run_cleanup(self._ends_of_forward)
        self._ends_of_forward = []

    def _forget(self) -> None:
        self._recorder, self.num_forwards = Recorder(), 0
        for norm in self.norms.values():
            norm.forget()


class _Hook:
    """A hook of one module; a copy of the model gets one that does nothing."""

    def __init__(self, watch: Watch, name: str, module: nn.Module) -> None:
        self._watch, self._name, self._module = watch, name, module

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class _Before(_Hook):
    """Called before the module runs."""

    def __call__(self, module: nn.Module, *_given: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling() and module is self._module:
            self._watch.enter(self._name)


class _After(_Hook):
    """Called when the module is done, or has raised."""

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        if not torch.compiler.is_compiling() and module is self._module:
            failed = output is None and sys.exc_info()[0] is not None
            self._watch.leave(self._name, args, named, failed=failed)


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """Find the modules that ``torch.compile`` runs, those inside of them included."""
    found: set[nn.Module] = set()
    for module in model.modules():
        inner = module._modules.get("_orig_mod")
        if isinstance(inner, nn.Module):
            found.update(inner.modules())
        if getattr(module, "_compiled_call_impl", None) is not None:
            found.update(module.modules())
    return found


def _runs_compiled() -> bool:
    """Whether compiled code has called this: hooks further inside are then not seen."""
    if "torch._dynamo" not in sys.modules:
        return False
    frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    return frames.get_eval_frame_callback() not in (None, False)


def _leave_compiled_functions_as_they_are() -> None:
    """Let those that a forward calls run uncompiled, rather than being compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("eager_on_recompile")


def _remove_mode(mode: Recorder) -> None:
    """Take a mode off the stack, wherever it is after an interruption."""
    stack = torch.overrides._get_current_function_mode_stack()
    if mode not in stack:
        return
    above = stack[stack.index(mode) + 1 :]
    for _ in range(len(above) + 1):
        torch.overrides._pop_mode()
    for other in above:
        torch.overrides._push_mode(other)
