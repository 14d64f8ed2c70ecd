"""What an arm does to a network besides putting norms into their places."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import nn

from normkit import NormSpec, standardize_weights_
from normkit.convert.adapters import modules_after
from normkit.convert.rules import read
from normkit.convert.selection import find_hidden, find_norms
from normkit.errors import SpecError
from normkit.lab.slots import Call, PlacedNorm, Slot, send
from normkit.text import listed
from normkit.tracing import CONVOLUTIONS, trace_feeds
from normkit.tracing.kinds import is_producer
from normkit.weights import WeightReport, centered_weight_norm_, weight_norm_

WEIGHTS: Mapping[str, Callable[..., WeightReport]] = MappingProxyType(
    {
        "ws": standardize_weights_,
        "ws:center": partial(standardize_weights_, scale=False),
        "ws:scale": partial(standardize_weights_, center=False),
        "wn": weight_norm_,
        "cwn": centered_weight_norm_,
    }
)
"""What is done to the weights of the convolutions that feed a norm, by the ending of an arm."""

STANDARDIZED = frozenset(ending for ending in WEIGHTS if ending.startswith("ws"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place of a network, and what an arm puts there.

    Args:
        slot: The place.
        spec: The norm; None for none.
        is_frozen: Whether its running statistics stand still.
        after_sum_of: The residual block after whose sum the norm was added; "" for other norms.
    """

    slot: Slot
    spec: NormSpec | None
    is_frozen: bool = False
    after_sum_of: str = ""

    def try_out(self, batch_size: int, num_examples: int) -> None:
        """Build what comes here, and send such a batch through it as training does.

        Raises:
            NormError: If it does not fit.
        """
        if self.spec is not None:
            self.slot.try_out(self.spec, batch_size, num_examples, training=not self.is_frozen)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A network and its norms, in the order of its modules.

    Args:
        model: The network.
        norms: Its norms.
        standardized: Names of the convolutions whose weights are standardised or normalised.
        preserved: Those of them that have a learned gain and offset of each filter.
        after_sum: Names of the residual blocks that got a norm after their sum.
    """

    model: nn.Module
    norms: tuple[PlacedNorm, ...]
    standardized: tuple[str, ...] = ()
    preserved: tuple[str, ...] = ()
    after_sum: tuple[str, ...] = ()


def reparametrize_(
    weights: str, call: Call, norms: Iterable[str], name: str, preserve: bool = False
) -> tuple[str, ...]:
    """Change the weights of the convolutions that feed one of these norms.

    Args:
        weights: One of ``WEIGHTS``, or ``""``.
        call: The model, and what it is called with.
        norms: Names of the norms.
        name: How messages call the model.
        preserve: Whether filters of ``STANDARDIZED`` get a gain and an offset (``Arm.apply_``).

    Returns:
        Names of the convolutions.

    Raises:
        SpecError: If there is none.
    """
    if not weights:
        return ()
    model, example_input = call
    names = set(norms)
    pairs = trace_feeds(model, example_input).pairs
    feeding = {pair.producer for pair in pairs if pair.norm in names}
    report = WEIGHTS[weights](
        model,
        lambda module, at: at in feeding and isinstance(module, CONVOLUTIONS),
        example_input=example_input,
        **({"preserve": True} if preserve else {}),
    )
    if not report.changed:
        raise SpecError(
            f"+{weights} has nothing to standardise in model {name!r}: none of its convolutions "
            f"feeds a norm; leave +{weights} out, or choose a model with convolutions, such as "
            f"resnet18"
        )
    return report.changed


def reparametrize_layers_(
    model: nn.Module, weights: Mapping[str, str], preserved: Iterable[str] = ()
) -> None:
    """Change the weights of layers of these names.

    Args:
        model: Changed in place.
        weights: One of ``WEIGHTS`` for each layer.
        preserved: Layers that get a gain and an offset of each filter.

    Raises:
        SpecError: If there is no such change, or no such layer.
        NormError: If a weight cannot be changed so.
    """
    layers, kept = dict(model.named_modules()), frozenset(preserved)
    unknown = [at for at in weights if not is_producer(layers.get(at, model))]
    if unknown:
        raise SpecError(f"the model has no convolutions at {listed(unknown)}")
    for ending, preserve in sorted({(ending, at in kept) for at, ending in weights.items()}):
        if ending not in WEIGHTS:
            raise SpecError(f"weights changed by {ending!r} are not known; known: {[*WEIGHTS]}")
        names = {at for at, text in weights.items() if text == ending and (at in kept) == preserve}
        options = {"preserve": True} if preserve else {}
        WEIGHTS[ending](model, lambda _, at, names=names: at in names, **options)


def remove_norms_(call: Call, name: str) -> None:
    """Put in the place of each norm what it does besides normalising.

    Raises:
        SpecError: If one is out of sight, or the forward cannot do without.
    """
    model, _ = call
    hidden = find_hidden(model)
    if hidden:
        raise SpecError(
            f"none removes norms that are modules of the model, but {hidden[0].name} of model "
            f"{name!r} holds one in a Python list or the like; hold it in an nn.ModuleList"
        )
    take_out_(model, [names[0] for names in find_norms(model).values()])
    send(
        call,
        f"none leaves model {name!r} without norms, which its forward cannot do without",
        "choose another arm or another model",
    )


def take_out_(model: nn.Module, norms: Iterable[str]) -> None:
    """Put in the place of norms of these names what they do besides normalising.

    Raises:
        SpecError: If the model has no norm of such a name.
    """
    by_name = {name: (norm, names) for norm, names in find_norms(model).items() for name in names}
    unknown = [name for name in norms if name not in by_name]
    if unknown:
        raise SpecError(f"the model has no norms to remove at {listed(unknown)}")
    for norm, names in {by_name[name][0]: by_name[name][1] for name in norms}.items():
        rest = _without_norm(norm)
        for at in names:
            model.set_submodule(at, rest)


def _without_norm(norm: nn.Module) -> nn.Module:
    parts = modules_after(norm, read(norm).activation)
    return nn.Sequential(OrderedDict(parts)) if parts else nn.Identity()
