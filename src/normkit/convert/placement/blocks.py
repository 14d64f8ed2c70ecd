"""Finding the residual blocks of a model by what their forward does, not by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.convert.placement.own_forward import (
    OwnForward,
    is_sequence,
    own_forwards,
    trace_own_forward,
)
from normkit.convert.rules import read
from normkit.convert.selection import NamedNorms, find_norms
from normkit.errors import ConversionError, OptionError, TraceError
from normkit.tracing.kinds import is_norm
from normkit.tracing.trace import trace


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block.

    Args:
        name: Its name in the model.
        own: The calls of its forward.
        norms: Norms of the residual branch, in the order of the calls.
        shortcut: Norms of the shortcut branch only.
    """

    name: str
    own: OwnForward
    norms: tuple[nn.Module, ...]
    shortcut: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the norms of a residual network are.

    Args:
        blocks: Blocks with the most common number of norms, in the order of the forward.
        others: Blocks with another number of norms.
        stem: Norms before the first block, in the order of the forward.
        found: All norms with their names.
    """

    blocks: tuple[Block, ...]
    others: tuple[Block, ...]
    stem: tuple[nn.Module, ...]
    found: NamedNorms

    @property
    def num_positions(self) -> int:
        """Number of norms in the residual branch of each of ``blocks``."""
        return len(self.blocks[0].norms)

    def reasons(self) -> dict[nn.Module, str]:
        """Describe the position of each norm, as the reason why a report says it stays."""
        roles = dict.fromkeys(self.found, "it is in no residual block")
        roles |= dict.fromkeys(self.stem, "it is in the stem")
        for block in self.others:
            count = f"its block has {len(block.norms)} norms, most have {self.num_positions}"
            roles |= dict.fromkeys(block.norms, count)
        for number, block in enumerate(self.blocks, 1):
            roles |= dict.fromkeys(
                find_norms(block.own.module), f"it comes after the sum of block {number}"
            )
            for position, norm in enumerate(block.norms, 1):
                roles[norm] = f"it is norm {position} of block {number}"
        for block in (*self.blocks, *self.others):
            roles |= dict.fromkeys(block.shortcut, "it is in the shortcut")
        return roles


def find_layout(model: nn.Module, example_input: Any = None) -> Layout:
    """Find the residual blocks of a model, and the norms before them.

    A block is a module whose own forward adds two branches: a residual branch with a chain of at
    least two norms, one of which takes batch statistics, and a shortcut with fewer norms. Modules
    of the same class without a sum are blocks too, such as those of MobileNetV2 that change the
    resolution.

    Raises:
        OptionError: If there is no block.
        TraceError: If the model fails on the example input.
    """
    found = find_norms(model)
    order = _order(model, found, example_input)
    blocks = [b for b in _blocks(model) if any(map(_over_batch, b.norms))]
    if not blocks:
        raise OptionError(
            f"{type(model).__name__} has no residual blocks that could be recognised: modules "
            f"whose own forward adds a shortcut to a branch with at least two norms, one of them "
            f"a batch norm; name the norms yourself: convert_norm_(model, "
            f"{{'layer1.*.bn2': 'gn:max=64'}})"
        )
    blocks.sort(key=lambda block: order[block.norms[0]])
    counts = Counter(len(block.norms) for block in blocks)
    usual = max(counts, key=lambda count: (counts[count], count))
    return Layout(
        tuple(block for block in blocks if len(block.norms) == usual),
        tuple(block for block in blocks if len(block.norms) != usual),
        tuple(_stem(model, blocks, order)),
        found,
    )


def _order(model: nn.Module, found: NamedNorms, example_input: Any) -> dict[nn.Module, int]:
    """Number the norms in the order of their calls; those whose calls are unknown come last."""
    names = {name: norm for norm, several in found.items() for name in several}
    called: dict[nn.Module, None] = {}
    try:
        calls = trace(model, example_input).calls
        called = dict.fromkeys(names[call.name] for call in calls if call.name in names)
    except TraceError:
        if example_input is not None:
            raise
    return {norm: index for index, norm in enumerate(called | dict.fromkeys(found))}


def _blocks(model: nn.Module) -> list[Block]:
    """Find the innermost modules with a sum, and all other modules of the same classes."""
    adding: dict[nn.Module, OwnForward] = {}
    for own in own_forwards(model):
        inside = any(part in adding for part in own.module.modules())
        if own.join is not None and not inside:
            adding[own.module] = own
    names = {module: name for name, module in model.named_modules()}
    same_class: dict[type[nn.Module], list[Block | None]] = {}
    kinds = {type(module) for module in adding}
    for module, name in names.items():
        if type(module) in kinds:
            own = adding.get(module) or trace_own_forward(module)
            same_class.setdefault(type(module), []).append(_block(name, own))
    alike = [several for several in same_class.values() if None not in several]
    return [block for several in alike for block in several if block is not None]


def _block(name: str, own: OwnForward | None) -> Block | None:
    """Return the block, or None if the module is not one."""
    if own is None:
        return None
    longer, shorter = own.sides()
    norms, others = own.norms(longer), own.norms(shorter)
    if len(norms) < 2 or len(others) >= len(norms) or not own.is_chain(longer):
        return None
    return Block(name, own, tuple(norms), tuple(n for n in others if n not in norms))


def _over_batch(norm: nn.Module) -> bool:
    try:
        return read(norm).over_batch
    except ConversionError:  # raised again by the conversion, if this norm is to be replaced
        return False


def _stem(
    model: nn.Module, blocks: Sequence[Block], order: Mapping[nn.Module, int]
) -> list[nn.Module]:
    """Find the norms before all blocks that are not inside another unit with several norms."""
    units = [part for part in model.modules() if _is_unit(part, blocks)]
    inside = {part for unit in units for part in unit.modules()}
    before = min(order[norm] for block in blocks for norm in (*block.norms, *block.shortcut))
    return [norm for norm, index in order.items() if index < before and norm not in inside]


def _is_unit(part: nn.Module, blocks: Sequence[Block]) -> bool:
    """Whether a module has several norms and its own forward but contains no residual block.

    The first block of timm's MobileNetV2 is such a unit.
    """
    if is_norm(part) or is_sequence(part) or len(find_norms(part)) < 2:
        return False
    parts = set(part.modules())
    return not any(block.own.module in parts for block in blocks)
