"""Building a network from a model's name and an arm, with the resolved spec of each norm."""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from normkit import NormSpec
from normkit.errors import NormError, SpecError
from normkit.lab.arms import Arm
from normkit.lab.changes import BuiltModel, Place
from normkit.lab.device import seeded
from normkit.lab.models.architecture import (
    ARCHITECTURES,
    MAX_NAME,
    Architecture,
    Shapes,
    parse_options,
    require_room,
)
from normkit.lab.models.own import initialise
from normkit.lab.models.user import UserModel
from normkit.lab.models.zoo import TimmModel, TorchvisionModel, timm_names, torchvision_names
from normkit.lab.slots import PROBE_SIZE
from normkit.lab.user_code import is_reference, users_errors
from normkit.passes import device_of


def build_model(  # noqa: PLR0913 - all arguments but the first are passed by keyword
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    norm: Arm | NormSpec | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    drop_path: float = 0,
) -> BuiltModel:
    """Build a network with the norms of an arm (see ``lab.arms``), for example one norm throughout.

    Equal seeds give equal initial weights with every norm.

    Args:
        name: ``"small-resnet"``, ``"mlp:depth=20:width=128"``, ``"vgg11"``, ``"cifar-resnet"``,
            ``"torchvision:NAME"``, ``"timm:NAME"``, or a name of torchvision or timm alone.
        num_classes: Length of the network's output.
        input_shape: Channels, height and width of one input.
        norm: An arm, such as ``"gn:8"``, which replaces every batch norm, ``"xbn/gn:64"`` or
            ``"none"``; ``None`` keeps the model's own norms.
        batch_size: Decides ``auto`` arguments of the norm.
        seed: Decides the initial weights.
        drop_path: Share of residual branches that training drops; only for timm's networks.

    Raises:
        SpecError: If the model or the arm is unknown, the model cannot take the inputs, or it has
            nothing that the arm changes.
        PartitionError: If the norm's groups do not fit one of the layers.
    """
    architecture, shapes = _admitted(name, num_classes, input_shape)
    model = _seeded(_with_drop_path(architecture, name, drop_path), shapes, seed)
    if norm is None:
        return BuiltModel(model=model, norms=())
    return apply_arm(model, norm, batch_size=batch_size, input_shape=input_shape, name=name)


def apply_arm(
    model: nn.Module,
    arm: Arm | NormSpec | str,
    *,
    batch_size: int | None,
    input_shape: tuple[int, ...],
    name: str,
    preserve: bool = False,
) -> BuiltModel:
    """Replace the norms of any existing network by those of an arm, in place.

    Args:
        model: The network, which keeps its mode. Its batch norms are replaced, or all norms if it
            has no batch norms and the arm is one norm throughout.
        arm: As ``norm`` in ``build_model``.
        batch_size: Decides ``auto`` arguments of the norm.
        input_shape: Shape of one input.
        name: Name of the network in error messages.
        preserve: As in ``Arm.apply_``.

    Raises:
        NormError: As in ``Arm.apply_``; the network is then unchanged.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> built = apply_arm(net, "bgn:auto", batch_size=8, input_shape=(3, 8, 8), name="mine")
        >>> built.norms[0].norm
        'bgn:16'
    """
    example = _example(model, input_shape)
    return Arm.parse(arm).apply_(
        model, example_input=example, batch_size=batch_size, name=name, preserve=preserve
    )


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(PROBE_SIZE, *input_shape, device=device_of(model))


