r"""Padded inputs: statistics over valid positions only.

With a mask, segments have different numbers of valid values. Pooling weights the segments by these
numbers, and the algebra on tables stays the same. Invalid values are set to 0 before anything is
computed, so that even a NaN among them has no effect; the output there is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.core.transforms import needs_plain_formula
from normkit.errors import InputError, InputTypeError, PartitionError
from normkit.kernels.reference import segments
from normkit.typing import FeatureMap, SegmentTable

Mask = Tensor
"""Boolean ``(N, *S)``, True where a position is valid, or integers ``(N,)``: how many of the first
positions along the last axis are valid."""
Valid = Bool[Tensor, "n 1 *s"]


def read_mask(mask: Mask, x: FeatureMap, name: str) -> Valid:
    """Convert either form of a mask to booleans ``(N, 1, *S)``.

    Raises:
        InputTypeError: If the mask is not a tensor of booleans or integers.
        InputError: If its shape, its device or a length does not fit the input.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        what = (
            f"of {mask.dtype}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        )
        raise InputTypeError(
            f"{name} was given a mask {what}; it takes a tensor of booleans, True where a position "
            f"is valid (mask.bool()), or of whole numbers: the valid length of each example"
        )
    if mask.device != x.device:
        raise InputError(
            f"{name} was given a mask on {mask.device} and an input on {x.device}; move the mask: "
            f"mask.to(x.device)"
        )
    shape = (x.shape[0], *x.shape[2:])
    if mask.dtype == torch.bool and tuple(mask.shape) in (shape, (x.shape[0], 1, *x.shape[2:])):
        return mask.reshape(x.shape[0], 1, *x.shape[2:])
    if mask.dtype != torch.bool and mask.shape == x.shape[:1] and x.ndim > 2:
        return _mask_of_lengths(mask, x, name)
    raise InputError(
        f"{name} was given a mask of {mask.dtype} and shape {tuple(mask.shape)} for an input of "
        f"shape {tuple(x.shape)}; it takes booleans {shape}, one for each position (mask.bool()), "
        f"or whole numbers ({x.shape[0]},), lengths along the last of the positions' axes"
    )


def _mask_of_lengths(lengths: Tensor, x: FeatureMap, name: str) -> Valid:
    size = x.shape[-1]
    if not needs_plain_formula() and lengths.numel():
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > size:
            raise InputError(
                f"{name} was given lengths from {least} to {most} for an input of shape "
                f"{tuple(x.shape)}; a length lies from 0 to {size}, the size of the last axis"
            )
    valid = torch.arange(size, device=x.device) < lengths.reshape(-1, *(1,) * (x.ndim - 1))
    return valid.expand(-1, 1, *x.shape[2:])


def without_invalid(x: FeatureMap, valid: Valid) -> FeatureMap:
    """Return the map with 0 at invalid positions."""
    return x.masked_fill(~valid, 0)


def on_valid(
    x: FeatureMap, valid: Valid | None, normalize: Callable[[FeatureMap], FeatureMap]
) -> FeatureMap:
    """Apply an elementwise norm, with 0 at invalid positions before and after."""
    if valid is None:
        return normalize(x)
    return without_invalid(normalize(without_invalid(x, valid)), valid)


def masked_moments(x: FeatureMap, valid: Valid, segment_size: int) -> Moments:
    """Moments of the valid values of every segment; 0 in segments without valid values.

    Args:
        x: Feature map, with 0 at invalid positions.
        valid: Mask of the valid positions.
        segment_size: Number of elements in a segment.
    """
    rows = segments(x, segment_size)
    inside = segments(valid.to(x.dtype), segment_size)
    count = inside.sum(dim=-1)
    share = inside / count.clamp(min=1).unsqueeze(-1)
    mean = (share * rows).sum(dim=-1)
    var = (share * (rows - mean.unsqueeze(-1)).square()).sum(dim=-1)
    return Moments(mean.flatten(1), var.flatten(1), count.expand_as(mean).flatten(1))


def count_valid(valid: Valid, num_channels: int, segment_size: int) -> SegmentTable:
    """Number of valid values in every segment, ``(N, K)``."""
    count = segments(valid.double(), segment_size).sum(dim=-1)
    return count.expand(-1, num_channels, -1).flatten(1)


def require_valid_values(
    partitions: Iterable[Partition], valid: Valid, shape: Sequence[int], name: str
) -> None:
    """Refuse a mask that leaves a statistics group a single value, whose variance is 0.

    A group without any valid value is not an error, because the whole group is 0 in the output.

    Raises:
        PartitionError: If a group has a single valid value; the message says which group.
    """
    if needs_plain_formula():  # under a trace or transform the mask's values cannot be read
        return
    for partition in partitions:
        size = partition.segment_size(shape)
        count = count_valid(valid, shape[1], size)
        groups = partition.pool(Moments(count, count, count)).count
        single = (groups == 1).nonzero() if groups is not None else []
        if len(single):
            run, group = single[0].tolist()
            raise PartitionError(
                f"{name} expected more than 1 valid value per statistics group when training; the "
                f"mask leaves one to group {group} of run {run} of the examples (shape "
                f"{tuple(shape)}, {partition.num_groups} groups an example); leave such examples "
                f"out, or use a norm with larger groups"
            )
