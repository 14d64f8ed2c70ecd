"""The hooks of one recorded step, and what they see; outside of it there are none."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.moments import Moments
from normkit.core.running import are_still
from normkit.diagnostics.channel_difference import channels_first, pooling_groups, stat_diff
from normkit.diagnostics.estimation_shift import distances_between, running_moments
from normkit.diagnostics.inactive_channels import LayerActivity, Recorder
from normkit.inference.population import Population
from normkit.inference.tracked import Where, feature_map, keeps_statistics, tracked
from normkit.layers.base import NormLayer
from normkit.passes import uncompiled


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
        self._hooks, self._functions = ExitStack(), ExitStack()
        self._counts = self.is_blind = False
        self.num_forwards = 0
        self.norms = {norm.name: norm for norm in norms_of(model, where)}
        self._at: dict[str, list[Norm]] = defaultdict(list)
        for norm in self.norms.values():
            self._at[norm.host_name].append(norm)

    def open(self) -> None:
        """Put the hooks in."""
        for name, module in self._model.named_modules():
            if module not in self._compiled:
                before, after = _Before(self, name, module), _After(self, module)
                for handle in (
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after, always_call=True),
                ):
                    self._hooks.callback(handle.remove)
        if self._eager:
            self._hooks.enter_context(uncompiled())

    def close(self) -> None:
        """Take the hooks out, also after a forward that was interrupted."""
        self._hooks.close()
        self._leave_functions()

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

    def enter(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A module begins to run."""
        if not name or not self._recorder.is_inside:
            self._begin()
        self._recorder.enter(name)
        if self._counts:
            given = args[0] if args else next(iter(named.values()), None)
            for norm in self._at[name]:
                norm.see(given)

    def leave(self) -> None:
        """A module is done."""
        self._recorder.leave()
        if not self._recorder.is_inside:
            self._leave_functions()

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
            self._functions.enter_context(_compiled_functions_as_they_are())
            self._recorder.__enter__()
            self._functions.callback(_remove_mode, self._recorder)

    def _leave_functions(self) -> None:
        self._functions.close()


class Norm:
    """Inputs of one norm in one step.

    Args:
        name: Its name.
        layer: It.
        host_name: Name of the module whose input is looked at: the norm, or the composite that it
            is a part of, which computes its parts together as long as no hook watches them.
        host: That module.
    """

    def __init__(self, name: str, layer: nn.Module, host_name: str, host: nn.Module) -> None:
        self.name, self.host_name = name, host_name
        self._layer, self._host = layer, host
        self._groups = pooling_groups(layer)
        self._running: Moments | None = None
        self._batch, self._channels = Population(layer), Population()

    def see(self, x: Any) -> None:  # noqa: ANN401 - whatever a module is given
        """Take an input into account, if it is one that the layer will not refuse."""
        if not isinstance(x, Tensor) or x.ndim < 2 or x.numel() == 0:
            return
        if keeps_statistics(self._layer):
            if self._running is None:
                running = running_moments(self._layer)
                self._running = Moments(running.mean.clone(), running.var.clone())
            self._batch.add(self._own_part(feature_map(self._host, x)))
        if self._groups:
            self._channels.add(channels_first(self._layer, x))

    @property
    def shift(self) -> tuple[float, float] | None:
        """Distances of the batch's means and standard deviations from the running ones."""
        if self._running is None or not self._batch.count:
            return None
        return distances_between(self._running, self._batch.moments)

    @property
    def stat_diff(self) -> Tensor | None:
        """StatDiff of each group."""
        if not self._channels.count:
            return None
        return stat_diff(self._channels.moments, self._groups)

    @property
    def was_seen(self) -> bool:
        """Whether it got an input."""
        return bool(self._batch.count or self._channels.count)

    def _own_part(self, x: Tensor) -> Tensor:
        """The last channels: all of them, but for the batch norm beside an instance norm."""
        if self._host is self._layer:
            return x
        return x[:, -self._layer.num_features :]  # type: ignore[operator]


class _Before:
    """Called before a module runs; copies of the model get one that does nothing."""

    def __init__(self, watch: Watch, name: str, module: nn.Module) -> None:
        self._watch, self._name, self._module = watch, name, module

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and module is self._module:
            self._watch.enter(self._name, args, named)

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class _After:
    """Called when a module is done; copies of the model get one that does nothing."""

    def __init__(self, watch: Watch, module: nn.Module) -> None:
        self._watch, self._module = watch, module

    def __call__(self, module: nn.Module, *_given: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling() and module is self._module:
            self._watch.leave()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class Inert:
    """Stands for a hook of a probe in a copy of the model, and does nothing."""

    def __call__(self, *_given: Any) -> None:  # noqa: ANN401 - what hooks are given
        """Do nothing."""


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


def norms_of(model: nn.Module, where: Where | None) -> list[Norm]:
    """Norms with running statistics, and norms that pool channels."""
    modules = dict(model.named_modules())
    known = tracked(model)
    found = []
    for name, layer in modules.items():
        host_name = name.rpartition(".")[0]
        within = isinstance(modules.get(host_name), NormLayer) and name != host_name
        measured = name in known or (pooling_groups(layer) and not within)
        if measured and (where is None or where(layer, name)):
            host = host_name if within else name
            found.append(Norm(name, layer, host, modules[host]))
    return found


def _runs_compiled() -> bool:
    """Whether compiled code has called this: hooks further inside are then not seen."""
    if "torch._dynamo" not in sys.modules:
        return False
    frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    return frames.get_eval_frame_callback() not in (None, False)


def _compiled_functions_as_they_are() -> Any:  # noqa: ANN401 - a context
    """Compiled functions that a forward calls run uncompiled, rather than being compiled anew."""
    if "torch._dynamo" not in sys.modules:
        return ExitStack()
    return torch.compiler.set_stance("eager_on_recompile")


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
