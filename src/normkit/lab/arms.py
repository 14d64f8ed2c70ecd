"""Arms: what a network is compared with, of which a norm throughout is the plainest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from normkit import (
    NormSpec,
    convert_norm_,
    freeze_statistics,
    place_gnbn_,
    place_ibn_,
    place_xbn_,
)
from normkit.by_batch_size import spec_for
from normkit.convert import Conversion
from normkit.convert.placement.batch_free import batch_free
from normkit.convert.recipe import ConversionRecipe
from normkit.convert.selection import find_norms
from normkit.errors import NormError, SpecError
from normkit.lab.changes import (
    STANDARDIZED,
    WEIGHTS,
    BuiltModel,
    Place,
    remove_norms_,
    reparametrize_,
)
from normkit.lab.slots import PlacedNorm, Slot, find_slots, is_batch_norm, require_norms
from normkit.passes import all_or_nothing
from normkit.recipes import METHODS
from normkit.spec import MAX_LENGTH, parse_list

NONE, FROZEN, IBN_A, IBN_B, XBN, GNBN = "none", "frozen-bn", "ibn-a", "ibn-b", "xbn", "gnbn"
FOUR_THINGS = "four-things"
BATCH_NORM = NormSpec("bn")

ARMS: Mapping[str, str] = MappingProxyType(
    {
        NONE: "no norm: each one is removed, and biases stay as they are",
        FROZEN: "bn with running statistics that stand still; scale and shift learn",
        FOUR_THINGS: "gn, gbgn or ghost by the batch size, as in nk.four_things",
        IBN_A: "IBN-Net-a: ibn first in each residual block but those of the last stage, else bn",
        IBN_B: "IBN-Net-b: instance norm in the stem and after two sums, else bn",
        "xbn/NORM": "XBN: this norm second in each residual block, else bn",
        "xbn-pP/NORM": "the same with the norm at position P, from 1",
        "xbn-dK/NORM": "the same in every K-th block; xbn-pP-dK/NORM is both",
        "gnbn/NORM": "GNBN: this norm at odd positions of the stack, else bn",
        "+ws": "after any of these or a norm: weight standardization before every norm",
        "+ws:center": "the same, which only subtracts the mean of a filter",
        "+ws:scale": "the same, which only divides by its standard deviation",
        "+wn": "weight normalization before every norm",
        "+cwn": "centred weight normalization before every norm",
    }
)
"""What an arm can be besides a norm throughout, in a line each."""

RULES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        IBN_A: (
            "stands where IBN-Net-a has it, in the first norm of residual blocks",
            "choose another norm or a residual network",
        ),
        IBN_B: (
            "stands where IBN-Net-b has it, in the stem and after the sums of residual blocks",
            "choose another norm or a residual network",
        ),
        XBN: (
            "replaces one norm of each residual block",
            "choose another norm or a residual network",
        ),
        GNBN: (
            "replaces every other norm of a stack",
            "choose another norm or a network with two norms at least",
        ),
    }
)
"""Where a placement puts its norm, and the way out where a network has no such places."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What becomes of a network's norms and of the weights before them.

    Grammar: ``[placement/]norm[+weights]``, or a placement alone where it says the norm itself.
    A norm alone is a ``NormSpec`` and stands at every place. ``ARMS`` has the other arms in a line
    each. Where the norm does not stand, ``bn`` does.

    - ``none`` takes every norm away; an activation inside of one stays. Convolutions and linear
      layers that had no bias because a norm came next still have none, so nothing is left that
      shifts a channel there, nor a scale.
    - ``frozen-bn`` normalises by the running statistics that the network came with, mean 0 and
      variance 1 in a new one. Its scale and shift learn.
    - ``four-things`` is a norm throughout, which the batch size decides: ``at`` says which.
    - ``ibn-a`` takes the options of ``ibn``; ``ibn`` alone is read as ``ibn-a``.
    - ``xbn`` and ``gnbn`` take a norm of one example: ``xbn/gn:64``, ``gnbn/gn:4``. A number of
      groups is at most the number of channels in ``xbn``.
    - ``+ws``, ``+wn``, ``+cwn`` concern each convolution that feeds a norm, whichever stands there.

    Args:
        placement: ``""``, ``"none"``, ``"frozen-bn"``, ``"four-things"``, ``"ibn-a"``,
            ``"ibn-b"``, ``"gnbn"`` or ``"xbn"``, which is followed by ``"-p1"`` if not the second
            norm of a block changes, and by ``"-d2"`` if not every block does.
        norm: What is placed; None where the placement says it.
        weights: One of ``WEIGHTS``, or ``""``.

    Raises:
        SpecError: From ``parse``, with what is known.

    Source:
        XBN and GNBN: Huang, Zhou, Wang, Luo & Liu, Delving into the Estimation Shift of Batch
        Normalization in a Network. IBN-Net: Pan, Luo, Shi & Tang, Two at Once. Centring or
        scaling alone: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, table 4.

    Example:
        >>> Arm.parse("xbn-d2-p1/gn:max=64+ws")
        Arm('xbn-p1-d2/gn:max=64+ws')
        >>> [str(Arm.parse(text)) for text in ("gn:8", "ibn", "xbn-p2/in", "none+ws:center")]
        ['gn:8', 'ibn-a', 'xbn/in', 'none+ws:center']
    """

    placement: str
    norm: NormSpec | None
    weights: str = ""

    @classmethod
    def parse(cls, text: "str | NormSpec | Arm") -> "Arm":
        """Read an arm; one that is read already is returned as it is."""
        if isinstance(text, Arm):
            return text
        if not isinstance(text, str | NormSpec):
            raise SpecError(f"an arm is a text such as 'gn:8'; {text!r} was given")
        text = str(text).strip()
        if len(text) > MAX_LENGTH:
            raise SpecError(
                f"an arm of {len(text)} characters was given, {text[:20]!r}...; it has at most "
                f"{MAX_LENGTH}"
            )
        body, plus, weights = text.partition("+")
        if plus and weights not in WEIGHTS:
            known = ", ".join(f"+{name}" for name in WEIGHTS)
            raise SpecError(f"arm {text!r} ends in +{weights}; the endings are: {known}")
        placement, norm = _placed(body, text) if "/" in body else _alone(body, text)
        return cls(placement, norm, weights)

    def __str__(self) -> str:
        norm = "" if self.norm is None else str(self.norm)
        if self.placement == IBN_A:
            norm = norm.removeprefix("ibn")
        slash = "/" if self.placement and norm and self.placement != IBN_A else ""
        return f"{self.placement}{slash}{norm}" + (f"+{self.weights}" if self.weights else "")

    def __repr__(self) -> str:
        return f"Arm({str(self)!r})"

    @property
    def is_plain(self) -> bool:
        """Whether this is a norm at every place, and nothing else."""
        return not self.placement and not self.weights

    def at(self, batch_size: int | None) -> "Arm":
        """The arm that this one is at a batch size.

        Raises:
            SpecError: If it depends on the batch size, and none is given.

        Example:
            >>> [str(Arm.parse("four-things+ws").at(size)) for size in (1, 2, 32)]
            ['gn:max=32+ws', 'gbgn:max=32+ws', 'ghost:16+ws']
        """
        if self.placement != FOUR_THINGS:
            return self
        if batch_size is None:
            raise SpecError(f"arm {self} is chosen by the batch size; give batch_size=")
        return Arm("", NormSpec.parse(spec_for(batch_size)), self.weights)

    @property
    def has_learning_rate_as_update_rate(self) -> bool:
        """Whether estimates of micro-batches move by the learning rate, as in the paper."""
        options = dict(self.norm.arguments) if self.norm else {}
        return bool(options.get("micro_batch")) and "update_rate" not in options

    @all_or_nothing
    def apply_(
        self,
        model: nn.Module,
        *,
        example_input: Any,
        batch_size: int | None = None,
        name: str = "",
        preserve: bool = False,
    ) -> BuiltModel:
        """Change a network's norms and weights in place; values that fit are carried over.

        Replaced are the norms that look at the batch; in a network that has none, as a vision
        transformer, all norms, by arms that are a norm throughout. ``none`` removes norms of every
        kind. Norms that a forward calls as functions are not seen.

        Args:
            model: The network, on any device; left in the mode it is in.
            example_input: What it is called with: a tuple of arguments, a dict of named ones, or
                the only one. Shows the sizes of the maps and who feeds whom.
            batch_size: Decides ``auto`` arguments of the norm.
            name: How messages call the network.
            preserve: Whether ``+ws`` keeps the function, by a learned gain and offset per filter.

        Returns:
            The network, each norm with its place, and the convolutions whose weights are changed.

        Raises:
            SpecError: If the network does not take the example or has no norm, no batch norm or no
                residual block for the arm to change, or no convolution for its weights.
            PartitionError: If the norm's groups do not fit one of the layers.
            NormError: Whatever else the tools behind it refuse; the network is then as it was.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            >>> built = Arm.parse("gn:max=4+ws").apply_(net, example_input=torch.zeros(2, 3, 8, 8))
            >>> built.norms[0].norm, built.standardized
            ('gn:4+ws', ('0',))
        """
        name = name or type(model).__name__
        arm, call = self.at(batch_size), (model, example_input)
        places = arm.places_(model, example_input, name)
        specs = {
            at: None if place.spec is None else place.slot.resolved(place.spec, batch_size)
            for at, place in places.items()
        }
        preserve = preserve and arm.weights in STANDARDIZED
        changed = reparametrize_(arm.weights, call, places, name, preserve)
        kept = {at: spec for at, spec in specs.items() if spec is not None}
        if kept:
            convert_norm_(model, kept)
        else:
            remove_norms_(call, name)
        if arm.placement == FROZEN:
            freeze_statistics(model, lambda _, at: at in specs)
        norms = tuple(arm._report(at, places[at].slot, spec) for at, spec in specs.items())
        blocks = tuple(place.after_sum_of for place in places.values() if place.after_sum_of)
        return BuiltModel(
            model=model,
            norms=norms,
            standardized=changed,
            preserved=changed if preserve else (),
            after_sum=blocks,
        )

    def places_(self, model: nn.Module, example_input: Any, name: str) -> Mapping[str, Place]:
        """Say what stands where, in the order of the modules; norms after a sum are added.

        Nothing else is changed.

        Raises:
            NormError: As ``apply_``, for all that does not depend on the batch size.
        """
        slots = find_slots(model, example_input, name)
        if self.placement == NONE:
            return {at: Place(slot=slot, spec=None) for at, slot in slots.items()}
        specs = dict.fromkeys(self.replaced(model, name), self.norm or BATCH_NORM)
        convert_norm_(model, dict.fromkeys(specs, BATCH_NORM), dry_run=True)  # or has no rule
        rule = RULES.get(XBN if self.placement.startswith(XBN) else self.placement)
        blocks: dict[str, str] = {}
        if rule is not None:
            special, blocks = self._special_(model, example_input, rule)
            specs = dict.fromkeys(specs, BATCH_NORM) | special
        if self.placement == IBN_B:
            slots = find_slots(model, example_input, name)
        frozen = self.placement == FROZEN
        return {
            at: Place(slot=slot, spec=specs[at], is_frozen=frozen, after_sum_of=blocks.get(at, ""))
            for at, slot in slots.items()
            if at in specs
        }

    def replaced(self, model: nn.Module, name: str) -> list[str]:
        """Names of the norms that become others: those that look at the batch, or else all.

        Args:
            model: The network.
            name: How messages call it.

        Raises:
            SpecError: If there are none.
        """
        found = find_norms(model)
        require_norms(model, found, name)
        over_batch = [names[0] for norm, names in found.items() if is_batch_norm(norm)]
        if not over_batch and self.placement:
            kinds = ", ".join(sorted({type(norm).__name__ for norm in found}))
            raise SpecError(
                f"{self} changes batch norms, but model {name!r} has none, only {kinds}; choose a "
                f"norm throughout such as gn:8, or a model that has batch norms, such as resnet18"
            )
        return over_batch or [names[0] for names in found.values()]

    def _special_(
        self,
        model: nn.Module,
        example_input: Any,
        rule: tuple[str, str],
    ) -> tuple[dict[str, NormSpec], dict[str, str]]:
        """What the placement puts where, and the block of each norm that is added after a sum.

        IBN-Net-b, which adds them, is carried out.
        """
        try:
            done = self._placing(model, example_input)
        except NormError as error:
            raise SpecError(f"{self} {rule[0]}; {rule[1]}: {error}") from error
        own = self.norm if self.placement == IBN_A else None
        specs = {change.name: own or NormSpec.parse(change.new) for change in done.changes}
        blocks = ConversionRecipe.read(done.recipe()).after_sum
        starts = {f"{block}.": block for block in blocks}
        added = {at: starts[start] for at in specs for start in starts if at.startswith(start)}
        return specs, added

    def _placing(self, model: nn.Module, example_input: Any) -> Conversion:
        """Place by the paper's tool, but for IBN-Net-b without changing anything."""
        if self.placement == IBN_B:
            return place_ibn_(model, "b", example_input=example_input)
        options: dict[str, Any] = {"example_input": example_input, "dry_run": True}
        if self.placement == IBN_A:
            return place_ibn_(model, "a", **options)
        norm = self.norm or BATCH_NORM
        if self.placement == GNBN:
            return place_gnbn_(model, norm, **options)
        position, every = _position_and_every(self.placement)
        return place_xbn_(model, position, every, norm, **options)

    def _report(self, at: str, slot: Slot, spec: NormSpec | None) -> PlacedNorm:
        norm = NONE if spec is None else FROZEN if self.placement == FROZEN else str(spec)
        return PlacedNorm(
            name=at,
            norm=norm + (f"+{self.weights}" if self.weights else ""),
            num_features=slot.num_features,
            num_positions=slot.num_positions,
        )