@dataclass(frozen=True, slots=True)
class NormSlots:
    """The places of a network's norms, and the shapes of their inputs."""

    _model: nn.Module
    _name: str
    _example: torch.Tensor
    _known: dict[Arm, Mapping[str, Place]] = field(default_factory=dict)

    def check(self, norm: Arm | NormSpec | str, batch_size: int, num_examples: int) -> None:
        """Check that the norms of an arm can be built and trained at their places.

        Nothing is computed: layers and maps are on the meta device.

        Args:
            norm: The arm.
            batch_size: Decides ``auto`` arguments of the norm.
            num_examples: Examples of the training batch; the last batch may be smaller.

        Raises:
            SpecError: If a norm does not fit its place, or the network has no places for the arm.
        """
        arm = Arm.parse(norm).at(batch_size)
        for at, place in self.places(arm).items():
            try:
                place.try_out(batch_size, num_examples)
            except NormError as error:
                raise SpecError(
                    f"norm {arm} does not fit layer {at!r} at batch size {batch_size}: {error}"
                ) from error

    def places(self, arm: Arm) -> Mapping[str, Place]:
        """The places where an arm puts norms, by name.

        Raises:
            NormError: If the network has no places for the arm.
        """
        if arm not in self._known:
            model = copy.deepcopy(self._model)  # a copy, because IBN-Net-b adds norms
            self._known[arm] = arm.places_(model, self._example, self._name)
        return self._known[arm]


def norm_slots(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> NormSlots:
    """Find the norms of a network by name, with the shapes of their inputs.

    Raises:
        SpecError: If the model is unknown, does not take the inputs or has no norms to replace.
        ConversionError: If one of its norms has no rule.
    """
    architecture, shapes = _admitted(name, num_classes, input_shape)
    return slots_of(_seeded(architecture, shapes, seed=0), input_shape=input_shape, name=name)


def slots_of(model: nn.Module, *, input_shape: tuple[int, ...], name: str) -> NormSlots:
    """Find the norms of an existing network; later changes to the network have no effect.

    Args:
        model: The network, which is not changed.
        input_shape: Shape of one input.
        name: Name of the network in error messages.

    Raises:
        SpecError: If the network does not take the inputs or has no norms to replace.
        ConversionError: If one of its norms has no rule.
    """
    with users_errors(f"copying model {name!r}"):
        copied = copy.deepcopy(model)
    slots = NormSlots(copied, name, _example(model, input_shape))
    slots.places(Arm.parse("bn"))
    return slots


def _admitted(
    name: str, num_classes: int, input_shape: tuple[int, int, int]
) -> tuple[Architecture, Shapes]:
    """Parse a model string and its shapes, and check that the weights fit into memory."""
    shapes = Shapes(input_shape=input_shape, num_classes=num_classes)
    architecture = parse_model(name)
    require_room(architecture, name, shapes)
    return architecture, shapes


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
    if is_reference(text):
        return UserModel(reference=text)
    name, *arguments = text.split(":")
    if name in ARCHITECTURES:
        return parse_options(ARCHITECTURES[name], text, arguments)
    library, _, inner = text.rpartition(":")
    if library in ("", "torchvision") and inner in torchvision_names():
        return TorchvisionModel(name=inner)
    if library in ("", "timm") and inner in timm_names():
        return TimmModel(name=inner)
    raise SpecError(
        f"there is no model {text!r}; write {', '.join(ARCHITECTURES)}, torchvision:NAME, "
        f"timm:NAME or FILE.py:FUNCTION{_suggestion(inner)}"
    )


def _with_drop_path(architecture: Architecture, name: str, share: float) -> Architecture:
    if not share:
        return architecture
    if not isinstance(architecture, TimmModel):
        raise SpecError(
            f"model {name!r} has no drop path to set to {share:g}; timm's networks have, such as "
            f"timm:resnet18, or set it in your own function and leave --drop-path out"
        )
    return replace(architecture, drop_path=share)


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, {*ARCHITECTURES, *torchvision_names(), *timm_names()})
    return f"; close names are {', '.join(close)}" if close else ""


def _seeded(architecture: Architecture, shapes: Shapes, seed: int) -> nn.Module:
    with seeded(seed):
        model = architecture.build(shapes)
        if type(architecture) in ARCHITECTURES.values():
            initialise(model)
    return model
