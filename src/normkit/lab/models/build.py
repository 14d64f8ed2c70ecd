"""From a model's name and a norm's spec to a network, and what each norm resolved to."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import NormSpec, convert_norm_, place_ibn_, standardize_weights_
from normkit.errors import NormError, SpecError
from normkit.lab.device import seeded
from normkit.lab.models.architecture import (
    ARCHITECTURES,
    MAX_NAME,
    Architecture,
    Task,
    parse_options,
    require_room,
)
from normkit.lab.models.own import initialise
from normkit.lab.models.zoo import TimmModel, TorchvisionModel, timm_names, torchvision_names
from normkit.tracing import CONVOLUTIONS, trace_feeds

IBN = "ibn"
PROBE_SIZE = 2  # examples that are sent through a model to see its maps


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNorm:
    """One norm of a network: where it stands, what it sees, and what it resolved to."""

    name: str
    norm: str
    num_features: int
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A network and its norms, in the order of its modules.

    Args:
        model: The network.
        norms: Its norms.
        standardized: Names of the convolutions whose weights are standardised.
    """

    model: nn.Module
    norms: tuple[PlacedNorm, ...]
    standardized: tuple[str, ...] = ()


def build_model(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    norm: NormSpec | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> BuiltModel:
    """Build a network with one norm throughout; ``ibn`` stands where IBN-Net-a has it.

    Equal seeds give equal initial weights, whatever the norm.

    Args:
        name: ``"small-resnet"``, ``"mlp:depth=20:width=128"``, ``"vgg11"``,
            ``"torchvision:NAME"``, ``"timm:NAME"``, or a plain name of theirs.
        num_classes: Length of the network's output.
        input_shape: Channels, height and width of one input.
        norm: What replaces every batch norm; ``None`` keeps the model's own. With ``+ws`` the
            convolutions that feed one of these norms are standardised.
        batch_size: Decides ``auto`` arguments of the norm.
        seed: Decides the initial weights.

    Raises:
        SpecError: If the model or the norm is unknown, the model cannot take the inputs, or it
            has no batch norm to replace, or for ``+ws`` no convolution that feeds one.
        PartitionError: If the norm's groups do not fit one of the layers.
    """
    architecture, task = _admitted(name, num_classes, input_shape)
    model = _seeded(architecture, task, seed)
    if norm is None:
        return BuiltModel(model=model, norms=())
    spec = NormSpec.parse(norm) if isinstance(norm, str) else norm
    slots = _find_slots(name, model, task)
    specs = _by_place(model, slots, spec)
    placed = tuple(_placed(at, slot, specs[at], batch_size) for at, slot in slots.items())
    convert_norm_(model, {place.name: NormSpec.parse(place.norm).norm_alone for place in placed})
    standardized = _standardized_(model, name, placed, task) if spec.standardize_weights else ()
    return BuiltModel(model=model, norms=placed, standardized=standardized)


def _standardized_(
    model: nn.Module, name: str, placed: Sequence[PlacedNorm], task: Task
) -> tuple[str, ...]:
    """Standardise the convolutions that feed one of the placed norms; return their names."""
    norms = {place.name for place in placed}
    feeds = trace_feeds(model, torch.zeros(PROBE_SIZE, *task.input_shape))
    feeding = {pair.producer for pair in feeds.pairs if pair.norm in norms}
    report = standardize_weights_(
        model, lambda module, at: at in feeding and isinstance(module, CONVOLUTIONS)
    )
    if not report.changed:
        raise SpecError(
            f"+ws has nothing to standardise in model {name!r}: none of its convolutions feeds a "
            f"norm; leave +ws out, or choose a model with convolutions, such as resnet18"
        )
    return report.changed


def _by_place(
    model: nn.Module, slots: "Mapping[str, _Slot]", spec: NormSpec
) -> dict[str, NormSpec]:
    """What stands at each place: the norm; ``ibn`` in the blocks of IBN-Net-a, elsewhere ``bn``."""
    if spec.name != IBN:
        return dict.fromkeys(slots, spec)
    elsewhere = replace(NormSpec.parse("bn"), standardize_weights=spec.standardize_weights)
    try:
        blocks = {change.name for change in place_ibn_(model, "a", dry_run=True).changes}
    except NormError as error:
        raise SpecError(
            f"{spec} stands where IBN-Net-a has it, in the first norm of residual blocks; choose "
            f"another norm or a residual network: {error}"
        ) from error
    return {at: spec if at in blocks else elsewhere for at in slots}


@dataclass(frozen=True, slots=True)
class NormSlots:
    """Where a network has norms, and what they would see."""

    _model: nn.Module
    _slots: "Mapping[str, _Slot]"

    def check(self, norm: NormSpec | str, batch_size: int, num_examples: int) -> None:
        """Make sure that a norm can be built and trained at every place of the network.

        Nothing is computed: the layers are built without storage and get maps without storage.

        Args:
            norm: What stands at every place.
            batch_size: Decides ``auto`` arguments of the norm.
            num_examples: Examples of the training batch at hand, which may be a last, smaller one.

        Raises:
            SpecError: If it cannot, naming the norm, the place and the batch size.
        """
        spec = NormSpec.parse(norm) if isinstance(norm, str) else norm
        specs = _by_place(self._model, self._slots, spec)
        for name, slot in self._slots.items():
            try:
                _try_out(slot, specs[name], batch_size, num_examples)
            except NormError as error:
                raise SpecError(
                    f"norm {spec} does not fit layer {name!r} at batch size {batch_size}: {error}"
                ) from error


def norm_slots(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> NormSlots:
    """Find the norms of a network, with the shapes of the maps that come by.

    Raises:
        SpecError: If the model is unknown, does not take the inputs or has no norms to replace.
    """
    architecture, task = _admitted(name, num_classes, input_shape)
    model = _seeded(architecture, task, seed=0)
    slots = _find_slots(name, model, task)
    convert_norm_(model, dict.fromkeys(slots, "bn"), dry_run=True)  # refuses what has no rule
    return NormSlots(model, slots)


def _admitted(
    name: str, num_classes: int, input_shape: tuple[int, int, int]
) -> tuple[Architecture, Task]:
    """Read a model string and what it is for; all of its weights must have room."""
    task = Task(input_shape=input_shape, num_classes=num_classes)
    architecture = parse_model(name)
    require_room(architecture, name, task)
    return architecture, task


def parse_model(text: str) -> Architecture:
    """Read a model string.

    Raises:
        SpecError: If no model has this name or it does not take these arguments.
    """
    if len(text) > MAX_NAME:
        raise SpecError(
            f"a model's name of {len(text)} characters was given, {text[:20]!r}...; it has at most "
            f"{MAX_NAME}"
        )
    name, *arguments = text.split(":")
    if name in ARCHITECTURES:
        return parse_options(ARCHITECTURES[name], text, arguments)
    library, _, inner = text.rpartition(":")
    if library in ("", "torchvision") and inner in torchvision_names():
        return TorchvisionModel(name=inner)
    if library in ("", "timm") and inner in timm_names():
        return TimmModel(name=inner)
    raise SpecError(
        f"there is no model {text!r}; write {', '.join(ARCHITECTURES)}, torchvision:NAME or "
        f"timm:NAME{_suggestion(inner)}"
    )


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, {*ARCHITECTURES, *torchvision_names(), *timm_names()})
    return f"; close names are {', '.join(close)}" if close else ""


def _seeded(architecture: Architecture, task: Task, seed: int) -> nn.Module:
    with seeded(seed):
        model = architecture.build(task)
        if type(architecture) in ARCHITECTURES.values():
            initialise(model)
    return model


@dataclass(slots=True)
class _Slot:
    """The place of a norm, and the maps that come by."""

    num_features: int
    num_positions: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def note(self, _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take the shape of a map, before the norm's forward."""
        shape = inputs[0].shape
        # a shared norm may see maps of several sizes: its groups must fit all of them
        self.num_positions = math.gcd(self.num_positions, math.prod(shape[2:]))
        self.shapes.add(tuple(shape))


def _find_slots(name: str, model: nn.Module, task: Task) -> dict[str, _Slot]:
    """Find the batch norms of a model, and send zeros through it."""
    norms = {at: m for at, m in model.named_modules() if isinstance(m, _BatchNorm)}
    slots = {at: _Slot(norm.num_features) for at, norm in norms.items()}
    hooks = [norm.register_forward_pre_hook(slots[at].note) for at, norm in norms.items()]
    _send_zeros(name, model, task)
    for hook in hooks:
        hook.remove()
    model.train()
    if not slots:
        raise SpecError(
            f"model {name!r} has no batch norm to replace; choose one that has, such as resnet18"
        )
    return slots


def _send_zeros(name: str, model: nn.Module, task: Task) -> None:
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(PROBE_SIZE, *task.input_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise SpecError(
            f"model {name!r} cannot take inputs of shape {task.input_shape} ({error}); "
            f"choose data with larger pictures or another model"
        ) from error


def _try_out(slot: _Slot, spec: NormSpec, batch_size: int, num_examples: int) -> None:
    with torch.device("meta"):
        layer = spec.norm_alone.build(
            slot.num_features, batch_size=batch_size, num_positions=slot.num_positions
        )
        for size, *rest in slot.shapes:  # a model may fold other axes into the examples
            layer.train()(torch.empty(size * num_examples // PROBE_SIZE, *rest))


def _placed(name: str, slot: _Slot, spec: NormSpec, batch_size: int | None) -> PlacedNorm:
    resolved = spec.resolve(
        slot.num_features, batch_size=batch_size, num_positions=slot.num_positions
    )
    return PlacedNorm(
        name=name,
        norm=str(resolved),
        num_features=slot.num_features,
        num_positions=slot.num_positions,
    )