def parse_arms(text: str) -> tuple[Arm, ...]:
    """Read a comma-separated list of arms, each once.

    Raises:
        SpecError: If one cannot be read, is there twice, or the list is empty.

    Example:
        >>> parse_arms("bn,none,xbn/gn:64")
        (Arm('bn'), Arm('none'), Arm('xbn/gn:64'))
    """
    return parse_list(text, Arm.parse)


def _alone(body: str, text: str) -> tuple[str, NormSpec | None]:
    """Read what has no slash: a norm, or a placement that says the norm itself."""
    name, colon, options = body.partition(":")
    if name in {IBN_A, "ibn"}:
        return IBN_A, NormSpec.parse(f"ibn{colon}{options}")
    if name in {NONE, FROZEN, FOUR_THINGS, IBN_B}:
        if colon:
            raise SpecError(f"arm {text!r} gives {name} options, but it has none; write {name}")
        return name, None
    if name == GNBN or re.fullmatch(rf"{XBN}(-.*)?", name):
        raise SpecError(f"arm {text!r} says no norm to place; write it after a /: {name}/gn:4")
    try:
        return "", NormSpec.parse(body)
    except SpecError as error:
        if name in METHODS:
            raise
        others = ", ".join(arm for arm in ARMS if not arm.startswith("+"))
        raise SpecError(
            f"{error} (besides norms there are: {others}; --own-norms names norms of your own)"
        ) from error


def _placed(body: str, text: str) -> tuple[str, NormSpec]:
    """Read a placement and the norm after the slash."""
    placement, _, norm = body.partition("/")
    if placement != GNBN:
        try:
            position, every = _position_and_every(placement)
        except ValueError as error:
            raise SpecError(
                f"arm {text!r} has {placement!r} before the /; it is {XBN}, {XBN}-p1 (position), "
                f"{XBN}-d2 (every second block), {XBN}-p1-d2 or {GNBN}"
            ) from error
        placement = XBN + (f"-p{position}" if position != 2 else "")
        placement += f"-d{every}" if every != 1 else ""
    try:
        return placement, batch_free(norm)
    except SpecError as error:
        raise SpecError(f"arm {text!r} cannot place its norm: {error}") from error


def _position_and_every(placement: str) -> tuple[int, int]:
    """Position and distance of ``xbn-p1-d2``: 2 and 1 where they are not written.

    Raises:
        ValueError: If it is no such placement.
    """
    head, *parts = placement.split("-")
    numbers = {part[:1]: part[1:] for part in parts}
    known = len(numbers) == len(parts) and numbers.keys() <= {"p", "d"} and head == XBN
    if known and all(re.fullmatch("[1-9][0-9]{0,3}", number) for number in numbers.values()):
        return int(numbers.get("p", 2)), int(numbers.get("d", 1))
    raise ValueError(placement)
